"""Tables of the page: sortable by their headings, with the best value in bold only where it is better beyond chance."""

from collections.abc import Mapping
from html import escape
from typing import Any

ARROWS = {"higher": "↑", "lower": "↓", None: ""}


def table_section(table: Mapping[str, Any], anchor: str) -> str:
    """A table with its heading and note; nothing where it has no rows."""
    if not table["rows"]:
        return ""
    heads = "".join(_head(column) for column in table["columns"])
    rows = "".join(_row(table, number) for number in range(len(table["rows"])))
    note = f'<p class="note">{escape(table["note"])}</p>' if table["note"] else ""
    return (
        f'<section id="{anchor}"><h2>{escape(table["title"])}</h2>{note}'
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(table["title"])}">'
        f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div></section>"
    )


def _head(column: Mapping[str, Any]) -> str:
    arrow = ARROWS[column["better"]]
    said = f' title="{column["better"]} is better"' if arrow else ""
    return (
        f'<th scope="col" aria-sort="none"><button type="button"{said}>{escape(column["label"])} {arrow}</button></th>'
    )


def _row(table: Mapping[str, Any], number: int) -> str:
    row = table["rows"][number]
    cells = []
    for column in table["columns"]:
        text, key = shown(row.get(column["key"], ""))
        bold = table["best"].get(column["key"]) == number
        inner = f"<strong>{text}</strong>" if bold else text
        kind = ' class="number"' if key else ""
        cells.append(f'<td{kind} data-sort="{key}">{inner}</td>')
    return f"<tr>{''.join(cells)}</tr>"


def shown(value: Any) -> tuple[str, str]:
    """A value as HTML, and the number that it is sorted by; empty for text."""
    if isinstance(value, Mapping):
        n = f"n = {value['n']}"
        text = f"{value['value']:.3f} <span class=interval>[{value['low']:.3f}, {value['high']:.3f}]</span>"
        return f'<span title="{n}">{text}</span>', repr(float(value["value"]))
    if isinstance(value, bool) or value is None:
        return escape("" if value is None else str(value)), ""
    if isinstance(value, int | float):
        # Four digits, but no powers of ten for hours and megabytes.
        text = str(value) if isinstance(value, int) else f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
        return escape(text), repr(float(value))
    return escape(str(value)), ""
