"""A method's settings: read for the manifest, and changed one at a time for a sweep."""

import inspect
from typing import Any, TypeVar

from src.errors import InputError
from src.merge.base import MergeMethod

Method = TypeVar("Method", bound=MergeMethod)


def settings(method: MergeMethod) -> dict[str, Any]:
    """The options with which a method was made, nested methods as ``{method, settings}``."""
    found = {key: value for key, value in vars(method).items() if not key.startswith("_")}
    return {
        key: {"method": value.name, "settings": settings(value)} if isinstance(value, MergeMethod) else value
        for key, value in found.items()
    }


def with_option(method: Method, option: str, value: Any) -> Method:
    """The same method with one option changed.

    Raises:
        InputError: it has no such option, or the value is out of range.
    """
    names = list(inspect.signature(type(method).__init__).parameters)[1:]
    if option not in names:
        expected = ", ".join(names) or "none (the method has no options)"
        raise InputError(f"sweep.{option}: {type(method).__name__} has no such option; expected one of {expected}")
    given = {name: getattr(method, name) for name in names}
    if isinstance(given[option], int) and not isinstance(given[option], bool) and float(value).is_integer():
        value = int(value)
    return type(method)(**given | {option: value})
