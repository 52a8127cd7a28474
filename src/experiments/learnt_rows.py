"""Prompts that a study trains on, measures on and asks, compared before anything is computed.

A command would refuse to ask a prompt that went into what answers it, but only once all of that has been trained. Rows
are read where their files are here: data sets of the hub are not fetched.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from src.adapters.peft_files import read_seen
from src.data.row_source import RowSource, find_file
from src.data.rows import Row
from src.data.sources import load_rows
from src.data.suite import Suite
from src.errors import InputError
from src.experiments.cell import Cell, closure
from src.experiments.content import ROWS, SUITE_ROWS, sources
from src.experiments.plain_settings import plain

LEARN = ("fit", "given")
"""Stages of adapters that have learnt prompts."""
SHOWN = 3
"""Passes that a note names."""


def local_sources(value: Any) -> list[RowSource]:
    """Sources whose file is here."""
    return [source for source in sources(value) if (path := find_file(source.path)) is not None and path.is_file()]


def is_here(suite: Mapping[str, Any]) -> bool:
    """Whether the files of all of a suite's rows are here."""
    return len(local_sources(suite["rows"])) == len(sources(suite["rows"]))


def suite_rows(suite: Mapping[str, Any]) -> Sequence[Row]:
    """Rows of a suite (its settings as plain values), of files that are here."""
    return _suite_rows(json.dumps({key: suite[key] for key in suite if key != "judge"}, sort_keys=True))


@lru_cache(maxsize=1024)
def _suite_rows(suite: str) -> Sequence[Row]:
    settings = json.loads(suite)
    options = {key: value for key, value in settings.items() if key not in SUITE_ROWS}
    here = local_sources(settings["rows"])
    return Suite(**options, rows=[*here]).load() if here else ()


@lru_cache(maxsize=4096)
def _prompts(source: str) -> frozenset[str]:
    """Hashes of the prompts of one source (as JSON)."""
    return frozenset(row.prompt_hash for row in load_rows(RowSource(**json.loads(source)), need_response=False))


def prompts(cell: Cell, *keys: str) -> frozenset[str]:
    """Hashes of the prompts of a training or pass, of some of its sets of rows (``train``) or all that it reads.

    Of an adapter that was there: what lies beside it, where that is here.
    """
    if cell.stage == "given":
        return read_seen(Path(cell.settings["adapter"]))
    found: frozenset[str] = frozenset()
    for key in keys or _read(cell):
        for source in local_sources(cell.settings["data"].get(key) or []):
            found |= _prompts(json.dumps(plain(source), sort_keys=True))
    return found


def _read(cell: Cell) -> list[str]:
    """The sets of rows that a cell reads: a pass over random tokens has none."""
    model = cell.settings.get("model", {})
    labels = {"safety": model.get("labels"), "utility": model.get("labels_utility") or model.get("labels")}
    return [key for key in ROWS[cell.stage] if labels.get(key) != "random_tokens"]


def check_learnt_rows(todo: Sequence[Cell]) -> None:
    """Stop where a model would be asked what it was trained or calibrated on, or chosen by what it was trained on.

    Raises:
        InputError: see above; the message names the cell, the suite and what learnt its prompts.
    """
    apart: set[tuple[str, str]] = set()  # suites, and what has learnt none of their prompts
    for cell in todo:
        if cell.stage == "fit" and (both := prompts(cell, "train") & prompts(cell, "val")):
            raise InputError(f"{cell.label}: {len(both)} prompts of data.val are also training prompts")
        if cell.stage == "test" and not cell.settings.get("model", {}).get("allow_seen"):
            for suite in cell.settings["data"]["suites"]:
                _check_suite(cell, suite, apart)


def _check_suite(cell: Cell, suite: Mapping[str, Any], apart: set[tuple[str, str]]) -> None:
    asked = json.dumps(suite, sort_keys=True)
    for other in closure([cell]):
        if other.stage not in (*LEARN, "fisher") or (asked, other.key) in apart:
            continue
        known = prompts(other)
        both = [row for row in suite_rows(suite) if known & {row.prompt_hash, row.goal_hash}]
        if both:
            what = "trained" if other.stage in LEARN else "calibrated"
            raise InputError(
                f"{cell.label}: {len(both)} prompts of suite {suite['name']}, the first {both[0].id}, are what "
                f"{other.label} is {what} on; expected other rows (or recipe.evaluation.settings.model.allow_seen true)"
            )
        apart.add((asked, other.key))


def passes_on_learnt_rows(cells: Sequence[Cell]) -> list[str]:
    """A note on Fisher passes over prompts that an expert was trained on: its scores there are not those elsewhere."""
    found = dict.fromkeys(_learnt(cells))
    if not found:
        return []
    more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return [
        "Fisher passes were taken on prompts that an expert had learnt, whose scores on them are not those on others: "
        f"{'; '.join(list(found)[:SHOWN])}{more}."
    ]


def _learnt(cells: Sequence[Cell]) -> Iterator[str]:
    for cell in (one for one in closure(cells) if one.stage == "fisher"):
        asked = prompts(cell)
        for parent in (one for one in cell.parents if one.stage in LEARN):
            if both := asked & prompts(parent):
                yield f"{len(both)} of {len(asked)} of “{cell.label}” by “{parent.label}”"
