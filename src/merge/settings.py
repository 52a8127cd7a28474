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
    """The same method with one option changed; ``inner.NAME`` is an option of the method in its option ``inner``.

    Raises:
        InputError: it has no such option, or the value is out of range.
    """
    if option == "alpha":
        raise InputError("sweep.alpha: strengths are a list of their own: --alpha '[0.5, 1.0]'")
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = list(inspect.signature(type(method).__init__).parameters.values())[1:]
    names = [parameter.name for parameter in parameters if parameter.kind in kinds]
    head, dot, rest = option.partition(".")
    given = {name: getattr(method, name) for name in names}
    if head not in names or (dot and not isinstance(given[head], MergeMethod)):
        expected = ", ".join(names) or "none (the method has no options)"
        raise InputError(f"sweep.{option}: {type(method).__name__} has no such option; expected one of {expected}")
    if dot:
        return type(method)(**given | {head: with_option(given[head], rest, value)})
    if isinstance(given[option], int) and not isinstance(given[option], bool) and float(value).is_integer():
        value = int(value)
    return type(method)(**given | {option: value})
