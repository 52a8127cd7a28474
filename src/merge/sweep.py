"""The points of a merge: every strength, and every value of the swept options, each with a directory of its own."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from src.errors import InputError
from src.merge.base import MergeMethod
from src.merge.combination import Combination
from src.merge.settings import Method, with_option

COMBINE = "combine."
_SWEPT_ONCE = re.compile(r"(?P<name>[^=]+), (?P<option>[\w.]+) = (?P<value>-?[\d.]+(?:e[+-]?\d+)?)")


@dataclass(frozen=True)
class Variant:
    """One choice of options.

    Attributes:
        label: What was swept, such as ``t = 3``; empty without a sweep.
        folder: Directory below the output.
        method: The safety method, or none.
        combine: The combination.
    """

    label: str
    folder: Path
    method: MergeMethod | None
    combine: Combination


def point_name(option: str, value: float) -> str:
    """Name of a point's directory: ``alpha-0.5``; different values have different names."""
    return f"{option}-{shortest(value)}"


def shortest(value: float) -> str:
    """A number in as few digits as tell it from others."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def swept_once(method: str) -> tuple[str, str, float] | None:
    """Name, option and value where a manifest lists a method under one swept value, such as ``SST soft, t = 3``."""
    found = _SWEPT_ONCE.fullmatch(method)
    return found and (found["name"], found["option"], float(found["value"]))


def strengths(alpha: list[float] | float) -> list[float]:
    """The strengths, checked.

    Raises:
        InputError: one is negative or not finite, two are equal, or there is none.
    """
    values = alpha if isinstance(alpha, list) else [alpha]
    for value in values:
        if not 0 <= value < float("inf"):
            raise InputError(f"alpha is {value}; expected a finite number of at least 0")
    if not values or len(set(values)) < len(values):
        raise InputError(f"alpha is {alpha}; expected one strength or several different ones")
    return values


def variants(
    method: MergeMethod | None, combine: Combination, sweep: Mapping[str, Sequence[float]] | None
) -> list[Variant]:
    """Every combination of swept values. ``combine.NAME`` sweeps an option of the combination.

    Raises:
        InputError: an option is unknown or takes no such number, a value is out of range, or a list is empty or has
            equal values.
    """
    for option, values in (sweep or {}).items():
        if not values or len(set(values)) < len(values):
            raise InputError(f"sweep.{option} is {list(values)}; expected different values")
    swept = dict(sweep or {})
    outer = {option: values for option, values in swept.items() if option.startswith(COMBINE)}
    inner = {option: values for option, values in swept.items() if option not in outer}
    found = []
    for one in _points(outer):
        # One object for all variants below it: what they share is computed once.
        chosen = _changed(combine, {option.removeprefix(COMBINE): value for option, value in one.items()}, COMBINE)
        for two in _points(inner):
            if method is None and two:
                raise InputError(f"sweep.{next(iter(two))}: no method is given; {COMBINE}NAME sweeps the combination")
            changed = None if method is None else _changed(method, two)
            found.append(_variant({**one, **two}, changed, chosen))
    return found


def _points(options: Mapping[str, Sequence[float]]) -> list[dict[str, float]]:
    return [dict(zip(options, values, strict=True)) for values in product(*options.values())]


def _changed(method: Method, options: Mapping[str, float], part: str = "") -> Method:
    for option, value in options.items():
        method = with_option(method, option, value, prefix=f"sweep.{part}")
    return method


def _variant(point: Mapping[str, float], method: MergeMethod | None, combine: Combination) -> Variant:
    folder = Path(*(point_name(option, value) for option, value in point.items()))
    return Variant(
        ", ".join(f"{option} = {shortest(value)}" for option, value in point.items()), folder, method, combine
    )
