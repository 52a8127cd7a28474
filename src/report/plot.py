"""The plot: what safety costs. Refusal against over-refusal, and refusal against utility, with 95 % intervals."""

from dataclasses import asdict
from itertools import cycle, groupby
from pathlib import Path
from typing import Any, NamedTuple

from src.files import write_atomically
from src.report.html_png import error_bars, legend_name
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
MARKER = 9
"""Size of a marker, points."""
Place = tuple[int, int, str]
"""Where a label stands: points from its marker, to the right and up, and which side of the text is there."""
PLACES: list[Place] = [(x, y, side) for x, side in ((7, "left"), (-7, "right")) for y in (8, -8, 16, -16)]
"""Where a label may stand, in order of preference."""


class Label(NamedTuple):
    """What is written beside a point."""

    text: str
    point: tuple[float, float]
    colour: str


def plot_fronts(results: list[ModelResult], path: Path) -> bool:
    """Draw the fronts as a PNG; returns false (and draws nothing) where a needed suite was not evaluated."""
    columns = list(results[0].shares)
    safety = next((c for prefix in ("refusal", "jailbreak refusal") for c in columns if c.startswith(prefix)), None)
    others = [c for prefix in ("over-refusal", "accuracy", "ROUGE-L") for c in columns if c.startswith(prefix)][:3]
    if safety is None or not others:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6 * len(others), 5.4))
    FigureCanvasAgg(figure)  # labels are measured before the picture is written
    axes = figure.subplots(1, len(others), sharey=True, squeeze=False)
    labels = [_draw(axis, results, column, safety) for axis, column in zip(axes[0], others, strict=True)]
    axes[0][0].set_ylabel(f"{safety}, harmful prompts  (higher is safer)")
    handles, methods = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, methods, loc="lower center", ncols=min(6, len(methods)), frameon=False)
    figure.suptitle("What safety costs: each method over its strengths, 95 % intervals")
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    for axis, own in zip(axes[0], labels, strict=True):
        _place(axis, own)
    # An explicit format: the temporary file's name does not end in .png.
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=150, format="png"))
    return True


def _draw(axis: Any, results: list[ModelResult], column: str, safety: str) -> list[Label]:
    """Draw points, paths and intervals; the labels are placed when the layout stands."""
    styles, labels = cycle(STYLES), []
    for method, group in groupby(results, key=lambda r: r.path):
        points = [r for r in group if column in r.shares and safety in r.shares]
        if not points:
            continue
        colour, marker = EXPERT_STYLES.get(points[0].method) or next(styles)
        x, y = [p.shares[column] for p in points], [p.shares[safety] for p in points]
        axis.errorbar(
            [s.value for s in x],
            [s.value for s in y],
            xerr=error_bars(map(asdict, x)),
            yerr=error_bars(map(asdict, y)),
            color=colour,
            marker=marker,
            markersize=MARKER,
            elinewidth=0.8,
            alpha=0.9,
            linestyle="-" if len(points) > 1 else "none",
            label=legend_name(method),
        )
        for point, sx, sy in zip(points, x, y, strict=True):
            text = f"{point.strength[0]}={point.strength[1]:g}" if point.strength else point.name
            labels.append(Label(text, (sx.value, sy.value), colour))
    better = "lower is better" if column.startswith("over") else "higher is better"
    axis.set(xlabel=f"{column}  ({better})", xlim=(-0.04, 1.08), ylim=(-0.08, 1.08))
    axis.grid(alpha=0.25)
    return labels


def _place(axis: Any, labels: list[Label]) -> None:
    """Write each label where it covers as few markers and earlier labels as it can, inside of the axes."""
    from matplotlib.transforms import Bbox

    renderer, frame = axis.figure.canvas.get_renderer(), axis.get_window_extent()
    half = MARKER / 2 * axis.figure.dpi / 72
    centres = [axis.transData.transform(label.point) for label in labels]
    taken = [Bbox([centre - half, centre + half]) for centre in centres]
    for label in labels:
        found = []
        for place in PLACES:
            tried = _write(axis, label, place)
            box = tried.get_window_extent(renderer)
            tried.remove()
            outside = not all(frame.contains(*corner) for corner in box.corners())
            found.append((outside, sum(box.overlaps(other) for other in taken), place, box))
        _, _, place, box = min(found, key=lambda one: one[:2])
        _write(axis, label, place)
        taken.append(box)


def _write(axis: Any, label: Label, place: Place) -> Any:
    """Write a label on a white rim, which keeps it readable on lines."""
    from matplotlib.patheffects import withStroke

    return axis.annotate(
        legend_name(label.text),
        label.point,
        xytext=place[:2],
        textcoords="offset points",
        ha=place[2],
        va="center",
        fontsize=8,
        color=label.colour,
        path_effects=[withStroke(linewidth=2.5, foreground="white")],
    )
