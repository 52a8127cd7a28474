"""Settings as plain values, as they reach the commands.

What is left at its default is left out, so a new option of a command changes no key.
"""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from src.data.row_source import find_file, read_yaml
from src.errors import InputError
from src.merge.base import MergeMethod
from src.metrics.judging import Judge
from src.models.base import BaseSpec
from src.own_classes import named_options


def plain(value: Any) -> Any:
    """Plain values of settings: methods and judges as ``class_path`` and ``init_args``, without what is default.

    Raises:
        InputError: a method or a judge does not keep an option.
    """
    if isinstance(value, MergeMethod | Judge):
        return _plain_object(value)
    if is_dataclass(value) and not isinstance(value, type):
        given = {f.name: getattr(value, f.name) for f in fields(value)}
        defaults = {
            f.name: f.default_factory() if f.default_factory is not MISSING else f.default for f in fields(value)
        }
        return {key: plain(one) for key, one in given.items() if one is not None and one != defaults[key]}
    if isinstance(value, Mapping):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(one) for one in value]
    return value


def _plain_object(value: Any) -> dict[str, Any]:
    kind = type(value)
    found = {}
    for name, parameter in named_options(kind).items():
        # Judges keep apart, with an underscore, what only says how they are run. An option that is kept nowhere would
        # be left out of the key.
        attribute = next((key for key in (name, f"_{name}") if hasattr(value, key)), None)
        if attribute is None:
            raise InputError(f"{kind.__name__} keeps no {name}; expected self.{name} = {name} in its __init__")
        given = getattr(value, attribute)
        if given != parameter.default:
            found[name] = plain(given)
    spec = {"class_path": f"{kind.__module__}.{kind.__name__}"}
    return spec | ({"init_args": found} if found else {})


def plain_base(base: BaseSpec) -> dict[str, Any]:
    """The base model, always with its name and number format."""
    return {"name": base.name, "dtype": base.dtype} | plain(base)


def layered(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """``upper`` over ``lower``, mapping by mapping; lists are replaced."""
    found = dict(lower)
    for key, value in upper.items():
        both = isinstance(value, Mapping) and isinstance(found.get(key), Mapping)
        found[key] = layered(found[key], value) if both else value
    return found


def at_path(path: str, value: Any) -> dict[str, Any]:
    """``{a: {b: value}}`` for ``a.b``."""
    head, dot, rest = path.partition(".")
    return {head: at_path(rest, value) if dot else value}


def read_config(name: str) -> dict[str, Any]:
    """A command's YAML, found as on the command line, without its output.

    Raises:
        InputError: there is no such file, or it holds no mapping.
    """
    path = find_file(name, "configs")
    if path is None:
        raise InputError(f"{name}: no such file here or under configs/")
    return {key: value for key, value in read_yaml(path).items() if key not in ("output", "overwrite")}
