"""Fronts as inline SVG: points with 95 % intervals along each method's path, values on hover and on focus.

Colours repeat after eight methods and marks after six, so that no two of 24 look alike, in print and to the
colour-blind.
"""

from collections.abc import Mapping, Sequence
from html import escape
from math import floor, log10
from typing import Any

WIDTH, HEIGHT = 640, 420
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 14, 52
COLOURS = 8
MARKS = ("circle", "square", "diamond", "triangle", "cross", "ring")
TICKS = 5

Axis = tuple[float, float]


def front_figure(front: Mapping[str, Any], anchor: str) -> str:
    """A front with its legend."""
    points = [point for line in front["series"] for point in line["points"]]
    if not points:
        return ""
    across, up = (_range([p[axis] for p in points]) for axis in ("x", "y"))
    lines = "".join(_line(line, i, across, up, front) for i, line in enumerate(front["series"]))
    legend = "".join(
        f'<li><svg class="key c{i % COLOURS}" viewBox="-8 -8 16 16" width="16" height="16" aria-hidden="true">'
        f"{_mark(i, 0, 0)}</svg>{escape(line['name'])}</li>"
        for i, line in enumerate(front["series"])
    )
    label = f"{front['title']}: {front['y']['label']} over {front['x']['label']}"
    return (
        f'<section id="{anchor}"><h2>{escape(front["title"])}</h2><figure>'
        f'<svg class="front" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
        f"{_axes(front, across, up)}{lines}</svg><ul class='legend'>{legend}</ul></figure></section>"
    )


def _range(values: Sequence[Mapping[str, float]]) -> Axis:
    """Ends of an axis: the intervals with a margin."""
    low, high = min(v["low"] for v in values), max(v["high"] for v in values)
    low, high = min(low, *(v["value"] for v in values)), max(high, *(v["value"] for v in values))
    margin = 0.06 * (high - low) or 0.5
    return low - margin, high + margin


def _place(value: float, axis: Axis, start: float, end: float) -> float:
    return round(start + (value - axis[0]) / (axis[1] - axis[0]) * (end - start), 2)


def _x(value: float, axis: Axis) -> float:
    return _place(value, axis, LEFT, WIDTH - RIGHT)


def _y(value: float, axis: Axis) -> float:
    return _place(value, axis, HEIGHT - BOTTOM, TOP)


def ticks(axis: Axis) -> list[float]:
    """Round values inside an axis, about five of them."""
    span = axis[1] - axis[0]
    power = 10.0 ** floor(log10(span / TICKS))
    step = next(power * m for m in (1, 2, 5, 10) if span / (power * m) <= TICKS + 1)
    first = floor(axis[0] / step) + 1
    return [round(step * i, 10) for i in range(first, floor(axis[1] / step) + 1)]


def _axes(front: Mapping[str, Any], across: Axis, up: Axis) -> str:
    floor_y, parts = HEIGHT - BOTTOM, []
    for value in ticks(across):
        x = _x(value, across)
        parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{TOP}" y2="{floor_y}"/>')
        parts.append(f'<text x="{x}" y="{floor_y + 18}" text-anchor="middle">{value:g}</text>')
    for value in ticks(up):
        y = _y(value, up)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{value:g}</text>')
    middle, centre = (LEFT + WIDTH - RIGHT) / 2, (TOP + floor_y) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 12}" text-anchor="middle">{_named(front["x"])}</text>')
    turned = f'transform="translate(16 {centre}) rotate(-90)"'
    parts.append(f'<text {turned} text-anchor="middle">{_named(front["y"])}</text>')
    return "".join(parts)


def _named(axis: Mapping[str, Any]) -> str:
    better = {"higher": " (higher is better)", "lower": " (lower is better)"}.get(axis["better"], "")
    return escape(axis["label"] + better)


def _line(line: Mapping[str, Any], number: int, across: Axis, up: Axis, front: Mapping[str, Any]) -> str:
    places = [(_x(p["x"]["value"], across), _y(p["y"]["value"], up)) for p in line["points"]]
    path = " ".join(f"{x},{y}" for x, y in places)
    parts = [f'<polyline points="{path}"/>'] if len(places) > 1 else []
    for point, (x, y) in zip(line["points"], places, strict=True):
        left, right = _x(point["x"]["low"], across), _x(point["x"]["high"], across)
        low, high = _y(point["y"]["low"], up), _y(point["y"]["high"], up)
        said = escape(f"{point['model']}: {_said(front['x'], point['x'])}; {_said(front['y'], point['y'])}")
        parts.append(
            f'<g class="point" tabindex="0" role="img" aria-label="{said}" data-tip="{said}"><title>{said}</title>'
            f'<line class="whisker" x1="{left}" x2="{right}" y1="{y}" y2="{y}"/>'
            f'<line class="whisker" x1="{x}" x2="{x}" y1="{low}" y2="{high}"/>{_mark(number, x, y)}</g>'
        )
    return f'<g class="c{number % COLOURS}">{"".join(parts)}</g>'


def _said(axis: Mapping[str, Any], number: Mapping[str, Any]) -> str:
    return f"{axis['label']} {number['value']:.3f} [{number['low']:.3f}, {number['high']:.3f}], n = {number['n']}"


def _mark(number: int, x: float, y: float) -> str:
    shape, r = MARKS[number % len(MARKS)], 5
    if shape in ("circle", "ring"):
        return f'<circle class="mark {shape}" cx="{x}" cy="{y}" r="{r}"/>'
    if shape == "cross":
        return f'<path class="mark cross" d="M{x - r} {y - r}L{x + r} {y + r}M{x - r} {y + r}L{x + r} {y - r}"/>'
    corners = {
        "square": ((-r, -r), (r, -r), (r, r), (-r, r)),
        "diamond": ((0, -r - 1), (r + 1, 0), (0, r + 1), (-r - 1, 0)),
        "triangle": ((0, -r), (r, r), (-r, r)),
    }[shape]
    return f'<polygon class="mark" points="{" ".join(f"{x + dx},{y + dy}" for dx, dy in corners)}"/>'
