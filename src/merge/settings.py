"""A method's settings: read for the manifest, and changed one at a time for a sweep."""

from typing import Any, TypeVar, get_args, get_type_hints

from src.errors import InputError
from src.merge.base import MergeMethod
from src.own_classes import UNDERSCORE, check_json, named_options

Method = TypeVar("Method", bound=MergeMethod)


def settings(method: MergeMethod) -> dict[str, Any]:
    """The options with which a method was made, nested methods as ``{method, settings}``.

    Raises:
        InputError: an attribute has no form in JSON.
    """
    found = {
        key: {"method": value.name, "settings": settings(value)} if isinstance(value, MergeMethod) else value
        for key, value in vars(method).items()
        if not key.startswith("_")
    }
    check_json(found, f"method {type(method).__name__}: its attribute", UNDERSCORE)
    return found


def with_option(method: Method, option: str, value: Any, *, prefix: str = "sweep.") -> Method:
    """The same method with one option changed; ``inner.NAME`` is an option of the method in its option ``inner``.

    Args:
        method: The method.
        option: Name of the option.
        value: Its new value; a number is checked against the option's type, and a whole one becomes an integer where
            the option takes integers. An option without a type takes it as it is.
        prefix: What stands before the option's name in messages.

    Raises:
        InputError: it has no such option, or one that takes no such number, or the value is out of range; or the
            method does not keep an option under its name.
    """
    if option == "alpha":
        raise InputError("sweep.alpha: strengths are a list of their own: --alpha '[0.5, 1.0]'")
    names = named_options(type(method))
    head, dot, rest = option.partition(".")
    for name in names:
        if not hasattr(method, name):
            where = f"{prefix}{option}: {type(method).__name__}"
            raise InputError(f"{where} keeps no {name}; expected self.{name} = {name} in its __init__")
    given = {name: getattr(method, name) for name in names}
    if head not in names or (dot and not isinstance(given[head], MergeMethod)):
        expected = ", ".join(names) or "none (the method has no options)"
        raise InputError(f"{prefix}{option}: {type(method).__name__} has no such option; expected one of {expected}")
    if dot:
        changed = with_option(given[head], rest, value, prefix=f"{prefix}{head}.")
        return type(method)(**given | {head: changed})
    if isinstance(value, int | float) and not isinstance(value, bool):
        annotation = get_type_hints(type(method).__init__).get(option, Any)
        value = _number(value, annotation, f"{prefix}{option}")
    return type(method)(**given | {option: value})


def _number(value: float, annotation: Any, key: str) -> float:
    """The number as an option of this type takes it: ``int`` and ``int | None`` as an integer, ``float`` as it is."""
    # Of a closed set (Literal) these are its values, none of which is a type.
    types = get_args(annotation) or (annotation,)
    if float in types or annotation is Any:
        return value
    if int not in types:
        raise InputError(f"{key} is {value}; the option takes no numbers, and a sweep is a list of numbers")
    if not float(value).is_integer():
        raise InputError(f"{key} is {value}; expected a whole number")
    return int(value)
