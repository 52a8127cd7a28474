"""The pencil of a merge as inline SVG: its spectrum, what growing subspaces keep and pay, where the patch was kept.

The points of a plot are one stop of the tab key; arrow keys go from one to the next, and in the map up and down too.
"""

from collections.abc import Mapping, Sequence
from html import escape
from math import log10
from typing import Any

from src.merge.pencil_plot import ROUNDING, map_words
from src.report.html_axes import Frame, log_ticks, plain_ticks
from src.report.html_map import map_panel
from src.report.html_panel import line_of, panel, points_of
from src.report.html_tables import shown_number

SIZE = {"width": 400, "height": 330, "left": 58}
PARTS = {"spectrum": "spectrum", "curve": "held-out energies", "map": "map"}


def pencil_section(entry: Mapping[str, Any], anchor: str) -> str:
    """The plots of one merge, or the plain statement that its result has none.

    Args:
        entry: ``model``, ``seed``, ``seeds`` (how many), ``cell`` and ``pencil``, which may be nothing.
        anchor: Name of the section.
    """
    pencil, name = entry["pencil"], f"{entry['model']}, seed {entry['seed']}"
    shown = [name for key, name in PARTS.items() if pencil is not None and pencil[key]]
    title = f"{', '.join(shown).capitalize() or 'Spectrum, map'} of {name}"
    head = f'<section id="{anchor}"><h2>{escape(title)}</h2>'
    if pencil is None:
        said = f"The result of this merge (cell {entry['cell']}) holds no spectrum and no map, so none is shown."
        return f'{head}<p class="note">{escape(said)}</p></section>'
    drawn = [_spectrum(pencil), _curve(pencil), map_panel(pencil["map"], SIZE["width"], map_words(pencil))]
    note = "".join(f'<p class="note">{escape(text)}</p>' for text in _notes(entry))
    return f'{head}{note}<div class="panels">{"".join(drawn)}</div></section>'


def _notes(entry: Mapping[str, Any]) -> list[str]:
    pencil, numbers = entry["pencil"], []
    if pencil["patch_norm_kept"] is not None:
        numbers.append(map_words(pencil).whole.format(f"{pencil['patch_norm_kept']:.3g}"))
    if pencil["held_out"]:
        energy, tax = pencil["held_out"]["safety_energy_kept"], pencil["held_out"]["utility_tax_kept"]
        numbers.append(f"on held-out rows {energy:.3g} of its safety energy and {tax:.3g} of its utility energy")
    if pencil["effective_rank"] is not None:
        numbers.append(f"effective rank {shown_number(pencil['effective_rank'])} of {pencil['dim']} directions")
    missing = [name for key, name in PARTS.items() if not pencil[key]]
    notes = ["This merge " + "; ".join(numbers) + "."] if numbers else []
    notes += [f"Its result holds no {' and no '.join(missing)}."] if missing else []
    return notes + ([f"The first of {entry['seeds']} seeds is shown."] if entry["seeds"] > 1 else [])


def _spectrum(pencil: Mapping[str, Any]) -> str:
    """Eigenvalues over rank, on a logarithmic axis."""
    data = pencil["spectrum"]
    least = ROUNDING * max(data["value"]) if data else 0.0
    kept = [(r, v) for r, v in zip(data["rank"], data["value"], strict=True) if v > least] if data else []
    if not kept:
        return ""
    unseen, cut = pencil["complement_eigenvalue"] or 0.0, pencil["directions_kept"]
    heights = [log10(value) for value in [v for _, v in kept] + ([unseen] if unseen > least else [])]
    margin = 0.06 * (max(heights) - min(heights)) or 0.5
    last = kept[-1][0]
    frame = Frame((1 - 0.03 * last, 1.03 * last), (min(heights) - margin, max(heights) + margin), **SIZE)
    parts, legend = [], []
    if unseen > least:
        parts.append(line_of([(frame.across[0], log10(unseen)), (frame.across[1], log10(unseen))], frame, "c1 dashed"))
        legend.append(("c1 dashed", f"unseen directions, λ = {unseen:.3g}"))
    if cut and cut < pencil["dim"] and cut <= last:
        parts.append(line_of([(cut, frame.up[0]), (cut, frame.up[1])], frame, "c2 dashed"))
        legend.append(("c2 dashed", f"kept to the left, {cut} directions"))
    if len(kept) < len(data["rank"]):
        legend.append(("", f"λ = 0 beyond rank {last}"))
    tips = [f"rank {rank}: λ = {value:.4g}" for rank, value in kept]
    places = [(rank, log10(value)) for rank, value in kept]
    parts += [line_of(places, frame, "c0"), points_of(places, tips, frame, "c0")]
    marks = ([m for m in plain_ticks(frame.across) if m[0] >= 1], log_ticks(frame.up))
    axes = frame.axes(("direction, by λ", "λ, safety energy per utility energy"), marks)
    return panel("Spectrum", axes + "".join(parts), frame.width, frame.height, legend)


