"""Sparsifiers of one update: by magnitude, at random, or at random by magnitude rank; and what makes up for the loss.

Elements of equal magnitude share one fate, so a result does not depend on how the update is stored: where the k-th
largest magnitude occurs several times, all of them are kept.
"""

from typing import Literal

import torch

from src.adapters.deltas import Delta, blocks, row_blocks
from src.merge.elementwise import Sparsifier
from src.merge.randomness import bernoulli, uniform
from src.merge.selection import at_least, keep_above, kept_count, kth_magnitude

Rescale = Literal["1/p", "l1", "none"]


def keep_largest(delta: Delta, density: float) -> Sparsifier:
    """Keep the ``int(density · numel)`` largest magnitudes of an update, one at least."""
    if density >= 1.0:
        return lambda block, _: block
    count = kept_count(density, delta.shape[0] * delta.shape[1])
    return above(kth_magnitude(lambda: blocks(delta), count))


def above(threshold: float) -> Sparsifier:
    """Keep magnitudes that reach a threshold."""
    return lambda block, _: keep_above(block, threshold)


def between(low: float, high: float) -> Sparsifier:
    """Keep magnitudes that reach ``low`` and stay below ``high``."""
    return lambda block, _: keep_above(block, low) * ~at_least(block, high)


def drop_at_random(delta: Delta, density: float, rescale: Rescale, seed: int, key: str, module: str) -> Sparsifier:
    """Keep each element with probability ``density`` (DARE)."""
    if density >= 1.0:
        return lambda block, _: block
    columns = delta.shape[1]

    def drop(block: torch.Tensor, rows: slice) -> torch.Tensor:
        return torch.where(bernoulli(density, seed, key, module, rows, columns), block, 0.0)

    return _rescaled(delta, drop, rescale, 1.0 / density)


def drop_by_rank(
    delta: Delta, density: float, epsilon: float, rescale: Rescale, seed: int, key: str, module: str
) -> Sparsifier:
    """Keep each element with a probability linear in its magnitude's rank in its row (DELLA).

    The smallest of a row is kept with probability density − ε, the largest with density + ε.
    """
    columns = delta.shape[1]

    def drop(block: torch.Tensor, rows: slice) -> torch.Tensor:
        probability = rank_probabilities(block, density, epsilon)
        kept = uniform(seed, key, module, rows, columns) < probability
        sparse = block * kept
        return sparse / probability.to(block.dtype) if rescale == "1/p" else sparse

    return _rescaled(delta, drop, rescale, 1.0)


def rank_probabilities(block: torch.Tensor, density: float, epsilon: float) -> torch.Tensor:
    """(rows, columns) keep probabilities, float64; a row of one element has the probability ``density``."""
    columns = block.shape[1]
    if columns == 1:
        return torch.full(block.shape, density, dtype=torch.float64)
    order = block.abs().argsort(dim=1, stable=True)
    ranks = torch.empty_like(order).scatter_(1, order, torch.arange(columns).expand_as(order))
    return density - epsilon + ranks.double() * (2 * epsilon / (columns - 1))


def _rescaled(delta: Delta, drop: Sparsifier, rescale: Rescale, factor: float) -> Sparsifier:
    if rescale == "none":
        return drop
    if rescale == "l1":
        factor = _l1_ratio(delta, drop)
    return drop if factor == 1.0 else lambda block, rows: drop(block, rows).mul_(factor)


def _l1_ratio(delta: Delta, drop: Sparsifier) -> float:
    """Sum of magnitudes before over after; 1 where nothing is left to scale."""
    before = after = 0.0
    for rows in row_blocks(delta.shape):
        block = delta.block(rows)
        before += block.abs().sum(dtype=torch.float64).item()
        after += drop(block, rows).abs().sum(dtype=torch.float64).item()
    return before / after if after > 0 else 1.0
