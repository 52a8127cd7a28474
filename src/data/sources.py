"""Where rows come from: a JSONL file, any file or directory that ``datasets`` reads, or a hub data set by name.

A source maps the columns of a data set to the fields of a row. Mappings for well-known data sets ship as YAML under
``configs/data``; they are named in place of a file.
"""

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from src.data.rows import Row, read_jsonl
from src.errors import InputError, one_line
from src.metrics.categories import category_text

PROJECT = Path(__file__).resolve().parents[2]
FILE_READERS = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".json": "json"}
FIELDS = ("id", "prompt", "response", "category")


@dataclass
class RowSource:
    r"""A set of rows.

    Args:
        path: A JSONL, JSON, CSV or Parquet file, a directory that ``datasets`` reads, or a hub data set's name.
        split: The hub data set's split; slices such as ``train[:500]`` are allowed.
        subset: The hub data set's configuration name.
        revision: The hub data set's git revision.
        columns: For each field of a row (id, prompt, response, category): a column's name, or a template such as
            ``{instruction}\n\n{input}``. Fields left out are read from the column of the same name; an empty name
            leaves a field empty.
        where: Keep only rows whose columns have these values.
        remove: A regular expression whose matches are deleted from responses (GSM8K's calculator marks).
        response: The answer of every row, in place of a column: a refusal, for harmful prompts that come without one.
        answer_tokens: Learn or measure the first tokens of each answer only, not its end unless it is that short: what
            decides whether a model refuses (Qi et al., 2406.05946). For training and Fisher passes.
        weight: How much each row counts in the mean beside rows of other sources; above 0. For Fisher passes.
        unique: Keep the first row of each prompt only.
        skip: Number of rows to leave out at the beginning, after shuffling.
        limit: Number of rows to keep at most.
        seed: Shuffle with this seed first; unset keeps the order of the file.
    """

    path: str
    split: str = "train"
    subset: str | None = None
    revision: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    where: dict[str, Any] = field(default_factory=dict)
    remove: str | None = None
    response: str | None = None
    answer_tokens: int | None = None
    weight: float = 1.0
    unique: bool = False
    skip: int = 0
    limit: int | None = None
    seed: int | None = None


# str stands first: jsonargparse tries members in order, and would read a file that a list or a source was named by.
Sources = str | RowSource | list[str | RowSource]


def find_file(name: str, *folders: str) -> Path | None:
    """``name`` as given, then under the project root and under ``folders`` of the working directory and of it."""
    for root in (Path(), PROJECT):
        for folder in ("", *folders):
            candidate = root / folder / name
            if candidate.exists():
                return candidate
    return None


def as_sources(value: Sources | None) -> list[RowSource]:
    """Normalise what a flag or YAML key gave into a list of sources; a YAML name becomes its mapping."""
    items = value if isinstance(value, list) else [] if value is None else [value]
    found: list[RowSource] = []
    for item in items:
        if isinstance(item, str) and item.startswith(("[", "{")):
            found += _written_out(item)
        else:
            found.append(item if isinstance(item, RowSource) else _named_source(item))
    return found


