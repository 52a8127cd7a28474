"""The report stage: a table on the screen and as Markdown, CSV and JSON, and a plot."""

import csv
import io
import logging
import sys
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from src.errors import InputError
from src.files import check_output, new_directory, write_json, write_text
from src.report.plot import plot_fronts
from src.report.results import ModelResult, load_results

log = logging.getLogger(__name__)


def report(*, results: str, output: str, overwrite: bool = False) -> None:
    """Show an evaluation as a table and a safety/utility plot.

    Args:
        results: Directory that the test command wrote (it holds ``metrics.json``).
        output: Directory to write: ``table.md``, ``table.csv``, ``table.json`` and ``fronts.png``.
        overwrite: Replace an output that exists.
    """
    check_output(Path(output), overwrite=overwrite)
    found = load_results(Path(results))
    columns = list(found[0].shares)
    if not columns:
        raise InputError(f"{results}: no suite generated answers; there is nothing to tabulate")
    with new_directory(Path(output)) as folder:
        write_text(folder / "table.md", _markdown(found, columns))
        write_text(folder / "table.csv", _csv(found, columns))
        write_json(folder / "table.json", [asdict(result) for result in found])
        drawn = plot_fronts(found, folder / "fronts.png")
    _show(found, columns)
    files = "table.md, table.csv, table.json" + (", fronts.png" if drawn else "")
    log.info("report in %s: %s", output, files)


def _headings(found: list[ModelResult], columns: list[str]) -> list[str]:
    return ["model", *(f"{column}, n = {found[0].shares[column].n}" for column in columns)]


def _show(found: list[ModelResult], columns: list[str]) -> None:
    table = Table(title="Shares with 95 % intervals (Wilson)")
    for number, heading in enumerate(_headings(found, columns)):
        table.add_column(heading, justify="left" if number == 0 else "right", overflow="fold")
    for result in found:
        table.add_row(result.label, *(str(result.shares[column]) for column in columns))
    width = None if sys.stdout.isatty() else 120
    Console(file=sys.stdout, width=width).print(table)


def _markdown(found: list[ModelResult], columns: list[str]) -> str:
    lines = [_headings(found, columns), ["---", *("---:" for _ in columns)]]
    lines += [[result.label, *(str(result.shares[column]) for column in columns)] for result in found]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _csv(found: list[ModelResult], columns: list[str]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    perplexities = list(found[0].perplexity)
    heads = [f"{column} {part}" for column in columns for part in ("value", "low", "high", "n")]
    writer.writerow(["name", "method", "alpha", *heads, *(f"perplexity ({suite})" for suite in perplexities)])
    for result in found:
        values = [part for column in columns for part in asdict(result.shares[column]).values()]
        alpha = "" if result.alpha is None else result.alpha
        writer.writerow([result.name, result.method, alpha, *values, *(result.perplexity[s] for s in perplexities)])
    return text.getvalue()
