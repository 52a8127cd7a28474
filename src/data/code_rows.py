"""Programming rows of HumanEval's schema (2107.03374): a signature to complete and a test that calls ``check``."""

import re
from dataclasses import dataclass
from typing import Any

from src.data.row_source import RowSource, Sources
from src.data.rows import Row
from src.data.sources import load_records
from src.errors import InputError

CHECK = re.compile(r"^\s*def\s+check\b", re.MULTILINE)
FIELDS = ("task_id", "prompt", "canonical_solution", "test", "entry_point")


@dataclass(frozen=True)
class CodeRow(Row):
    """A function to write; ``response`` is the canonical solution, white space kept."""

    test: str = ""
    entry_point: str = ""


def load_code(value: Sources | None) -> list[CodeRow]:
    """Load programming rows.

    Raises:
        InputError: a column is unknown, missing or empty.
    """
    return load_records(value, FIELDS, _build)


def _build(source: RowSource, _: int, place: str, record: dict[str, Any]) -> CodeRow:
    values = {}
    for name in FIELDS:
        column = source.columns.get(name, name)
        if not str(record.get(column) or "").strip():
            raise InputError(f"{place}: no text in column {column!r}; a programming row has {', '.join(FIELDS)}")
        if not isinstance(record[column], str) and name != "task_id":
            raise InputError(f"{place}: column {column!r} is a {type(record[column]).__name__}; expected text")
        values[name] = str(record[column])
    if not CHECK.search(values["test"]):
        column = source.columns.get("test", "test")
        raise InputError(f"{place}: column {column!r} defines no function check; expected HumanEval's form of tests")
    return CodeRow(
        id=values["task_id"],
        prompt=values["prompt"],
        response=values["canonical_solution"],
        source=source.path,
        test=values["test"],
        entry_point=values["entry_point"],
    )
