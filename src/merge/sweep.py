"""The points of a merge: every strength, and every value of the swept options, each with a directory of its own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from src.errors import InputError
from src.merge.base import MergeMethod
from src.merge.combination import Combination
from src.merge.settings import with_option

COMBINE = "combine."


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
        InputError: an option is unknown, a value out of range, or a list empty or with equal values.
    """
    for option, values in (sweep or {}).items():
        if not values or len(set(values)) < len(values):
            raise InputError(f"sweep.{option} is {list(values)}; expected different values")
    points = product(*(sweep or {}).values())
    return [_variant(method, combine, dict(zip(sweep or {}, point, strict=True))) for point in points]


def _variant(method: MergeMethod | None, combine: Combination, point: Mapping[str, float]) -> Variant:
    folder = Path()
    for option, value in point.items():
        folder /= f"{option}-{value:g}"
        if option.startswith(COMBINE):
            combine = with_option(combine, option.removeprefix(COMBINE), value)
        elif method is None:
            raise InputError(f"sweep.{option}: no method is given; {COMBINE}{option} sweeps the combination")
        else:
            method = with_option(method, option, value)
    return Variant(", ".join(f"{option} = {value:g}" for option, value in point.items()), folder, method, combine)
