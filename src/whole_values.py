"""Values that stand for themselves: a list, or a source of rows, replaces what stood at its place before.

jsonargparse fills what an item of a list leaves out from the item at the same place of an earlier list of the same
length, and what a source of rows leaves out from an earlier source: a user's file would be cut at the ``limit`` of the
demo's. Here the parser is told an empty list first, which leaves nothing to fill in from. Single keys
(``--data.val.limit 5``) still change what stands there.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, Namespace  # type: ignore[attr-defined]

from src.errors import InputError

PROBLEMS, PLACE = ("Problems parsing config: ", "not valid YAML: "), (' in "<unicode string>",', " in")
"""What the parser says of a text that is no YAML, and in words."""


def is_whole(value: Any) -> bool:
    """Whether a value stands for itself: a list, or a mapping that names a path."""
    return isinstance(value, list) or (isinstance(value, Mapping) and "path" in value)


class ConfigFile(ActionConfigFile):
    """``--config``: a YAML file whose lists and sources of rows replace those of the files before it."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Empty what the file sets whole, then let it be read."""
        try:
            text = Path(values).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"--config {values}: not UTF-8 text ({error})") from None
        except OSError:
            text = ""  # the parser says what is wrong with the file
        settings = _loaded(text)
        with suppress(ValueError):
            _empty(cfg, settings)
        files_of(parser).append((values, settings))
        try:
            super().__call__(parser, cfg, values, option_string)
        except InputError as error:
            raise InputError(f"{values}: {str(error).replace(*PROBLEMS).replace(*PLACE)}") from None


def files_of(parser: Any) -> list[tuple[str, Any]]:
    """Files that ``--config`` of a parser has named so far, each with what it holds, to name one where it is wrong."""
    found: list[tuple[str, Any]] = parser.__dict__.setdefault("_config_files", [])
    return found


def after_empty(arguments: Sequence[str]) -> list[str]:
    """Arguments with ``--OPTION=[]`` before each option whose value is a list of mappings or a source of rows."""
    found: list[str] = []
    for argument, following in pairwise([*arguments, "--"]):
        flag, equals, value = argument.partition("=")
        if flag.startswith("--") and not flag.endswith("+") and _may_inherit(_loaded(value if equals else following)):
            found.append(f"{flag}=[]")
        found.append(argument)
    return found


def _may_inherit(value: Any) -> bool:
    items = value if isinstance(value, list) else [value]
    return is_whole(value) and any(isinstance(item, Mapping) for item in items)


def _loaded(text: str) -> Any:
    """A text as YAML; one that is none is reported by the parser."""
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):  # ValueError: a date that is none
        return None


def _empty(known: Any, given: Any) -> None:
    """Replace each value of a configuration that is about to be set whole by an empty list."""
    for holder, key, value in _places(known, given):
        if is_whole(value):
            holder[key] = []
        else:
            _empty(holder[key], value)


def _places(known: Any, given: Any) -> Iterator[tuple[Any, str, Any]]:
    """Where the keys of a mapping are known already; a class's options may stand without ``init_args``."""
    if isinstance(known, Namespace) and isinstance(given, Mapping):
        inside = known.get("init_args")
        for key, value in given.items():
            holder = inside if key not in known and isinstance(inside, Namespace) else known
            if isinstance(holder.get(key), (Namespace, list)):
                yield holder, key, value