def _curve(pencil: Mapping[str, Any]) -> str:
    """Safety energy over utility tax of growing subspaces, on held-out rows."""
    data = pencil["curve"]
    if not data:
        return ""
    places = list(zip(data["utility_tax_kept"], data["safety_energy_kept"], strict=True))
    chosen = pencil["held_out"]
    here = [(chosen["utility_tax_kept"], chosen["safety_energy_kept"])] if chosen else []
    ends = [1.05 * max(1.0, *(place[side] for place in places + here)) for side in (0, 1)]
    frame = Frame((-0.05, ends[0]), (-0.05, ends[1]), **SIZE)
    tips = [
        f"largest λ, cut at {where:.2f}: safety energy {energy:.3f}, utility energy {tax:.3f}"
        for where, (tax, energy) in zip(data["position"], places, strict=True)
    ]
    parts = [
        line_of([(0.0, 0.0), (1.0, 1.0)], frame, "c7 dashed"),
        line_of(places, frame, "c0"),
        points_of(places, tips, frame, "c0"),
    ]
    legend = [("c0", "the largest λ alone"), ("c7 dashed", "shrinking the whole patch")]
    if here:
        said = f"this merge: safety energy {here[0][1]:.3f}, utility energy {here[0][0]:.3f}"
        parts.append(points_of(here, [said], frame, "c1", "ring"))
        legend.append(("c1 ring", "this merge"))
    axes = frame.axes(("share of the utility energy paid", "share of the safety energy kept"))
    return panel("Held-out calibration rows", axes + "".join(parts), frame.width, frame.height, legend)


def pencil_tables(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The numbers of all plots as tables, for the CSV."""
    columns = [{"key": "what", "label": "what", "better": None}, {"key": "value", "label": "value", "better": None}]
    found = []
    for entry in entries:
        rows = [{"what": what, "value": value} for what, value in _numbers(entry["pencil"]).items()]
        title = f"Spectrum and map of {entry['model']}, seed {entry['seed']}"
        found.append({"title": title, "note": "", "columns": columns, "rows": rows, "best": {}})
    return found


def _numbers(pencil: Mapping[str, Any] | None) -> dict[str, Any]:
    if pencil is None:
        return {}
    found: dict[str, Any] = {}
    for rank, value in zip(*(pencil["spectrum"] or {"rank": [], "value": []}).values(), strict=True):
        found[f"λ at rank {rank}"] = value
    for key, name in (("safety_energy_kept", "safety energy"), ("utility_tax_kept", "utility tax")):
        if pencil["held_out"]:
            found[f"held-out {name} kept"] = pencil["held_out"][key]
        for where, value in zip(*((pencil["curve"] or {}).get(k, []) for k in ("position", key)), strict=True):
            found[f"held-out {name} kept, cut at {where:.3f}"] = value
    grid, name = pencil["map"], map_words(pencil).csv
    for layer, row in zip(grid["layers"], grid["kept"], strict=True):
        for module, value in zip(grid["modules"], row, strict=True):
            found[f"{name} {module}" + (f", layer {layer}" if layer >= 0 else "")] = value
    return found
