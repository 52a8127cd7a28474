"""A method's settings: read for the manifest, and changed one at a time for a sweep."""

import inspect
from typing import Any, TypeVar, get_args, get_type_hints

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


def with_option(method: Method, option: str, value: Any, *, prefix: str = "sweep.") -> Method:
    """The same method with one option changed; ``inner.NAME`` is an option of the method in its option ``inner``.

    Args:
        method: The method.
        option: Name of the option.
        value: Its new value; a number is checked against the option's type, and a whole one becomes an integer where
            the option takes integers.
        prefix: What stands before the option's name in messages.

    Raises:
        InputError: it has no such option, or one that takes no such number, or the value is out of range.
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
        raise InputError(f"{prefix}{option}: {type(method).__name__} has no such option; expected one of {expected}")
    if dot:
        changed = with_option(given[head], rest, value, prefix=f"{prefix}{head}.")
        return type(method)(**given | {head: changed})
    if isinstance(value, int | float) and not isinstance(value, bool):
        annotation = get_type_hints(type(method).__init__)[option]
        value = _number(value, annotation, f"{prefix}{option}")
    return type(method)(**given | {option: value})


def _number(value: float, annotation: Any, key: str) -> float:
    """The number as an option of this type takes it: ``int`` and ``int | None`` as an integer, ``float`` as it is."""
    # Of a closed set (Literal) these are its values, none of which is a type.
    types = get_args(annotation) or (annotation,)
    if float in types:
        return value
    if int not in types:
        raise InputError(f"{key} is {value}; the option takes no numbers, and a sweep is a list of numbers")
    if not float(value).is_integer():
        raise InputError(f"{key} is {value}; expected a whole number")
    return int(value)
