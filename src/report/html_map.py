"""Where a patch was kept: a map of layers by kinds of module, the stronger the colour the more."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from src.merge.pencil_plot import MOST_LABELS, MapWords
from src.report.html_panel import panel, reached

LEFT, RIGHT, TOP, BOTTOM = 40, 10, 8, 92
SCALE = 44
"""Height of the scale below the map."""


def map_panel(grid: Mapping[str, Any], width: int, words: MapWords) -> str:
    """The map with its scale.

    Args:
        grid: ``layers``, ``modules`` and ``kept``: a row for each layer, nothing where a layer has no such module.
        width: Width of the view box.
        words: What its numbers are.
    """
    layers, modules, kept = grid["layers"], grid["modules"], grid["kept"]
    most = max([share for row in kept for share in row if share is not None], default=1.0) or 1.0
    wide, high = (width - LEFT - RIGHT) / len(modules), max(5.0, min(20.0, 230 / len(layers)))
    floor = round(TOP + high * len(layers), 2)
    shapes, tips = [], []
    for row, (layer, shares) in enumerate(zip(layers, kept, strict=True)):
        for place, (module, share) in enumerate(zip(modules, shares, strict=True)):
            box = (LEFT + place * wide, TOP + row * high, wide, high)
            shapes.append(_tile(box, None if share is None else share / most))
            name = module if layer < 0 else f"layer {layer}, {module}"
            tips.append(f"{name}: {'nothing to keep' if share is None else words.one.format(f'{share:.3f}')}")
    labels = _layer_labels(layers, high) + _module_labels(modules, wide, floor)
    scale = _scale(most, width, floor + BOTTOM, words.scale)
    drawing = f'<g class="c0">{reached(shapes, tips, len(modules))}</g>{labels}{scale}'
    return panel(f"{words.title}, layer by module", drawing, width, round(floor + BOTTOM + SCALE))


def _tile(box: tuple[float, float, float, float], strength: float | None) -> str:
    x, y, width, height = (round(side, 2) for side in box)
    place = f'x="{x}" y="{y}" width="{width}" height="{height}"'
    if strength is None:
        return f'<rect class="tile none" {place}/>'
    return f'<rect class="tile" {place} fill-opacity="{round(strength, 3)}"/>'


def _layer_labels(layers: Sequence[int], high: float) -> str:
    step = max(1, -(-len(layers) // MOST_LABELS))
    return "".join(
        f'<text x="{LEFT - 6}" y="{round(TOP + (row + 0.5) * high + 4, 2)}" text-anchor="end">'
        f"{'–' if layers[row] < 0 else layers[row]}</text>"
        for row in range(0, len(layers), step)
    )


def _module_labels(modules: Sequence[str], wide: float, floor: float) -> str:
    last = [module.rpartition(".")[2] for module in modules]
    names = last if len(set(last)) == len(last) else modules
    parts = []
    for place, name in enumerate(names):
        x, y = round(LEFT + (place + 0.5) * wide, 2), floor + 14
        parts.append(f'<text x="{x}" y="{y}" text-anchor="end" transform="rotate(-50 {x} {y})">{escape(name)}</text>')
    return "".join(parts)


def _scale(most: float, width: int, top: float, name: str) -> str:
    """From nothing to the most that a module kept."""
    steps, long = 20, (width - LEFT - RIGHT) / 20
    tiles = "".join(_tile((LEFT + i * long, top, long, 10), (i + 0.5) / steps) for i in range(steps))
    ends = [
        (LEFT, "start", "0"),
        ((LEFT + width - RIGHT) / 2, "middle", name),
        (width - RIGHT, "end", f"{most:.3g}"),
    ]
    texts = "".join(f'<text x="{x}" y="{top + 26}" text-anchor="{anchor}">{text}</text>' for x, anchor, text in ends)
    return f'<g class="c0" aria-hidden="true">{tiles}</g>{texts}'
