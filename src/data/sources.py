"""Rows of their sources: a JSONL file, any file or directory that ``datasets`` reads, or a hub data set by name."""

import logging
import random
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from datetime import date, time
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar

from src.data.conversations import Message, answer_of, answer_text, is_conversation, plain_text, read_conversation
from src.data.row_source import RowSource, Sources, as_sources, find_file
from src.data.rows import Row, read_jsonl
from src.data.tables import load_table
from src.errors import InputError
from src.metrics.categories import category_text

log = logging.getLogger(__name__)
FIELDS = ("id", "prompt", "response", "category", "system", "goal")
OF_ANSWERS = ("remove", "response", "system", "answer_tokens", "weight", "answered")
"""Options of sources whose rows are a prompt and an answer."""
NAMED = re.compile(r"\{([^{}]+)\}")
"""A column that a template names."""
NO_NAME = re.compile(r"[\"',:\\]")
"""What tells other braces (of JSON, LaTeX, sets) from a column's name."""
BEFORE_GROUP = re.compile(r"(?:\\[A-Za-z]+(?:\{[^{}]*\})*|[\^_])\Z")
"""What stands before a group of LaTeX: a command with its earlier groups, or a mark of an index."""


def load_rows(value: Sources | None, *, need_response: bool) -> list[Row]:
    """Load every row of every source, in order, each source's selection applied.

    Args:
        value: One or several sources.
        need_response: Whether a row without an answer is an error (training, calibration) or allowed (prompts only).

    Raises:
        InputError: nothing is there to read, a column is unknown, a row has no prompt or no answer.
    """
    return _from_all(value, FIELDS, lambda source: _answered(source, need_response))


def _answered(source: RowSource, need_response: bool) -> list[Row]:
    rows = list(_rows_of(source, need_response and not source.answered))
    if not source.answered:
        return rows
    kept = [row for row in rows if row.response]
    if len(kept) < len(rows):
        log.info("%s: %d rows without an answer left out", source.path, len(rows) - len(kept))
    return kept


def refuse_options(value: Sources | None, purpose: str, *names: str) -> None:
    """Stop at a source that sets one of these options, which are for another purpose."""
    for source in as_sources(value):
        for name in names:
            if getattr(source, name) != getattr(RowSource, name):
                raise InputError(f"{source.path}: {name} is for {purpose}; leave it out here")


R = TypeVar("R", bound=Row)


def load_records(
    value: Sources | None, fields: Collection[str], build: Callable[[RowSource, int, str, dict[str, Any]], R]
) -> list[R]:
    """Load rows of another kind; selection as in load_rows.

    Args:
        value: One or several sources.
        fields: What columns may be named for.
        build: Makes a row: ``build(source, number, place, record)``.
    """
    refuse_options(value, "rows of a prompt and an answer", *OF_ANSWERS)
    return _from_all(value, fields, lambda source: [build(source, *each) for each in _chosen(source)])


def _from_all(value: Sources | None, fields: Collection[str], read: Callable[[RowSource], list[R]]) -> list[R]:
    rows: list[R] = []
    for source in as_sources(value):
        if unknown := sorted(set(source.columns) - set(fields)):
            raise InputError(f"{source.path}: columns maps unknown field {unknown[0]!r}; expected {', '.join(fields)}")
        rows += _select(read(source), source)
    if not rows:
        raise InputError("no rows: name at least one source of rows")
    return rows


