"""Settings of a Fisher measurement that contradict each other, refused before anything is read."""

import logging
import math
from collections.abc import Collection, Sequence

from src.errors import InputError
from src.fisher.base import Representation
from src.fisher.scores import Granularity
from src.models.fisher_pass import Coordinates

log = logging.getLogger(__name__)

IN_WEIGHTS = ("kronecker", "diagonal", "magnitude")
"""Representations that exist in weight coordinates."""


def check_settings(
    labels: Collection[str],
    draws: int,
    representation: Representation,
    coordinates: Coordinates,
    granularity: Granularity,
    shard_rows: int,
    *,
    relearn: bool,
) -> None:
    """Stop where settings contradict each other or are out of range.

    Scores of tokens are only warned of: both Fisher matrices serve without the mean scores, which are of rows.
    """
    if draws < 1 or (draws > 1 and "model" not in labels):
        given = ", ".join(dict.fromkeys(labels))
        raise InputError(f"model.draws is {draws} with labels {given}; expected 1, or more with labels model")
    if coordinates == "weight" and representation not in IN_WEIGHTS:
        expected = " or ".join(IN_WEIGHTS)
        raise InputError(f"model.representation {representation} has no weight coordinates; expected {expected}")
    if coordinates == "core" and representation == "magnitude":
        raise InputError("model.representation magnitude has no core coordinates; pass --model.coordinates weight")
    if relearn and coordinates == "weight":
        raise InputError("model.relearn: re-learned coefficients are of cores; expected model.coordinates core")
    if relearn and "random_tokens" in labels:
        raise InputError("model.relearn: rows of random tokens have no answers to learn; expected labels model or data")
    if shard_rows < 1:
        raise InputError(f"model.shard_rows is {shard_rows}; expected at least 1")
    if relearn and granularity == "token":
        log.warning(
            "model.relearn: no merge re-learns coefficients with scores of tokens; expected granularity sequence"
        )


def check_utility(utility: Sequence[str], weights: Sequence[float] | None) -> list[float]:
    """Weight of each utility adapter.

    Raises:
        InputError: there is no adapter, or there are not as many weights, or one is not finite.
    """
    if not utility:
        raise InputError("model.utility names no adapter; expected a directory or hub id, or several")
    given = list(weights or [1.0] * len(utility))
    if len(given) != len(utility) or not all(map(math.isfinite, given)):
        raise InputError(f"model.utility_weights is {given}; expected {len(utility)} finite numbers, one an adapter")
    return given
