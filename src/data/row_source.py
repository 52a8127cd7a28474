"""A source of rows as a user names it: a file, a hub data set, or a YAML mapping that says how to read one.

Mappings for well-known data sets ship under ``configs/data``; they are named in place of a file.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from src.errors import InputError, one_line
from src.files import PROJECT


@dataclass
class RowSource:
    r"""A set of rows.

    Args:
        path: A JSONL (also .jsonl.gz), JSON, CSV or Parquet file, a directory that ``datasets`` reads, or a hub data
            set's name; or a YAML file of these options (such as ``gsm8k.yaml``), over which the others here stand. One
            that is given its default here leaves the file's: ``split: train`` does not change a mapping's ``test``.
        split: The hub data set's or directory's split; slices such as ``train[:500]`` are allowed. Files have none.
        subset: The hub data set's configuration name.
        revision: The hub data set's git revision.
        columns: For each field of a row (id, prompt, response, category, system, goal): a column's name, or a template
            such as ``{instruction}\n\n{input}``. Fields left out are read from the column of the same name, but for the
            goal (what a prompt in disguise is after: a judge is asked about that); an empty name leaves a field empty.
            Braces of a template that name no column are an error; they stay as they are where they hold nothing, white
            space alone, or a quotation mark, comma, colon or backslash, and where they stand directly behind
            ``\word``, its braces, ``^`` or ``_`` (JSON, LaTeX). A prompt's column may hold a list of messages, such as
            ``messages``, which is read where there is no column ``prompt``: the last of the user's is the prompt, the
            assistant's behind it the response; others stand before the prompt and are not learnt.
        where: Keep only rows whose columns have these values.
        remove: A regular expression whose matches are deleted from responses (GSM8K's calculator marks).
        response: The answer of every row, in place of a column: a refusal, for harmful prompts that come without one.
        system: What the system says before every prompt, in place of what a column or a list of messages has; it needs
            a chat template that takes it.
        answer_tokens: Learn or measure the first tokens of each answer only, not its end unless it is that short: what
            decides whether a model refuses (Qi et al., 2406.05946). For training and Fisher passes.
        weight: How much each row counts in the mean beside rows of other sources; above 0. For Fisher passes.
        answered: Leave out rows without an answer before all else is chosen, and log how many; otherwise such a row is
            an error where answers are needed.
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
    system: str | None = None
    answer_tokens: int | None = None
    weight: float = 1.0
    answered: bool = False
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


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Raises:
        InputError: it is no such file.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:  # ValueError: bytes that are no UTF-8, a date that is none
        raise InputError(f"{path}: not valid YAML ({one_line(error)})") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected a mapping of keys to values")
    return found


def as_sources(value: Sources | None) -> list[RowSource]:
    """Normalise what a flag or YAML key gave into a list of sources; a YAML name becomes its mapping."""
    items = value if isinstance(value, list) else [] if value is None else [value]
    found: list[RowSource] = []
    for item in items:
        if item in ("", "null"):  # an unset variable of a shell, and no rows as YAML has them
            raise InputError(f"a source of rows is {item!r}; expected a file, a directory or a data set's name")
        if isinstance(item, str) and item.startswith(("[", "{")):
            found += _written_out(item)
        else:
            found.append(_over_mapping(item) if isinstance(item, RowSource) else _named_source(item))
    return found


def _over_mapping(source: RowSource) -> RowSource:
    """The source, or where its path is a mapping's file that mapping with what else the source says."""
    if not source.path.endswith((".yaml", ".yml")):
        return source
    defaults = RowSource(source.path)
    given = {f.name: getattr(source, f.name) for f in fields(source)}
    return replace(_named_source(source.path), **{k: v for k, v in given.items() if v != getattr(defaults, k)})


def _written_out(text: str) -> list[RowSource]:
    """Sources that are written as a YAML list or mapping on the command line."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"{text}: neither the name of a source of rows nor YAML") from None
    items = value if isinstance(value, list) else [value]
    mapped = (mapped_source(item, text) if isinstance(item, dict) else str(item) for item in items)
    return [_named_source(item) if isinstance(item, str) else _over_mapping(item) for item in mapped]


def _named_source(name: str) -> RowSource:
    if not name.endswith((".yaml", ".yml")):
        return RowSource(path=name)
    path = find_file(name, "configs", "configs/data")
    if path is None:
        raise InputError(f"{name}: no such file here or under configs/data; expected the YAML of a row source")
    return mapped_source(read_yaml(path), str(path))


def mapped_source(mapping: Any, place: str) -> RowSource:
    """A source that is written as a mapping.

    Raises:
        InputError: it has no path, an unknown key or a value of another kind; ``place`` says where it stands.
    """
    known = _kinds()
    if not isinstance(mapping, Mapping):
        raise InputError(f"{place}: expected a mapping with the key 'path'")
    if unknown := sorted(set(mapping) - set(known), key=str):
        raise InputError(f"{place}: unknown key {unknown[0]!r}; expected some of {', '.join(sorted(known))}")
    if "path" not in mapping:
        raise InputError(f"{place}: expected a mapping with the key 'path'")
    for key, kind in known.items():
        if key in mapping and not _fits(mapping[key], kind):
            raise InputError(f"{place}: {key} is {mapping[key]!r}; expected {_said(kind)}")
    return RowSource(**mapping)


@cache
def _kinds() -> dict[str, Any]:
    """Type of each option of a source."""
    return get_type_hints(RowSource)


def _fits(value: Any, kind: Any) -> bool:
    if isinstance(kind, UnionType):
        return any(_fits(value, one) for one in get_args(kind))
    if kind in (int, float):
        return type(value) is int or type(value) is kind
    if get_origin(kind) is dict:
        return isinstance(value, dict) and all(_fits(one, get_args(kind)[1]) for one in value.values())
    return kind is Any or isinstance(value, kind)


def _said(kind: Any) -> str:
    kinds = [one for one in get_args(kind) if one is not type(None)] if isinstance(kind, UnionType) else [kind]
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
    return " or ".join(names.get(one, "a mapping") for one in kinds)
