"""The experiment command: a study's grid is computed as far as it is not known, then its report is written."""

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
from src.experiments.lineage import mixtures
from src.experiments.plain_settings import plain
from src.experiments.settings import Recipe
from src.experiments.store import Store, source_hash
from src.experiments.study import Plan, Study
from src.experiments.timing import listing
from src.files import write_json
from src.provenance import versions
from src.report.html import write_report


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
    if not seeds or len(set(seeds)) < len(seeds):
        raise InputError(f"seeds is {seeds}; expected different seeds")
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; expected at least 1")
    if not stale_after >= 2 * HEARTBEAT:
        why = f"claims are renewed every {HEARTBEAT:g}"
        raise InputError(f"stale_after is {stale_after}; expected at least {2 * HEARTBEAT:g} seconds, as {why}")
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
    if dry_run:
        sys.stdout.write(listing(closure(plan.cells), todo, store) + "\n")
        return
    outcome = Outcome()
    if compute:
        engine = Engine(plan.cells, store, Stages(store, trainer), batch_size=batch_size, stale_after=stale_after)
        outcome = engine.run()
    folder = Path(output) if output is not None else Path(work) / "studies" / name
    asked = {"name": name, "study": _settings(study), "recipe": plain(recipe), "seeds": seeds}
    document: Document = {"title": title or name} | described(study, plan, store, outcome, asked)
    if not prompts:
        document["examples"] = [example | {"prompt": None} for example in document["examples"]]
    write_json(folder / "study.json", document)
    write_report(folder)
    if outcome.failed:
        raise InputError(failures(outcome, plan.cells))


def described(study: Study, plan: Plan, store: Store, outcome: Outcome, asked: Document) -> Document:
    """The study's report with costs and provenance."""
    document = study.report(plan, store)
    cells = [cell for cell in closure(plan.cells) if store.has_result(cell)]
    sources = sorted({store.read(cell)["source"] for cell in cells})
    notes = list(document["notes"])
    if sources not in ([], [source_hash()]):
        notes.append(
            f"This page was written by state {source_hash()} of the source, its cells by {', '.join(sources)}."
        )
    notes += mixtures(plan.cells, store)
    notes += [f"Failed: {label}" for label in failed_labels(outcome, plan.cells)]
    return document | {
        "notes": notes,
        "tables": [*document["tables"], totals(plan.cells, store)],
        "provenance": provenance(cells, store, asked),
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
    """Failed and blocked cells on one line."""
    said = "; ".join(failed_labels(outcome, cells))
    blocked = f"; {len(outcome.blocked)} more cells need them" if outcome.blocked else ""
    return f"{len(outcome.failed)} of {len(closure(cells))} cells failed: {said}{blocked}"


def _settings(study: Study) -> dict[str, Any]:
    return {"kind": type(study).__name__} | {
        key: plain(value) for key, value in vars(study).items() if not key.startswith("_")
    }
