"""Settings of a Fisher measurement that contradict each other, refused before anything is read."""

from collections.abc import Collection

from src.errors import InputError
from src.fisher.base import Representation
from src.models.fisher_pass import Coordinates

IN_WEIGHTS = ("kronecker", "diagonal", "magnitude")
"""Representations that exist in weight coordinates."""


def check_draws(draws: int, labels: Collection[str]) -> None:
    """Check that several draws of labels are drawn at all.

    Raises:
        InputError: they are not.
    """
    if draws < 1 or (draws > 1 and "model" not in labels):
        given = ", ".join(dict.fromkeys(labels))
        raise InputError(f"model.draws is {draws} with labels {given}; expected 1, or more with labels model")


def check_representation(representation: Representation, coordinates: Coordinates) -> None:
    """Check that a representation exists in these coordinates.

    Raises:
        InputError: it does not.
    """
    if coordinates == "weight" and representation not in IN_WEIGHTS:
        expected = " or ".join(IN_WEIGHTS)
        raise InputError(f"model.representation {representation} has no weight coordinates; expected {expected}")
    if coordinates == "core" and representation == "magnitude":
        raise InputError("model.representation magnitude has no core coordinates; pass --model.coordinates weight")
