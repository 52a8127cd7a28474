"""The experiment command: a study's grid is computed as far as it is not known, then its report is written."""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from src.errors import InputError
from src.experiments import ablations, comparison, interference, safety_tax  # noqa: F401 - the registry of Study
from src.experiments.cell import Cell, closure
from src.experiments.cell_stages import Stages
from src.experiments.checks import check_first
from src.experiments.claim_files import HEARTBEAT
from src.experiments.costs import totals
from src.experiments.document import Document
from src.experiments.engine import Engine, Outcome, to_compute
from src.experiments.grid import Grid
from src.experiments.learnt_rows import passes_on_learnt_rows
from src.experiments.lineage import mixtures
from src.experiments.plain_settings import plain
from src.experiments.recipe import Recipe
from src.experiments.store import Store, source_hash
from src.experiments.study import Plan, Study
from src.experiments.timing import listing
from src.files import read_json, write_json
from src.merge.parallel import one_thread_each
from src.provenance import versions
from src.report.html import CSV, PAGE, PNG, SOURCE, write_report

log = logging.getLogger(__name__)


def experiment(
    *,
    name: str,
    study: Study,
    recipe: Recipe,
    seeds: list[int],
    title: str | None = None,
    results: str = "docs/results/cells",
    work: str = "logs/experiments",
    output: str | None = None,
    trainer: str | None = None,
    batch_size: int = 8,
    stale_after: float = 600.0,
    compute: bool = True,
    prompts: bool = True,
    dry_run: bool = False,
) -> None:
    """Compute a study, cell by cell, and write its report.

    Cells that are known are not computed again, whichever study, process or machine computed them. A killed study goes
    on; several processes may work on one study, on one machine or on a shared folder. Rows and settings of what is left
    to compute are read first: a wrong column or key stops it before the first cell.

    Args:
        name: The study's name; its report goes to ``WORK/studies/NAME``.
        study: What is studied.
        recipe: Base model, experts, Fisher passes and suites.
        seeds: Seeds of experts and calibration draws.
        title: Title of the report; unset takes the name.
        results: Folder of the results: small JSON files, to be committed.
        work: Folder of weights, claims and commands; not to be committed.
        output: Folder of the report, in place of ``WORK/studies/NAME``.
        trainer: Hardware file for the commands that run a Trainer, such as ``ddp.yaml``.
        batch_size: Most cells that one command computes: merges along a path, or models on one load of the base.
        stale_after: Seconds after which the claim of another machine that is not renewed counts as left behind; at
            least 40, as claims are renewed every 20.
        compute: Compute what is not known; off writes the report of what is known so far.
        prompts: Show the prompts of example answers, read from their files; off leaves them out, for a report that is
            passed on where the licence of the rows forbids to copy them.
        dry_run: List the cells, what is known and the expected time; compute nothing.
    """
    _check_arguments(name, seeds, batch_size, stale_after)
    folder = Path(output) if output is not None else Path(work) / "studies" / name
    check_page(folder, name, study)
    recipe.check()
    if recipe.evaluation.further and not study.reports_further:
        kind = type(study).__name__
        raise InputError(f"recipe.evaluation.further: {kind} asks no suites that only report; expected none")
    store = Store(Path(results), Path(work))
    grid = Grid(recipe)
    plan = study.plan(grid, seeds)
    todo = to_compute(plan.cells, store)
    if dry_run or compute:
        check_first(todo, grid, seeds[0])
        for note in passes_on_learnt_rows(todo):
            log.warning("%s", note)
    if dry_run:
        sys.stdout.write(listing(closure(plan.cells), todo, store) + "\n")
        return
    outcome = Outcome()
    if compute:
        engine = Engine(plan.cells, store, Stages(store, trainer), batch_size=batch_size, stale_after=stale_after)
        outcome = engine.run()
    asked = {"name": name, "study": _settings(study), "recipe": plain(recipe), "seeds": seeds}
    # Bootstraps multiply small matrices: several threads would wait for each other, tenfold beside an engine.
    with one_thread_each():
        document: Document = {"title": title or name} | described(study, plan, store, outcome, asked)
    if not prompts:
        document["examples"] = [example | {"prompt": None} for example in document["examples"]]
    write_json(folder / "study.json", document)
    write_report(folder)
    if outcome.failed:
        raise InputError(failures(outcome, plan.cells))


