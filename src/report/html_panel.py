"""One small plot among several: lines, points that the keyboard and the pointer reach, and a legend."""

from collections.abc import Sequence
from html import escape

from src.report.html_axes import Frame
from src.report.html_fronts import key, mark, point

SMALL = 3.0
"""Radius of the marks of a line with many points."""


def panel(title: str, drawing: str, width: int, height: int, legend: Sequence[tuple[str, str]] = ()) -> str:
    """A plot with its heading and legend.

    Args:
        title: Heading.
        drawing: SVG elements.
        width: Width of the view box.
        height: Its height.
        legend: Class of a key (none: no key) and text.
    """
    items = "".join(f"<li>{_key(kind)}{escape(text)}</li>" for kind, text in legend)
    listed = f'<ul class="legend">{items}</ul>' if items else ""
    return (
        f'<figure><h3>{escape(title)}</h3><svg class="front panel" viewBox="0 0 {width} {height}" role="group" '
        f'aria-label="{escape(title)}">{drawing}</svg>{listed}</figure>'
    )


def _key(kind: str) -> str:
    if not kind:
        return ""
    return key(kind, mark("ring", 0, 0) if "ring" in kind else '<polyline points="-8,0 8,0"/>')


def line_of(places: Sequence[tuple[float, float]], frame: Frame, kind: str) -> str:
    """A line through values, of a class of colour and stroke."""
    path = " ".join(f"{frame.x(x)},{frame.y(y)}" for x, y in places)
    return f'<g class="{kind}"><polyline points="{path}"/></g>'


def points_of(
    places: Sequence[tuple[float, float]], tips: Sequence[str], frame: Frame, kind: str, shape: str = "circle"
) -> str:
    """Points with what they say; one stop of the tab key for all of them."""
    shapes = [mark(shape, frame.x(x), frame.y(y), SMALL if len(places) > 1 else 6.0) for x, y in places]
    return f'<g class="{kind}">{reached(shapes, tips, 1)}</g>'


def reached(shapes: Sequence[str], tips: Sequence[str], columns: int) -> str:
    """Shapes that show their tips on hover and focus; arrow keys go from one to another.

    Args:
        shapes: SVG elements, row by row.
        tips: What each says.
        columns: Shapes in a row; 1 for a line, along which all arrows go.
    """
    pairs = enumerate(zip(shapes, tips, strict=True))
    points = "".join(point(tip, shape, -1 if number else 0) for number, (shape, tip) in pairs)
    return f'<g class="reached" data-columns="{columns}">{points}</g>'
