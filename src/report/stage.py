"""The report stage: tables on the screen and as Markdown, CSV and JSON, and a plot."""

import csv
import io
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from src.errors import InputError
from src.files import check_apart, check_output, new_directory, write_json, write_text
from src.metrics.file import METRICS, read_metrics
from src.own_files import check_own
from src.report.html import SOURCE
from src.report.plot import plot_fronts
from src.report.results import ModelResult, load_results
from src.report.tradeoff import Tradeoff, find_expert, tradeoff
from src.report.tradeoff_tables import COST_COLUMNS, cost_columns, cost_rows, front_rows, measured

log = logging.getLogger(__name__)

Rows = Sequence[Sequence[str]]


def report(
    *,
    results: str,
    output: str | None = None,
    expert: str | None = None,
    attacks_at_most: float = 0.1,
    overwrite: bool = False,
) -> None:
    """Show an evaluation as tables and a safety/utility plot.

    A study's folder, named alone (``report FOLDER``), has its page written again from its ``study.json`` instead, in
    that folder; the options are those of evaluations.

    Args:
        results: Directory that the test command wrote (it holds ``metrics.json`` and ``answers``).
        output: Directory to write: ``table.md``, ``table.csv``, ``table.json``, ``fronts.png``, and ``tradeoff.json``
            where a utility expert was evaluated.
        expert: The utility expert that others are compared with; unset is the one whose name ends in ``utility``, else
            the baseline that the evaluation was given (``--model.baseline``), where that is an expert.
        attacks_at_most: Highest attack success rate of Utility@ASR.
        overwrite: Replace an output that exists.
    """
    if not 0 <= attacks_at_most <= 1:
        raise InputError(f"attacks_at_most is {attacks_at_most}; expected a share from 0 to 1")
    _check_results(results)
    if output is None:
        raise InputError(f"report of {results} needs --output: a directory to write")
    check_output(Path(output), overwrite=overwrite)
    check_own(Path(output), ("table.*", "tradeoff.json", "fronts.png"))
    check_apart(Path(output), [results])
    found = load_results(Path(results))
    columns = list(found[0].shares)
    if not columns:
        raise InputError(f"{results}: no suite generated answers; there is nothing to tabulate")
    costs = _tradeoff(Path(results), found, expert, attacks_at_most)
    tables = {f"Shares with 95 % intervals ({_intervals(columns)})": _shares(found, columns)}
    if costs is not None:
        intervals = "95 % intervals (paired bootstrap, of yes/no scores never narrower than Tango's)"
        title = f"Against {costs.expert}, the same rows, with {intervals}"
        tables |= {title: cost_rows(costs)} | ({"Fronts over strengths": front_rows(costs)} if costs.fronts else {})
    with new_directory(Path(output)) as folder:
        write_text(folder / "table.md", "\n".join(f"{name}\n\n{_markdown(rows)}" for name, rows in tables.items()))
        write_text(folder / "table.csv", _csv(found, columns, costs))
        write_json(folder / "table.json", [asdict(result) for result in found])
        if costs is not None:
            write_json(folder / "tradeoff.json", asdict(costs))
        drawn = plot_fronts(found, folder / "fronts.png")
    for name, rows in tables.items():
        _show(name, rows)
    more = (", tradeoff.json" if costs is not None else "") + (", fronts.png" if drawn else "")
    log.info("report in %s: table.md, table.csv, table.json%s", output, more)


def _check_results(results: str) -> None:
    """Stop where no evaluation lies; say what lies there instead: several folders, a study, a folder of studies."""
    folder = Path(results)
    if results.startswith("[") and not folder.exists():
        raise InputError(f"results is {results}; expected one folder")
    if (folder / METRICS).is_file():
        return
    if (folder / SOURCE).is_file():
        raise InputError(
            f"results {folder}: a study's folder, not an evaluation's; expected `python -m src report {folder}` alone"
        )
    if below := sorted(path.parent.name for path in folder.glob(f"*/{SOURCE}")):
        names = ", ".join([*below[:8], *(["…"] if len(below) > 8 else [])])
        raise InputError(
            f"{folder / METRICS}: no such file; studies lie below {folder} ({names}): expected the folder of one of "
            f"them alone, as in `python -m src report {folder / below[0]}`"
        )
    read_metrics(folder / METRICS)


def _tradeoff(folder: Path, found: list[ModelResult], name: str | None, attacks_at_most: float) -> Tradeoff | None:
    """Costs against the utility expert; nothing, and one line that says why, where they cannot be had."""
    settings = read_metrics(folder / METRICS).get("settings") or {}
    expert = find_expert(found, name, (settings.get("model") or {}).get("baseline"))
    if expert is None:
        experts = [one.name for one in found if one.method == "expert"]
        which = f": one of {', '.join(experts)}" if experts else ""
        log.info("no safety tax: no single expert named 'utility' was evaluated (name one with --expert%s)", which)
        return None
    if len(found) == 1:
        log.info("no safety tax: %s is the only model", expert.name)
        return None
    costs = tradeoff(folder, found, expert, attacks_at_most=attacks_at_most)
    if isinstance(costs, str):
        log.info("no safety tax: %s", costs)
        return None
    return costs


def _intervals(columns: list[str]) -> str:
    """Which intervals the columns have."""
    parts = any(column.startswith(("ROUGE-L", "pass@1")) for column in columns)
    return "Wilson; of ROUGE-L, and of pass@1 over several samples, a bootstrap" if parts else "Wilson"


def _shares(found: list[ModelResult], columns: list[str]) -> Rows:
    """Heading and a row per model."""
    heads = ["model", *(f"{column}, n = {found[0].shares[column].n}" for column in columns)]
    return [heads, *([one.label, *(measured(one.shares[column]) for column in columns)] for one in found)]


def _show(title: str, rows: Rows) -> None:
    table = Table(title=escape(title))
    for number, heading in enumerate(rows[0]):
        table.add_column(escape(heading), justify="left" if number == 0 else "right", overflow="fold")
    for row in rows[1:]:
        table.add_row(*map(escape, row))
    width = None if sys.stdout.isatty() else 120
    Console(file=sys.stdout, width=width).print(table)


def _markdown(rows: Rows) -> str:
    rows = [[cell.replace("|", r"\|") for cell in row] for row in rows]
    lines = [rows[0], ["---", *("---:" for _ in rows[0][1:])], *rows[1:]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _csv(found: list[ModelResult], columns: list[str], costs: Tradeoff | None) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    perplexities = list(found[0].perplexity)
    heads = [f"{column} {part}" for column in columns for part in ("value", "low", "high", "n")]
    heads += [f"perplexity ({suite})" for suite in perplexities]
    writer.writerow(["name", "method", "alpha", *heads, *(COST_COLUMNS if costs is not None else ())])
    for result in found:
        values = [part for column in columns for part in asdict(result.shares[column]).values()]
        values += [result.perplexity[suite] for suite in perplexities]
        values += cost_columns(costs, result.name) if costs is not None else []
        writer.writerow([result.name, result.method, "" if result.alpha is None else result.alpha, *values])
    return text.getvalue()
