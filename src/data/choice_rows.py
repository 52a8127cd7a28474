"""Multiple-choice rows, from the schemas of the hub: MMLU, ARC, OpenBookQA, TruthfulQA and files like theirs.

A column may be a path into nested columns (``choices.text``). The right answer may be a position (MMLU), a label among
``labels`` (ARC's ``answerKey``), a letter, or a list of marks with a single 1 (TruthfulQA's ``mc1_targets.labels``).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from src.data.row_source import RowSource, Sources
from src.data.rows import Row
from src.data.sources import load_records
from src.errors import InputError
from src.metrics.categories import category_text

DEFAULTS = {"id": "id", "prompt": "question", "choices": "choices", "answer": "answer", "category": "subject"}
FIELDS = (*DEFAULTS, "labels")
OPTIONAL = ("id", "category", "labels")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class ChoiceRow(Row):
    """A question with its choices; ``answer`` is the position of the right one."""

    choices: tuple[str, ...] = ()
    answer: int = 0


def load_choices(value: Sources | None) -> list[ChoiceRow]:
    """Load multiple-choice rows.

    Raises:
        InputError: a column is unknown or missing, fewer than two choices are given, or the answer is none of them.
    """
    return load_records(value, FIELDS, _build)


def _build(source: RowSource, number: int, place: str, record: dict[str, Any]) -> ChoiceRow:
    values = {name: _value(record, name, source, place) for name in FIELDS}
    choices = _texts(values["choices"], "choices", place)
    if len(choices) < 2 or not all(choices):
        raise InputError(f"{place}: choices are {list(choices)}; expected at least two texts")
    if len(choices) > len(LETTERS):
        raise InputError(f"{place}: {len(choices)} choices; expected at most {len(LETTERS)}")
    if not isinstance(values["prompt"], str):
        raise InputError(f"{place}: the question is {values['prompt']!r}; expected a text")
    prompt = values["prompt"].strip()
    if not prompt:
        raise InputError(f"{place}: the question is empty")
    labels = _texts(values["labels"] or list(LETTERS[: len(choices)]), "labels", place)
    if len(labels) != len(choices) or len(set(labels)) < len(labels):
        raise InputError(f"{place}: labels are {list(labels)}; expected {len(choices)} different ones")
    if isinstance(values["answer"], list) and len(values["answer"]) != len(choices):
        raise InputError(f"{place}: {len(values['answer'])} marks for {len(choices)} choices")
    answer = _position(values["answer"], labels, place)
    if not 0 <= answer < len(choices):
        raise InputError(f"{place}: the answer key {values['answer']!r} is outside the {len(choices)} choices")
    return ChoiceRow(
        id=str(values["id"] or f"{Path(source.path).name}/{number}"),
        prompt=prompt,
        response=choices[answer],
        category=category_text(values["category"]),
        source=source.path,
        choices=choices,
        answer=answer,
    )


def _texts(value: Any, what: str, place: str) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise InputError(f"{place}: {what} are {value!r}; expected a list")
    if not all(isinstance(each, str | int) or (isinstance(each, float) and isfinite(each)) for each in value):
        raise InputError(f"{place}: {what} are {value!r}; expected texts or numbers alone")
    return tuple(str(each).strip() for each in value)


def _value(record: dict[str, Any], name: str, source: RowSource, place: str) -> Any:
    if name in OPTIONAL and source.columns.get(name) == "":
        return None
    path = source.columns.get(name) or DEFAULTS.get(name, name)
    value: Any = record
    for part in path.split("."):
        if not isinstance(value, dict) or part not in value:
            if name in OPTIONAL and name not in source.columns:
                return None
            raise InputError(f"{place}: no column {path!r}; the row has {', '.join(map(repr, record))}")
        value = value[part]
    return value


def _position(answer: Any, labels: Sequence[str], place: str) -> int:
    """Position of the right choice; -1 where the key names none."""
    if isinstance(answer, list):
        if sum(map(bool, answer)) != 1:
            raise InputError(f"{place}: {sum(map(bool, answer))} choices are marked as right; expected one")
        return [bool(mark) for mark in answer].index(True)
    text = str(answer).strip()
    if text in labels:
        return list(labels).index(text)
    return int(text) if text.isdecimal() else -1