def _chosen(source: RowSource) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Number, place and record of what ``where`` keeps."""
    for number, (place, record) in enumerate(_records(source)):
        if all(_column(record, key, place) == wanted for key, wanted in source.where.items()):
            yield number, place, record


def _select(rows: list[R], source: RowSource) -> list[R]:
    if source.skip < 0 or (source.limit is not None and source.limit < 1):
        raise InputError(f"{source.path}: skip must be at least 0 and limit at least 1")
    if source.unique:
        first: dict[str, R] = {}
        for row in rows:
            first.setdefault(row.prompt_hash, row)
        rows = list(first.values())
    if source.seed is not None:
        random.Random(source.seed).shuffle(rows)
    kept = rows[source.skip :][: source.limit]
    if not kept:
        chosen = [f"where {source.where}"] if source.where else []
        chosen += [name for name in ("answered", "unique") if getattr(source, name)]
        before = f"{', '.join(chosen)} ({len(rows)} left) and " if chosen else ""
        read = sum(1 for _ in _records(source))
        raise InputError(f"{source.path}: no rows left of {read} after {before}skip {source.skip}")
    return kept


def _rows_of(source: RowSource, need_response: bool) -> Iterator[Row]:
    remove = _pattern(source)
    answer = source.response
    if source.system is not None and not source.system.strip():
        raise InputError(f"{source.path}: system is {source.system!r}; expected a text")
    if answer is not None:
        if not answer.strip() or remove is not None or "response" in source.columns:
            raise InputError(
                f"{source.path}: response is {answer!r}; expected a text, and neither remove nor columns.response"
            )
        source = replace(source, columns={**source.columns, "response": ""})
    _check_numbers(source)
    for number, place, record in _chosen(source):
        before, said = _of_messages(record, source, place)
        # A column of that name may be anything: only one that is mapped is a goal.
        texts = [name for name in FIELDS if name not in said and (name != "goal" or name in source.columns)]
        _check_texts(record, source, texts, place)
        values = {name: _field(record, name, source, place) for name in texts} | said
        if not values["prompt"]:
            raise InputError(
                f"{place}: the prompt is empty; expected text in {source.columns.get('prompt', 'prompt')!r}"
            )
        if system := (source.system or values["system"]).strip():
            before = (("system", system), *(one for one in before if one[0] != "system"))
        del values["system"]
        if answer is not None:
            values["response"] = answer_text(answer)
        elif remove is not None:
            values["response"] = answer_text(remove.sub("", values["response"]))
        if need_response and not values["response"]:
            column = source.columns.get("response", "response")
            raise InputError(
                f"{place}: the row has no answer; expected text in {column!r}"
                + ("" if column in record or "{" in column else f"; {_named_by('response', record)}")
            )
        values["id"] = values["id"] or f"{Path(source.path).name}/{number}"
        yield Row(**values, source=source.path, answer_tokens=source.answer_tokens, before=before)


def _of_messages(record: dict[str, Any], source: RowSource, place: str) -> tuple[tuple[Message, ...], dict[str, str]]:
    """The messages before a row's prompt, and prompt and response where columns hold these as messages.

    Raises:
        InputError: they are no conversation, or the row has two answers.
    """
    asked, answered = source.columns.get("prompt", "prompt"), source.columns.get("response", "response")
    unnamed = asked == "prompt" and _is_missing(record.get("prompt")) and record.get("messages") is not None
    given, answer = record.get("messages" if unnamed else asked), record.get(answered)
    if unnamed and not is_conversation(given):
        raise InputError(f"{place}: messages is {str(given)[:40]!r}; expected a list of messages")
    own = answered != asked and not _is_missing(answer)
    said = {"response": answer_of(answer, place)} if own and is_conversation(answer) else {}
    if not is_conversation(given):
        return (), said
    found = read_conversation(given, place)
    if own and found.response:
        raise InputError(
            f"{place}: both the messages and the column {answered!r} have an answer; expected one, or columns.response "
            "to name that of the messages, too"
        )
    return found.before, {"prompt": found.prompt} | (said if own or not answered else {"response": found.response})


def _check_numbers(source: RowSource) -> None:
    tokens, weight = source.answer_tokens, source.weight
    if tokens is not None and (type(tokens) is not int or tokens < 1):
        raise InputError(f"{source.path}: answer_tokens is {tokens!r}; expected a whole number of at least 1")
    if type(weight) not in (int, float) or not 0 < weight < float("inf"):
        raise InputError(f"{source.path}: weight is {weight!r}; expected a number above 0, finite")


def _check_texts(record: dict[str, Any], source: RowSource, names: Collection[str], place: str) -> None:
    """Stop at a prompt, an answer or a system's message that should be text and is none, or has such a part."""
    for name in (one for one in ("prompt", "response", "system", "goal") if one in names):
        spec = source.columns.get(name, name)
        for column in NAMED.findall(spec) if "{" in spec else [spec]:
            value = record.get(column)
            what = f"the {name}" if column == spec else f"column {column!r} of the {name}"
            if isinstance(value, list | dict | bytes):
                raise InputError(f"{place}: {what} is a {type(value).__name__}; expected text")
            if isinstance(value, date | time):
                # Arrow reads JSON texts that look like one as times: 2021-03-04 would become 2021-03-04 00:00:00.
                raise InputError(
                    f"{place}: {what} was read as a {type(value).__name__}; expected text: name JSON files one by one, "
                    "or store the column as text"
                )


