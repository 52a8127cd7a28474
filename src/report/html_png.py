"""The fronts of a study as one PNG, for places that show no page (a README, a paper)."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from src.files import write_atomically

MARKERS = "osD^Xv"


def draw_fronts(fronts: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw every front that has points, side by side; no file where there is none."""
    shown = [front for front in fronts if any(line["points"] for line in front["series"])]
    if not shown:
        path.unlink(missing_ok=True)
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.2 * len(shown), 5.2))
    axes = figure.subplots(1, len(shown), squeeze=False)
    for axis, front in zip(axes[0], shown, strict=True):
        for number, line in enumerate(front["series"]):
            _draw_line(axis, line, number)
        axis.set(title=front["title"], xlabel=front["x"]["label"], ylabel=front["y"]["label"])
        axis.grid(alpha=0.3)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(labels)), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.04 + 0.035 * (len(labels) // 5 + 1), 1, 1))
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=150, format="png"))


def _draw_line(axis: Any, line: Mapping[str, Any], number: int) -> None:
    """A method's path with its intervals."""
    points = line["points"]
    values = {key: [point[key]["value"] for point in points] for key in ("x", "y")}
    errors = {f"{key}err": error_bars(point[key] for point in points) for key in ("x", "y")}
    style = {
        "label": legend_name(line["name"]),
        "linewidth": 1.2,
        "elinewidth": 0.6,
        "markersize": 5,
        **series_style(number),
    }
    axis.errorbar(values["x"], values["y"], **errors, **style)


def error_bars(numbers: Iterable[Mapping[str, float]]) -> list[list[float]]:
    """Lengths below and above each value; 0 at an end beyond it, as a skewed draw's interval need not hold its mean."""
    ends = [(one["value"] - one["low"], one["high"] - one["value"]) for one in numbers]
    return [[max(0.0, below) for below, _ in ends], [max(0.0, above) for _, above in ends]]


def legend_name(name: str) -> str:
    """A name as matplotlib writes it as it stands: ``$`` begins no formula, and ``_`` hides nothing from the legend."""
    shown = name.replace("$", r"\$")
    return f"\u200b{shown}" if shown.startswith("_") else shown


def series_style(number: int) -> dict[str, Any]:
    """Mark and colour of a series: ten strong colours, then ten pale ones; none of 20 has the colour of another."""
    from matplotlib import colormaps

    pale, hue = divmod(number % 20, 10)
    # tab20 has each hue twice, strong and pale.
    return {"marker": MARKERS[number % len(MARKERS)], "color": colormaps["tab20"](2 * hue + pale)}
