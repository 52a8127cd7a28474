"""Fronts as inline SVG: points with 95 % intervals along each method's path, values on hover and on focus.

Colours repeat after seven methods and marks after six: no two of 42 look alike, in print and to the colour-blind.
References are grey, with marks of their own, and arrows on the edge where they are far off (:mod:`front_scale`).
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from src.report.front_scale import beyond, off_axis_note, on_axis, span, vertical_axis, with_margin
from src.report.html_axes import Frame

COLOURS = 7
MARKS = ("circle", "square", "diamond", "triangle", "cross", "ring")
REFERENCE_MARKS = ("plus", "box", "bar")
GREY, OURS = "c7", "ours"
"""The class of references' colour, and the role of a method that stands out."""


def front_figure(front: Mapping[str, Any], anchor: str) -> str:
    """A front with its legend."""
    points = [point for line in front["series"] for point in line["points"]]
    if not points:
        return ""
    frame = Frame(with_margin(span([p["x"] for p in points])), vertical_axis(front))
    styled = list(zip(front["series"], _styles(front["series"]), strict=True))
    # What stands out is drawn last, over the others.
    in_order = sorted(styled, key=lambda one: one[0].get("role") == OURS)
    lines = "".join(_line(line, *style, frame, front) for line, style in in_order)
    legend = "".join(
        f"<li>{key(colour, mark(shape, 0, 0))}{escape(line['name'])}</li>" for line, (colour, shape) in styled
    )
    said = " ".join(filter(None, (front.get("note"), off_axis_note(front, frame.up))))
    note = f'<figcaption class="note">{escape(said)}</figcaption>' if said else ""
    label = f"{front['title']}: {front['y']['label']} over {front['x']['label']}"
    return (
        f'<section id="{anchor}"><h2>{escape(front["title"])}</h2><figure>'
        f'<svg class="front" viewBox="0 0 {frame.width} {frame.height}" role="group" aria-label="{escape(label)}">'
        f"{frame.axes((_named(front['x']), _named(front['y'])))}{lines}</svg>"
        f"<ul class='legend'>{legend}</ul>{note}</figure></section>"
    )


def _styles(series: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Class of the colour and mark of every series."""
    references = [line["name"] for line in series if line.get("role") == "reference"]
    methods = [line["name"] for line in series if line["name"] not in references]
    found = {name: (GREY, REFERENCE_MARKS[i % len(REFERENCE_MARKS)]) for i, name in enumerate(references)}
    found |= {name: (f"c{i % COLOURS}", MARKS[i % len(MARKS)]) for i, name in enumerate(methods)}
    return [found[line["name"]] for line in series]


def _named(axis: Mapping[str, Any]) -> str:
    better = {"higher": " (higher is better)", "lower": " (lower is better)"}.get(axis["better"], "")
    return f"{axis['label']}{better}"


def _line(line: Mapping[str, Any], colour: str, shape: str, frame: Frame, front: Mapping[str, Any]) -> str:
    places = [(frame.x(p["x"]["value"]), frame.y(on_axis(p["y"]["value"], frame.up))) for p in line["points"]]
    path = " ".join(f"{x},{y}" for x, y in places)
    parts = [f'<polyline points="{path}"/>'] if len(places) > 1 else []
    for one, (x, y) in zip(line["points"], places, strict=True):
        left, right = frame.x(one["x"]["low"]), frame.x(one["x"]["high"])
        low, high = (frame.y(on_axis(one["y"][end], frame.up)) for end in ("low", "high"))
        whiskers = (
            f'<line class="whisker" x1="{left}" x2="{right}" y1="{y}" y2="{y}"/>'
            f'<line class="whisker" x1="{x}" x2="{x}" y1="{low}" y2="{high}"/>'
        )
        said = f"{one['model']}: {_said(front['x'], one['x'])}; {_said(front['y'], one['y'])}"
        touch = f'<circle class="touch" cx="{x}" cy="{y}" r="12"/>'  # a finger is no mouse
        side = beyond(one["y"]["value"], frame.up)
        drawn = touch + mark(side, x, y) if side else whiskers + touch + mark(shape, x, y)
        parts.append(point(said, drawn))
    out = f"{OURS} " if line.get("role") == OURS else ""
    return f'<g class="{out}{colour}">{"".join(parts)}</g>'


def _said(axis: Mapping[str, Any], number: Mapping[str, Any]) -> str:
    return f"{axis['label']} {number['value']:.3f} [{number['low']:.3f}, {number['high']:.3f}], n = {number['n']}"


def point(said: str, shape: str, stop: int = 0) -> str:
    """A shape that says something on hover and focus; ``stop`` −1 takes it out of the order of the tab key."""
    said = escape(said)
    return (
        f'<g class="point" tabindex="{stop}" role="img" aria-label="{said}" data-tip="{said}">'
        f"<title>{said}</title>{shape}</g>"
    )


def key(kind: str, drawn: str) -> str:
    """The key of a legend's entry: what is drawn, in its class of colour and stroke."""
    return f'<svg class="key {kind}" viewBox="-8 -8 16 16" width="16" height="16" aria-hidden="true">{drawn}</svg>'


def mark(shape: str, x: float, y: float, r: float = 5) -> str:
    """A mark of radius ``r``."""
    if shape in ("circle", "ring"):
        return f'<circle class="mark {shape}" cx="{x}" cy="{y}" r="{r}"/>'
    if shape == "cross":
        return f'<path class="mark cross" d="M{x - r} {y - r}L{x + r} {y + r}M{x - r} {y + r}L{x + r} {y - r}"/>'
    if shape == "plus":
        return f'<path class="mark cross" d="M{x - r} {y}L{x + r} {y}M{x} {y - r}L{x} {y + r}"/>'
    if shape == "bar":
        return f'<path class="mark cross" d="M{x - r} {y}L{x + r} {y}"/>'
    if shape == "box":
        return f'<rect class="mark ring" x="{x - r}" y="{y - r}" width="{2 * r}" height="{2 * r}"/>'
    corners = {
        "square": ((-r, -r), (r, -r), (r, r), (-r, r)),
        "diamond": ((0, -r - 1), (r + 1, 0), (0, r + 1), (-r - 1, 0)),
        "triangle": ((0, -r), (r, r), (-r, r)),
        "above": ((0, 0), (r, 2 * r), (-r, 2 * r)),
        "below": ((0, 0), (r, -2 * r), (-r, -2 * r)),
    }[shape]
    return f'<polygon class="mark" points="{" ".join(f"{x + dx},{y + dy}" for dx, dy in corners)}"/>'
