"""What re-learned coefficients work on, from the passes of a run with mean scores: of all rows, and of their halves."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from src.adapters.basis import CoreBasis
from src.errors import InputError
from src.fisher.base import Fisher, weighted_mean
from src.merge.base import PatchedFisher
from src.merge.fisher_passes import Pass

LEAST = 2
"""Least examples of a half that a step is fitted to or judged by."""


def mean_fisher(passes: Sequence[Pass], of: Callable[[Pass], Fisher] = lambda one: one.file.fisher) -> Fisher:
    """The weighted mean of the Fisher matrices of several passes.

    Args:
        passes: The passes, with their weights.
        of: The matrix of a pass.

    Raises:
        InputError: they have none: dimensions, modules or representations differ.
    """
    try:
        return weighted_mean([of(one) for one in passes], [one.weight for one in passes])
    except ValueError as error:
        raise InputError(f"{passes[-1].path}: {error}") from None


def patched(basis: CoreBasis, safety: Pass, utilities: Sequence[Pass], benign: Sequence[Pass]) -> PatchedFisher:
    """Fisher matrices and mean scores.

    Args:
        basis: Their coordinates.
        safety: The ``safety`` pass.
        utilities: ``utility`` passes, F_u being their weighted mean.
        benign: ``benign`` passes, likewise.

    Raises:
        InputError: a file holds no mean scores, or the passes have no mean.
    """
    whole = _patched(basis, safety, utilities, benign, lambda one: one.file.fisher, lambda one: one.mean_scores())
    halves = {id(one): one.file.fisher.row_halves() for one in (safety, *utilities, *benign)}
    counts = [0 if pair is None else min(half.count for half in pair) for pair in halves.values()]
    if min(counts) < LEAST or any(one.file.half_means is None for one in (safety, *benign)):
        return whole
    one, two = (
        _patched(
            basis,
            safety,
            utilities,
            benign,
            lambda found, i=i: halves[id(found)][i],  # type: ignore[misc, index]
            lambda found, i=i: found.file.half_means[i],  # type: ignore[misc, index]
        )
        for i in range(2)
    )
    return replace(whole, halves=(one, two))


def _patched(
    basis: CoreBasis,
    safety: Pass,
    utilities: Sequence[Pass],
    benign: Sequence[Pass],
    fisher: Callable[[Pass], Fisher],
    mean: Callable[[Pass], torch.Tensor],
) -> PatchedFisher:
    shares = torch.tensor([one.weight for one in benign], dtype=torch.float64)
    return PatchedFisher(
        fisher(safety),
        mean_fisher(utilities, fisher),
        basis,
        benign=mean_fisher(benign, fisher),
        safety_mean=mean(safety),
        benign_mean=shares @ torch.stack([mean(one) for one in benign]) / shares.sum(),
    )