def _check_arguments(name: str, seeds: Sequence[int], batch_size: int, stale_after: float) -> None:
    """Stop at arguments out of their range."""
    if not name or name in (".", "..") or Path(name).name != name:
        raise InputError(f"name is {name!r}; expected that of one folder")
    if not seeds or len(set(seeds)) < len(seeds):
        raise InputError(f"seeds is {seeds}; expected different seeds")
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; expected at least 1")
    if not stale_after >= 2 * HEARTBEAT:
        why = f"claims are renewed every {HEARTBEAT:g}"
        raise InputError(f"stale_after is {stale_after}; expected at least {2 * HEARTBEAT:g} seconds, as {why}")


def check_page(folder: Path, name: str, study: Study) -> None:
    """Stop where a page would replace files of something else: an earlier state of its own is written anew.

    Raises:
        InputError: there are files of a page's names, and no study.json that is of this study.
    """
    found = [one for one in (SOURCE, PAGE, CSV, PNG) if (folder / one).exists()]
    if not found:
        return
    if SOURCE not in found:
        raise InputError(f"{folder / found[0]}: of no study (no {SOURCE} beside it); expected another --output")
    page = read_json(folder / SOURCE, "the numbers of a study's page")
    asked = page.get("provenance", {}).get("asked", {}) if isinstance(page, dict) else {}
    before = asked.get("name"), asked.get("study", {}).get("kind")
    if before != (name, type(study).__name__):
        raise InputError(
            f"{folder / SOURCE}: of the study {before[0]} ({before[1]}); expected {name} ({type(study).__name__}), or "
            "another --output"
        )


def described(study: Study, plan: Plan, store: Store, outcome: Outcome, asked: Document) -> Document:
    """The study's report with costs and provenance."""
    document = study.report(plan, store)
    cells = [cell for cell in closure(plan.cells) if store.has_result(cell)]
    sources = sorted({store.read(cell)["source"] for cell in cells})
    states = [f"This page was written by state {source_hash()} of the source, its cells by {', '.join(sources)}."]
    notes = [*document["notes"], *mixtures(plan.cells, store)]
    try:
        notes += passes_on_learnt_rows(plan.cells)
    except InputError as error:
        notes.append(f"Whether Fisher passes were taken on prompts that an expert had learnt is not known: {error}.")
    notes += [f"Failed: {label}" for label in failed_labels(outcome, plan.cells)]
    return document | {
        "notes": notes,
        "tables": [*document["tables"], totals(plan.cells, store)],
        "provenance": provenance(cells, store, asked) | {"notes": [] if sources in ([], [source_hash()]) else states},
    }


def provenance(cells: Sequence[Cell], store: Store, asked: Document) -> Document:
    """What the numbers were made from: configuration, versions, and every cell's key and command."""
    listed = [{"key": c.key, "stage": c.stage, "label": c.label, "command": store.read(c)["command"]} for c in cells]
    return {"asked": asked, "versions": versions(), "source": source_hash(), "cells": listed}


def failed_labels(outcome: Outcome, cells: Sequence[Cell]) -> list[str]:
    """Failed cells with their reasons."""
    labels = {cell.key: cell.label for cell in closure(cells)}
    return [f"{labels[key]}: {message}" for key, message in outcome.failed.items()]


def failures(outcome: Outcome, cells: Sequence[Cell]) -> str:
    """Failed and blocked cells on one line; a reason that several have is said once."""
    labels: dict[str, list[str]] = {}
    known = {cell.key: cell.label for cell in closure(cells)}
    for key, message in outcome.failed.items():
        labels.setdefault(message, []).append(known[key])
    said = "; ".join(f"{' and '.join(names)}: {message}" for message, names in labels.items())
    blocked = f"; {len(outcome.blocked)} more cells need them" if outcome.blocked else ""
    return f"{len(outcome.failed)} of {len(closure(cells))} cells failed: {said}{blocked}"


def _settings(study: Study) -> dict[str, Any]:
    return {"kind": type(study).__name__} | {
        key: plain(value) for key, value in vars(study).items() if not key.startswith("_")
    }
