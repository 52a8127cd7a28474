"""The plot: what safety costs. Refusal against over-refusal, and refusal against utility, with 95 % intervals."""

from itertools import groupby
from pathlib import Path
from typing import Any

from src.files import write_atomically
from src.report.results import ModelResult

# Okabe and Ito's colours: told apart by colour-blind readers too; shapes say the same in print.
STYLES = (
    ("#0072B2", "o"),
    ("#D55E00", "s"),
    ("#009E73", "^"),
    ("#CC79A7", "D"),
    ("#56B4E9", "v"),
    ("#E69F00", "P"),
)
EXPERT_STYLES = {"base": ("#666666", "X"), "expert": ("#000000", "*")}


def plot_fronts(results: list[ModelResult], path: Path) -> bool:
    """Draw the fronts as a PNG; returns false (and draws nothing) where a needed suite was not evaluated."""
    columns = list(results[0].shares)
    safety = next((c for c in columns if c.startswith("refusal")), None)
    others = [c for prefix in ("over-refusal", "accuracy") for c in columns if c.startswith(prefix)][:3]
    if safety is None or not others:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(others), figsize=(5.6 * len(others), 5.4), sharey=True, squeeze=False)
    for axis, column in zip(axes[0], others, strict=True):
        _draw(axis, results, column, safety)
    axes[0][0].set_ylabel(f"{safety}, harmful prompts  (higher is safer)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=min(6, len(labels)), frameon=False)
    figure.suptitle("What safety costs: each method over its strengths, 95 % intervals")
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    # An explicit format: the temporary file's name does not end in .png.
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=150, format="png"))
    pyplot.close(figure)
    return True


def _draw(axis: Any, results: list[ModelResult], column: str, safety: str) -> None:
    styles = iter(STYLES * 4)
    for method, group in groupby(results, key=lambda r: r.method if r.alpha is not None else r.name):
        points = [r for r in group if column in r.shares and safety in r.shares]
        if not points:
            continue
        colour, marker = EXPERT_STYLES.get(points[0].method) or next(styles)
        x, y = [p.shares[column] for p in points], [p.shares[safety] for p in points]
        axis.errorbar(
            [s.value for s in x],
            [s.value for s in y],
            xerr=[[s.value - s.low for s in x], [s.high - s.value for s in x]],
            yerr=[[s.value - s.low for s in y], [s.high - s.value for s in y]],
            color=colour,
            marker=marker,
            markersize=9,
            elinewidth=0.8,
            alpha=0.9,
            linestyle="-" if len(points) > 1 else "none",
            label=method,
        )
        # Every other path is labelled below its points: at like refusal the labels of two would lie on each other.
        below = marker in [style[1] for style in STYLES[1::2]] or points[0].name == "utility"
        for point, sx, sy in zip(points, x, y, strict=True):
            text = f"α={point.alpha:g}" if point.alpha is not None else point.name
            axis.annotate(
                text,
                (sx.value, sy.value),
                xytext=(7, -13 if below else 6),
                textcoords="offset points",
                fontsize=8,
                color=colour,
            )
    better = "lower is better" if column.startswith("over") else "higher is better"
    axis.set(xlabel=f"{column}  ({better})", xlim=(-0.04, 1.08), ylim=(-0.04, 1.08))
    axis.grid(alpha=0.25)
