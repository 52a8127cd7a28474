"""The page of a study: one HTML file without anything from outside, made from ``study.json`` alone.

The page, ``tables.csv`` and ``study.json`` hold the same numbers; the page embeds the JSON as well.
"""

import csv
import io
import json
import logging
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from src.errors import check_keys
from src.files import read_json, write_text
from src.report.html_examples import example_section
from src.report.html_fronts import front_figure
from src.report.html_pencil import pencil_section, pencil_tables
from src.report.html_png import draw_fronts
from src.report.html_style import SCRIPT, STYLE
from src.report.html_tables import table_section

log = logging.getLogger(__name__)
SOURCE, PAGE, CSV, PNG = "study.json", "index.html", "tables.csv", "fronts.png"
KEYS = ("title", "summary", "notes", "fronts", "tables", "examples", "provenance")


def write_report(folder: Path) -> None:
    """Write the page, the CSV and the picture beside a study's JSON, and say which there are.

    Args:
        folder: Folder that holds ``study.json``, as the experiment command wrote it.

    Raises:
        InputError: there is no such file, or it is no study's.
    """
    what = "a study (made by `python -m src experiment`)"
    document = read_json(folder / SOURCE, what)
    check_keys(document, KEYS, folder / SOURCE, what)
    fronts = map(_front_table, document["fronts"])
    write_text(folder / CSV, tables_csv([*document["tables"], *fronts, *pencil_tables(document.get("pencils", ()))]))
    write_text(folder / PAGE, page(document))
    draw_fronts(document["fronts"], folder / PNG)
    there = [name for name in (PAGE, PNG, CSV, SOURCE) if (folder / name).is_file()]
    log.info("report in %s: %s", folder, ", ".join(there))


def page(document: Mapping[str, Any]) -> str:
    """The whole page."""
    title = escape(document["title"])
    # In a script, "</script" ends it, and "<!--" before "<script" hides its end.
    data = json.dumps(document, ensure_ascii=False).replace("<", "\\u003c")
    parts = [
        f"<h1>{title}</h1>",
        *(f'<p class="summary">{escape(sentence)}</p>' for sentence in document["summary"]),
        *(_folded(title, said) for title, said in document.get("folded", {}).items()),
        _notes(document["notes"]),
        *(front_figure(front, f"front{i}") for i, front in enumerate(document["fronts"])),
        *(table_section(table, f"table{i}") for i, table in enumerate(document["tables"])),
        *(pencil_section(pencil, f"pencil{i}") for i, pencil in enumerate(document.get("pencils", ()))),
        example_section(document["examples"]),
        _provenance(document["provenance"]),
    ]
    body = "\n".join(part for part in parts if part)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
        f'<div id="tip" role="status"></div>\n<script type="application/json" id="study">{data}</script>\n'
        f"<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _folded(title: str, sentences: Sequence[str]) -> str:
    said = "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences)
    return f"<details><summary>{escape(title)}</summary>{said}</details>"


def _notes(notes: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f'<ul class="notes">{items}</ul>' if items else ""


def _provenance(provenance: Mapping[str, Any]) -> str:
    """Configuration, versions and commands, folded away."""
    cells = "\n".join(
        f"{cell['key']}  {cell['stage']:<7}  {cell['label']}\n    {' '.join(cell['command'])}"
        for cell in provenance["cells"]
    )
    blocks = {
        "Configuration": json.dumps(provenance["asked"], indent=2, ensure_ascii=False),
        "Versions": json.dumps(provenance["versions"] | {"source": provenance["source"]}, indent=2),
        f"Cells and commands ({len(provenance['cells'])})": cells,
    }
    folded = "".join(
        f'<details><summary>{escape(name)}</summary><pre tabindex="0">{escape(text)}</pre></details>'
        for name, text in blocks.items()
    )
    notes = _notes(provenance.get("notes", ()))
    return f'<section id="provenance"><h2>Provenance</h2>{notes}{folded}</section>'


def _front_table(front: Mapping[str, Any]) -> dict[str, Any]:
    """The points of a front as a table."""
    columns = [{"key": "model", "label": "model"}, *({"key": axis, "label": front[axis]["label"]} for axis in "xy")]
    rows = [point for line in front["series"] for point in line["points"]]
    return {"title": front["title"], "columns": columns, "rows": rows}


def tables_csv(tables: Sequence[Mapping[str, Any]]) -> str:
    """All tables as one CSV, a line per number: table, row, column, value, low, high, n."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["table", "row", "column", "value", "low", "high", "n"])
    for table in tables:
        first = table["columns"][0]["key"]
        for number, row in enumerate(table["rows"]):
            for column in table["columns"][1:]:
                cell = row.get(column["key"], "")
                parts = (
                    [cell[k] for k in ("value", "low", "high", "n")] if isinstance(cell, dict) else [cell, "", "", ""]
                )
                writer.writerow([table["title"], f"{number}: {row[first]}", column["label"], *parts])
    return text.getvalue()
