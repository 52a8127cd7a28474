"""The fronts of a study as one PNG, for places that show no page (a README, a paper)."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from src.files import write_atomically
from src.report.front_scale import REFERENCE, beyond, off_axis_note, on_axis, vertical_axis
from src.report.html_axes import Axis

MARKERS = "osD^Xv"
REFERENCE_STYLES = ({"marker": "P"}, {"marker": "s", "markerfacecolor": "none"}, {"marker": "*", "markersize": 9})
GREY = "0.35"
HUES = (0, 1, 2, 3, 4, 5, 6, 8, 9, 7)
"""Order in which methods take the hues of tab20: grey, which references have, last."""
ARROWS = {"below": 7, "above": 6}
"""Matplotlib's numbers of carets whose tip is the point."""


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
        ends = vertical_axis(front)
        for line, style in zip(front["series"], series_styles(front["series"]), strict=True):
            _draw_line(axis, line, style, ends)
        note = off_axis_note(front, ends)
        axis.set(title=front["title"], ylabel=front["y"]["label"], ylim=ends)
        axis.set_xlabel(f"{front['x']['label']}\n{note}" if note else front["x"]["label"])
        axis.grid(alpha=0.3)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(labels)), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.04 + 0.035 * (len(labels) // 5 + 1), 1, 1))
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=150, format="png"))


def series_styles(series: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mark, colour and width of each series: references are grey, the study's own method is drawn over the others."""
    found, references, methods = [], 0, 0
    for line in series:
        if line.get("role") == REFERENCE:
            found.append({"color": GREY, **REFERENCE_STYLES[references % len(REFERENCE_STYLES)]})
            references += 1
        else:
            own = {"linewidth": 2.4, "markersize": 7, "zorder": 4} if line.get("role") == "ours" else {}
            found.append(series_style(methods) | own)
            methods += 1
    return found


def _draw_line(axis: Any, line: Mapping[str, Any], style: dict[str, Any], ends: Axis) -> None:
    """A method's path with its intervals; an arrow on the edge for a point beyond it."""
    points = [point for point in line["points"] if beyond(point["y"]["value"], ends) is None]
    for point in line["points"]:
        height = point["y"]["value"]
        if side := beyond(height, ends):
            edge = [on_axis(height, ends)]
            axis.plot(
                [point["x"]["value"]], edge, marker=ARROWS[side], color=style["color"], markersize=8, linestyle=""
            )
    values = {key: [point[key]["value"] for point in points] for key in ("x", "y")}
    errors = {f"{key}err": error_bars(point[key] for point in points) for key in ("x", "y")}
    plain = {"label": legend_name(line["name"]), "linewidth": 1.2, "elinewidth": 0.6, "markersize": 5}
    axis.errorbar(values["x"], values["y"], **errors, **plain | style)


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

    pale, place = divmod(number % 20, 10)
    # tab20 has each hue twice, strong and pale.
    return {"marker": MARKERS[number % len(MARKERS)], "color": colormaps["tab20"](2 * HUES[place] + pale)}
