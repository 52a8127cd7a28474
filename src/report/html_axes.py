"""The frame of a plot as inline SVG: from values to places, grid lines, tick labels, names of the axes."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10

TICKS = 5
DECADES = 7
"""Most powers of ten that are labelled."""
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

Axis = tuple[float, float]
Marks = Sequence[tuple[float, str]]
"""Places on an axis and what stands there."""


@dataclass(frozen=True)
class Frame:
    """A plot's area.

    Attributes:
        across: Least and greatest value across.
        up: Least and greatest value up.
        width: Width of the picture, in units of its view box.
        height: Its height.
        left: Margin for the labels of the vertical axis.
        bottom: Margin for those of the horizontal one.
        right: Margin without labels.
        top: Margin without labels.
    """

    across: Axis
    up: Axis
    width: int = 640
    height: int = 420
    left: int = 78
    bottom: int = 52
    right: int = 14
    top: int = 14

    def x(self, value: float) -> float:
        """Place of a value across."""
        return _place(value, self.across, self.left, self.width - self.right)

    def y(self, value: float) -> float:
        """Place of a value up."""
        return _place(value, self.up, self.height - self.bottom, self.top)

    def axes(self, names: tuple[str, str], marks: tuple[Marks, Marks] | None = None) -> str:
        """Grid, tick labels and names.

        Args:
            names: Names of the axes across and up.
            marks: Their ticks; unset puts about five on each.
        """
        shown = marks or (plain_ticks(self.across), plain_ticks(self.up))
        floor_y, parts = self.height - self.bottom, []
        for value, text in shown[0]:
            x = self.x(value)
            parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{self.top}" y2="{floor_y}"/>')
            parts.append(f'<text x="{x}" y="{floor_y + 18}" text-anchor="middle">{escape(text)}</text>')
        for value, text in shown[1]:
            y = self.y(value)
            parts.append(f'<line class="grid" x1="{self.left}" x2="{self.width - self.right}" y1="{y}" y2="{y}"/>')
            parts.append(f'<text x="{self.left - 6}" y="{y + 4}" text-anchor="end">{escape(text)}</text>')
        middle, centre = (self.left + self.width - self.right) / 2, (self.top + floor_y) / 2
        parts.append(f'<text x="{middle}" y="{self.height - 12}" text-anchor="middle">{escape(names[0])}</text>')
        turned = f'transform="translate(16 {centre}) rotate(-90)"'
        parts.append(f'<text {turned} text-anchor="middle">{escape(names[1])}</text>')
        return "".join(parts)


def _place(value: float, axis: Axis, start: float, end: float) -> float:
    return round(start + (value - axis[0]) / (axis[1] - axis[0]) * (end - start), 2)


def ticks(axis: Axis) -> list[float]:
    """Round values inside an axis, about five of them."""
    span = axis[1] - axis[0]
    power = 10.0 ** floor(log10(span / TICKS))
    step = next(power * m for m in (1, 2, 5, 10) if span / (power * m) <= TICKS + 1)
    first = floor(axis[0] / step) + 1
    return [round(step * i, 10) for i in range(first, floor(axis[1] / step) + 1)]


def plain_ticks(axis: Axis) -> Marks:
    """Round values and their texts."""
    return [(value, f"{value:g}") for value in ticks(axis)]


def log_ticks(axis: Axis) -> Marks:
    """Ticks of an axis in powers of ten: the powers inside it, or round values where it spans too few.

    Args:
        axis: Decimal logarithms of the ends.
    """
    powers = list(range(ceil(axis[0]), floor(axis[1]) + 1))
    if len(powers) >= 3:
        return [(float(p), f"10{str(p).translate(SUPERSCRIPTS)}") for p in powers[:: ceil(len(powers) / DECADES)]]
    steps = [m * 10.0**p for p in range(floor(axis[0]), ceil(axis[1]) + 1) for m in (1, 2, 5)]
    inside = [step for step in steps if axis[0] <= log10(step) <= axis[1]]
    if len(inside) < 2:
        return [(value, f"{10**value:.4g}") for value in ticks(axis)]
    return [(log10(step), f"{step:g}") for step in inside]
