"""The settings of SST-Merge that exclude or need each other."""

from typing import Literal

from src.errors import InputError
from src.merge.ranges import above_zero

FilterName = Literal["soft", "topk", "energy", "threshold"]
Control = Literal["none", "random", "safety_only", "utility_only", "swapped"]
Coefficients = Literal["filter", "relearn"]
Ridge = Literal["identity", "kronecker"]


def unread_options(
    filter: FilterName, coefficients: Coefficients, ridge: Ridge, control: Control = "none"
) -> dict[str, str]:
    """Options that nothing reads under these settings, and with what they are read."""
    relearn = coefficients == "relearn"
    read = {
        "t": (relearn or filter in ("soft", "threshold"), "filter soft or threshold, or coefficients relearn"),
        "rho": (not relearn, "coefficients filter"),
        "trust": (relearn, "coefficients relearn"),
        "radius": (relearn, "coefficients relearn"),
        "damping": (ridge == "kronecker", "ridge kronecker"),
        "seed": (control == "random", "control random"),
        "eigenpairs": (filter != "soft", "filter topk, energy or threshold"),
        "holdout_seed": (not relearn, "coefficients filter"),
    }
    return {option: where for option, (is_read, where) in read.items() if not is_read}


def check_numbers(rho: float, rho_s: float, t: float, trust: float, radius: float) -> None:
    """Check the ridges and rates.

    Raises:
        InputError: one is out of range.
    """
    above_zero(rho, "method.rho")
    above_zero(radius, "method.radius")
    for key, value in (("rho_s", rho_s), ("t", t), ("trust", trust)):
        if not 0 <= value < float("inf"):
            raise InputError(f"method.{key} is {value}; expected a number of at least 0")


def check_filter(filter: FilterName, k: int | None, share: float | None) -> None:
    """Check that each filter has its own setting and no other's.

    Raises:
        InputError: it has not.
    """
    for option, value, needs in (("k", k, "topk"), ("share", share, "energy")):
        if value is None and filter == needs:
            raise InputError(f"method.filter is {filter!r}, which needs method.{option}")
        if value is not None and filter != needs:
            raise InputError(f"method.{option} is {value} with filter {filter!r}, which takes none; {needs} does")
    if k is not None and k < 1:
        raise InputError(f"method.k is {k}; expected at least 1")
    if share is not None and not 0 < share <= 1:
        raise InputError(f"method.share is {share}; expected a number above 0 and at most 1")


def check_ridge(ridge: Ridge, damping: float, coefficients: Coefficients, control: Control) -> None:
    """Check the form of the ridge.

    Raises:
        InputError: it is one of Kronecker form where there is none, or its damping is out of range.
    """
    above_zero(damping, "method.damping")
    if ridge == "kronecker" and (coefficients != "relearn" or control == "safety_only"):
        raise InputError(
            f"method.ridge is 'kronecker' with coefficients {coefficients!r} and control {control!r}; expected "
            "relearn, and control none or utility_only: this ridge is made of benign rows"
        )


def check_together(filter: FilterName, control: Control, coefficients: Coefficients, rho_s: float) -> None:
    """Check that filter, control and coefficients go together.

    Raises:
        InputError: they do not.
    """
    if control == "random" and filter == "soft":
        raise InputError("method.control is 'random' with filter 'soft'; expected topk, energy or threshold")
    if coefficients == "relearn" and (filter != "soft" or control in ("random", "swapped") or rho_s == 0):
        raise InputError(
            f"method.coefficients is 'relearn' with filter {filter!r}, control {control!r} and rho_s {rho_s}; "
            "expected filter soft, control none, safety_only or utility_only, and rho_s above 0: nothing is filtered"
        )
