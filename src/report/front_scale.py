"""The vertical axis of a front: as long as its methods need, so that a far reference does not press them into one line.

The safety expert alone may have lost every task, or hold benign answers a thousand times less likely. On an axis with
room for that, methods that differ by hundredths lie on each other. A reference further off the methods' intervals than
half their span is put on the edge, and its value is written beside the plot.
"""

from collections.abc import Mapping
from typing import Any, Literal

from src.report.html_axes import Axis

REFERENCE = "reference"
FAR = 0.5
"""Distance from which a reference is far, in spans of the methods' intervals."""
MARGIN = 0.06
"""Empty part at each end of an axis, in its span."""


def span(numbers: list[Mapping[str, float]]) -> Axis:
    """Least and greatest of values and ends of intervals."""
    ends = [end for number in numbers for end in (number["low"], number["value"], number["high"])]
    return min(ends), max(ends)


def with_margin(axis: Axis) -> Axis:
    """An axis with room at both ends."""
    margin = MARGIN * (axis[1] - axis[0]) or 0.5
    return axis[0] - margin, axis[1] + margin


def vertical_axis(front: Mapping[str, Any]) -> Axis:
    """Ends of the axis: the intervals of all points but those of far references, with a margin."""
    points = [(line.get("role") == REFERENCE, point["y"]) for line in front["series"] for point in line["points"]]
    methods = [number for reference, number in points if not reference]
    if not methods:
        return with_margin(span([number for _, number in points]))
    low, high = span(methods)
    far = FAR * (high - low)
    near = [n for _, n in points if low - far <= n["value"] <= high + far] if far else [n for _, n in points]
    return with_margin(span([*methods, *near]))


def beyond(value: float, axis: Axis) -> Literal["above", "below"] | None:
    """On which side of an axis a value lies; nothing where it lies on it."""
    return "below" if value < axis[0] else "above" if value > axis[1] else None


def on_axis(value: float, axis: Axis) -> float:
    """The place on an axis that is nearest to a value."""
    return min(max(value, axis[0]), axis[1])


def off_axis(front: Mapping[str, Any], axis: Axis) -> list[str]:
    """Names and values of the points beyond an axis, in the order of the series."""
    return [
        f"{point['model']} {point['y']['value']:.3f}"
        for line in front["series"]
        for point in line["points"]
        if beyond(point["y"]["value"], axis)
    ]


def off_axis_note(front: Mapping[str, Any], axis: Axis) -> str:
    """What an arrow on the edge stands for; empty where there is none."""
    beyond = off_axis(front, axis)
    return f"Beyond the axis, marked by an arrow: {', '.join(beyond)}." if beyond else ""