def _pattern(source: RowSource) -> re.Pattern[str] | None:
    if source.remove is None:
        return None
    try:
        return re.compile(source.remove)
    except re.error as error:
        raise InputError(f"{source.path}: remove is not a regular expression: {error}") from None


def _field(record: dict[str, Any], name: str, source: RowSource, place: str) -> str:
    spec = source.columns.get(name)
    if spec is None:
        if name == "prompt" and name not in record:
            raise InputError(f"{place}: no column 'prompt'; {_named_by(name, record)}")
        value = record.get(name)
    elif not spec:
        return ""
    elif "{" in spec:
        value = NAMED.sub(lambda match: _part(record, match, place), spec)
    else:
        value = _column(record, spec, place)
    return (answer_text if name == "response" else plain_text)(_text(value))


def _part(record: dict[str, Any], match: re.Match[str], place: str) -> str:
    """The text of a column that a template names; braces that are none's and hold no name stay as they are."""
    if match[1] not in record:
        before = match.string[: match.start()]
        if match[1].isspace() or NO_NAME.search(match[1]) or BEFORE_GROUP.search(before):
            return match[0]
    return _text(_column(record, match[1], place))


def _text(value: Any) -> str:
    """Text of a column: nothing for a missing value; lists and mappings of flags as categories are written."""
    if isinstance(value, list | dict):
        return category_text(value)
    return "" if _is_missing(value) else str(value)


def _is_missing(value: Any) -> bool:
    """Whether a value is null, or a number that is none: NaN is what pandas makes of null."""
    return value is None or (isinstance(value, float) and not isfinite(value))


def _column(record: dict[str, Any], column: str, place: str) -> Any:
    if column not in record:
        raise InputError(f"{place}: no column {column!r}; the row has {', '.join(map(repr, record))}")
    return record[column]


def _named_by(field: str, record: dict[str, Any]) -> str:
    """What else could be meant, and how to say it."""
    return f"the row has {', '.join(map(repr, record))} (columns: {{{field}: NAME}} names one of them)"


def _records(source: RowSource) -> Iterator[tuple[str, dict[str, Any]]]:
    path = find_file(source.path) or Path(source.path)
    if "[" in source.split and path.is_file():
        raise InputError(f"{source.path}: split is {source.split!r}, and a file has none; use skip and limit")
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        yield from read_jsonl(path)
        return
    table = load_table(
        source.path,
        path,
        subset=source.subset,
        split=source.split,
        revision=source.revision,
        text=_text_columns(source),
    )
    for number, record in enumerate(table):
        yield f"{source.path}[{source.split}] row {number}", dict(record)


def _text_columns(source: RowSource) -> set[str]:
    """Columns that are text as it stands in a file: what a row's fields are made of, but not what it is chosen by."""
    named = {*FIELDS, *source.columns.values()}
    named |= {name for spec in source.columns.values() for name in NAMED.findall(spec)}
    return {name for name in named if name not in source.where}
