"""Ranges of settings: each check gives the value back, or says in one line what was expected."""

from math import isfinite

from src.errors import InputError


def finite(value: float, key: str) -> float:
    """Check that a setting is a finite number.

    Raises:
        InputError: it is not.
    """
    if not isfinite(value):
        raise InputError(f"{key} is {value}; expected a finite number")
    return value


def above_zero(value: float, key: str) -> float:
    """Check that a setting is a finite number above 0.

    Raises:
        InputError: it is not.
    """
    if not 0 < value < float("inf"):
        raise InputError(f"{key} is {value}; expected a number above 0, finite")
    return value


def share(value: float, key: str, *, zero: bool = False) -> float:
    """Check that a setting is a share: above 0 (or at least 0) and at most 1.

    Raises:
        InputError: it is not.
    """
    if not (0 <= value <= 1 if zero else 0 < value <= 1):
        raise InputError(f"{key} is {value}; expected a number {'from' if zero else 'above'} 0 to 1")
    return value
