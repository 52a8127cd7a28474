"""Tables of the page: sortable by their headings, with the best value in bold only where it is better beyond chance."""

from collections.abc import Mapping
from html import escape
from typing import Any

P_VALUE = "p-value"
"""Kind of a column whose numbers are p-values."""
MINUS = "−"
LONG = 24
"""Characters beyond which a name takes several lines."""
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
        value = row.get(column["key"], "")
        text, key = p_value(value) if column.get("kind") == P_VALUE and isinstance(value, float) else shown(value)
        bold = table["best"].get(column["key"]) == number
        inner = f"<strong>{text}</strong>" if bold else text
        kind = ' class="number"' if key else ' class="long"' if len(text) > LONG else ""
        cells.append(f'<td{kind} data-sort="{key}">{inner}</td>')
    return f"<tr>{''.join(cells)}</tr>"


def p_value(value: float) -> tuple[str, str]:
    """A p-value as HTML, and what it is sorted by."""
    return ("< 0.001" if value < 0.001 else f"{value:.3f}").replace("<", "&lt;"), repr(value)


def decimals(value: float) -> str:
    """Three decimals, with a minus sign; what rounds to nothing has none."""
    return f"{round(value, 3) + 0.0:.3f}".replace("-", MINUS)


def shown_number(value: float) -> str:
    """Four digits, but no powers of ten for seconds and megabytes."""
    return str(value) if isinstance(value, int) else f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def shown(value: Any) -> tuple[str, str]:
    """A value as HTML, and the number that it is sorted by; empty for text."""
    if isinstance(value, Mapping):
        low, high = decimals(value["low"]), decimals(value["high"])
        text = f"{decimals(value['value'])} <span class=interval>[{low}, {high}]</span>"
        return f'<span title="n = {value["n"]}">{text}</span>', repr(float(value["value"]))
    if isinstance(value, bool) or value is None:
        return escape("" if value is None else str(value)), ""
    if isinstance(value, int | float):
        text = shown_number(value)
        return escape(text.replace("-", MINUS, 1) if value < 0 else text), repr(float(value))
    return escape(str(value)), ""