def _written_out(text: str) -> list[RowSource]:
    """Sources that are written as a YAML list or mapping on the command line."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"{text}: neither the name of a source of rows nor YAML") from None
    items = value if isinstance(value, list) else [value]
    return [_mapped_source(item, text) if isinstance(item, dict) else _named_source(str(item)) for item in items]


def _named_source(name: str) -> RowSource:
    if not name.endswith((".yaml", ".yml")):
        return RowSource(path=name)
    path = find_file(name, "configs", "configs/data")
    if path is None:
        raise InputError(f"{name}: no such file here or under configs/data; expected the YAML of a row source")
    try:
        return _mapped_source(yaml.safe_load(path.read_text(encoding="utf-8")), str(path))
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML ({one_line(error)})") from None


def _mapped_source(mapping: Any, place: str) -> RowSource:
    known = {f.name for f in fields(RowSource)}
    if not isinstance(mapping, dict) or "path" not in mapping:
        raise InputError(f"{place}: expected a mapping with the key 'path'")
    if unknown := sorted(set(mapping) - known, key=str):
        raise InputError(f"{place}: unknown key {unknown[0]!r}; expected some of {', '.join(sorted(known))}")
    return RowSource(**mapping)


def load_rows(value: Sources | None, *, need_response: bool) -> list[Row]:
    """Load every row of every source, in order, each source's selection applied.

    Args:
        value: One or several sources.
        need_response: Whether a row without an answer is an error (training, calibration) or allowed (prompts only).

    Raises:
        InputError: nothing is there to read, a column is unknown, a row has no prompt or no answer.
    """
    rows: list[Row] = []
    for source in as_sources(value):
        rows += _select(list(_rows_of(source, need_response)), source)
    if not rows:
        raise InputError("no rows: name at least one source of rows")
    return rows


def refuse_options(value: Sources | None, purpose: str, *names: str) -> None:
    """Stop at a source that sets one of these options, which are for another purpose."""
    for source in as_sources(value):
        for name in names:
            if getattr(source, name) != getattr(RowSource, name):
                raise InputError(f"{source.path}: {name} is for {purpose}; leave it out here")


R = TypeVar("R", bound=Row)


def load_records(value: Sources | None, build: Callable[[RowSource, int, str, dict[str, Any]], R]) -> list[R]:
    """Load rows of another kind: ``build(source, number, place, record)`` makes one; selection as in load_rows."""
    rows: list[R] = []
    refuse_options(value, "rows of a prompt and an answer", "remove", "response", "answer_tokens", "weight")
    for source in as_sources(value):
        found = [
            build(source, number, place, record)
            for number, (place, record) in enumerate(_records(source))
            if all(_column(record, key, place) == wanted for key, wanted in source.where.items())
        ]
        rows += _select(found, source)
    if not rows:
        raise InputError("no rows: name at least one source of rows")
    return rows


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
        raise InputError(f"{source.path}: no rows left of {len(rows)} after where, skip {source.skip} and limit")
    return kept


def _rows_of(source: RowSource, need_response: bool) -> Iterator[Row]:
    if unknown := sorted(set(source.columns) - set(FIELDS)):
        raise InputError(f"{source.path}: columns maps unknown field {unknown[0]!r}; expected {', '.join(FIELDS)}")
    remove = _pattern(source)
    answer = source.response
    if answer is not None:
        if not answer.strip() or remove is not None or "response" in source.columns:
            raise InputError(
                f"{source.path}: response is {answer!r}; expected a text, and neither remove nor columns.response"
            )
        source = replace(source, columns={**source.columns, "response": ""})
    _check_numbers(source)
    for number, (place, record) in enumerate(_records(source)):
        if any(_column(record, key, place) != value for key, value in source.where.items()):
            continue
        _check_texts(record, source, place)
        values = {name: _field(record, name, source, place) for name in FIELDS}
        if not values["prompt"]:
            raise InputError(
                f"{place}: the prompt is empty; expected text in {source.columns.get('prompt', 'prompt')!r}"
            )
        if answer is not None:
            values["response"] = answer.strip()
        elif remove is not None:
            values["response"] = remove.sub("", values["response"])
        if need_response and not values["response"]:
            raise InputError(
                f"{place}: the row has no answer; expected text in {source.columns.get('response', 'response')!r}"
            )
        values["id"] = values["id"] or f"{Path(source.path).name}/{number}"
        yield Row(**values, source=source.path, answer_tokens=source.answer_tokens)


def _check_numbers(source: RowSource) -> None:
    tokens, weight = source.answer_tokens, source.weight
    if tokens is not None and (type(tokens) is not int or tokens < 1):
        raise InputError(f"{source.path}: answer_tokens is {tokens!r}; expected a whole number of at least 1")
    if type(weight) not in (int, float) or not 0 < weight < float("inf"):
        raise InputError(f"{source.path}: weight is {weight!r}; expected a number above 0, finite")


def _check_texts(record: dict[str, Any], source: RowSource, place: str) -> None:
    """Stop at a prompt or an answer that is no text, such as the messages of a conversation."""
    for name in ("prompt", "response"):
        value = record.get(source.columns.get(name, name))
        if isinstance(value, list | dict):
            raise InputError(f"{place}: the {name} is a {type(value).__name__}; expected text")


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
            _column(record, name, place)
        value = record.get(name)
    elif not spec:
        return ""
    elif "{" in spec:
        value = re.sub(r"\{(\w+)\}", lambda match: _text(_column(record, match[1], place)), spec)
    else:
        value = _column(record, spec, place)
    return category_text(value) if name == "category" else _text(value).strip()


def _text(value: Any) -> str:
    """Text of a column: nothing for null, the names of the true flags for a mapping of flags."""
    if isinstance(value, dict):
        return ",".join(str(key) for key, on in value.items() if on)
    return "" if value is None else str(value)


def _column(record: dict[str, Any], column: str, place: str) -> Any:
    if column not in record:
        raise InputError(f"{place}: no column {column!r}; the row has {', '.join(map(repr, record))}")
    return record[column]


def _records(source: RowSource) -> Iterator[tuple[str, dict[str, Any]]]:
    path = Path(source.path)
    if not path.exists() and (PROJECT / path).exists():
        path = PROJECT / path
    if path.suffix == ".jsonl":
        yield from read_jsonl(path)
        return
    table = _load_table(source, path)
    for number, record in enumerate(table):
        yield f"{source.path}[{source.split}] row {number}", dict(record)


def _load_table(source: RowSource, path: Path) -> Any:
    import datasets

    reader = FILE_READERS.get(path.suffix)
    if reader is not None and not path.is_file():
        raise InputError(f"{path}: no such file; expected {reader} rows")
    try:
        if reader is not None:
            extra = {"sep": "\t"} if path.suffix == ".tsv" else {}
            return datasets.load_dataset(reader, data_files=str(path), split="train", **extra)
        name = str(path) if path.is_dir() else source.path
        return datasets.load_dataset(name, source.subset, split=source.split, revision=source.revision)
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        # What went wrong while a file was read is behind a sentence that says nothing.
        reason = one_line(error.__cause__ or error)
        raise InputError(
            f"{source.path}: neither a readable file nor a data set that can be fetched now ({reason})"
        ) from None
