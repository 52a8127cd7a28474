"""Methods and judges of a user's own modules: what identifies them beside their options is the source they are made of.

A class whose module is not below ``src`` is a user's. Its own file counts, and the files of its bases outside this
project, the standard library and installed packages: by their content, wherever they lie.
"""

import inspect
import json
import sysconfig
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from src.errors import InputError
from src.files import sha256_file

STANDARD = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib")]
INSTALLED = {"site-packages", "dist-packages"}


def is_own(kind: type) -> bool:
    """Whether a class is a user's."""
    return kind.__module__.partition(".")[0] != "src"


def own_sources(kind: type) -> list[str]:
    """SHA-256 of each file that a user's class is written in; none where its code is in no file (a notebook)."""
    files = [(base, _file(base)) for base in kind.__mro__ if is_own(base)]
    if not files or files[0][1] is None:
        return []
    counted = [file for base, file in files if file is not None and (base is kind or not _installed(file))]
    return [sha256_file(file) for file in dict.fromkeys(counted)]


def _file(kind: type) -> Path | None:
    try:
        name = inspect.getsourcefile(kind)
    except (OSError, TypeError):  # of a prompt, and of what is written in C
        return None
    return Path(name).resolve() if name is not None and Path(name).is_file() else None


def _installed(file: Path) -> bool:
    return bool(INSTALLED & set(file.parts)) or any(file.is_relative_to(place) for place in STANDARD)


def with_sources(value: Any) -> Any:
    """Plain settings, in which every user's class that a ``class_path`` names has its sources beside it.

    Raises:
        InputError: such a class is not at the top of a module that commands can import, in a file.
    """
    if isinstance(value, list):
        return [with_sources(one) for one in value]
    if not isinstance(value, Mapping):
        return value
    found = {key: with_sources(one) for key, one in value.items()}
    path = value.get("class_path")
    # A bare name is that of a class of this project.
    if isinstance(path, str) and "." in path and not path.startswith("src."):
        found["source"] = _named_sources(path)
    return found


def _named_sources(path: str) -> list[str]:
    module, _, name = path.rpartition(".")
    try:
        kind = getattr(import_module(module), name, None)
    except ImportError as error:
        raise InputError(
            f"{path}: its module cannot be imported ({error}); expected one here or on PYTHONPATH"
        ) from None
    sources = own_sources(kind) if isinstance(kind, type) and module != "__main__" else []
    if not sources:
        expected = "expected a class at the top of a module in a file, such as mymerge.py"
        raise InputError(f"{path}: a study cannot know or import its source; {expected}")
    return sources


def named_options(kind: type) -> dict[str, inspect.Parameter]:
    """The options that a method or a judge is made with.

    Raises:
        InputError: it takes some that have no name (``**options``): what they are is kept nowhere.
    """
    if kind.__init__ is object.__init__:  # type: ignore[misc]
        return {}
    found = dict(list(inspect.signature(kind.__init__).parameters.items())[1:])  # type: ignore[misc]
    for name, parameter in found.items():
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            stars = "**" if parameter.kind is parameter.VAR_KEYWORD else "*"
            raise InputError(f"{kind.__name__}: its __init__ takes {stars}{name}; expected every option by its name")
    return found


UNDERSCORE = ", or a name with a leading underscore for what is no option"


def check_json(values: Mapping[str, Any], whose: str, expected: str = "") -> None:
    """Stop at a value that is kept in JSON and cannot be.

    Args:
        values: Attributes or findings, by name.
        whose: What they are, for messages.
        expected: What they may be beside plain values.

    Raises:
        InputError: one is a tensor or another object.
    """
    for name, value in values.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            kind = type(value).__name__
            plain = f"expected numbers, texts, lists or mappings of them{expected}"
            raise InputError(f"{whose} {name} ({kind}) cannot be written as JSON; {plain}") from None
