"""Sizes and angles of updates; of low-rank ones from their factors alone.

    ⟨B₁A₁, B₂A₂⟩ = tr((B₁ᵀB₂)(A₂A₁ᵀ))

Legend of shapes: O output features, I input features, R rank.
"""

from collections.abc import Mapping, Sequence

import torch

from src.adapters.deltas import Delta, left_product, row_blocks, squared_norm
from src.adapters.pairs import LowRankPair
from src.adapters.truncate import singular_triplets, truncate

RANK_TOLERANCE = 1e-6


def inner(one: Delta, two: Delta) -> float:
    """Frobenius inner product of two updates of equal shape, in float64."""
    if isinstance(two, LowRankPair):
        one, two = two, one
    if isinstance(one, LowRankPair):
        return (left_product(one.b.double(), two) * one.a.double()).sum().item()
    rows = row_blocks(one.shape)
    return sum((one.block(each).double() * two.block(each).double()).sum().item() for each in rows)


def cosine(one: Delta, two: Delta) -> float:
    """Cosine between two updates; 0 where one of them is zero."""
    norms = (squared_norm(one) * squared_norm(two)) ** 0.5
    return inner(one, two) / norms if norms > 0 else 0.0


def whole_cosine(one: Mapping[str, Delta], two: Mapping[str, Delta]) -> float:
    """Cosine between two adapters as one vector each; a module that one of them lacks counts in the norms only."""
    product = sum(inner(one[name], two[name]) for name in one if name in two)
    norms = sum(map(squared_norm, one.values())) * sum(map(squared_norm, two.values()))
    return product / norms**0.5 if norms > 0 else 0.0


def spaces(pair: LowRankPair) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U (O, R), σ (R), V (I, R) of the directions with non-zero singular values."""
    left, values, right = singular_triplets(pair)
    kept = int((values > RANK_TOLERANCE * values[:1]).sum())
    return left[:, :kept], values[:kept], right[:, :kept]


def leading_spaces(delta: Delta, energy: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U (O, R), σ (R), V (I, R) of a low-rank update; of a full-rank one, of the fewest directions with this energy.

    A full-rank update reaches into every direction, so that its whole spaces say nothing.
    """
    return spaces(delta if isinstance(delta, LowRankPair) else truncate(delta, rank=None, energy=energy).pair)


def principal_cosines(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
    """(min(R₁, R₂),) cosines of the principal angles between the spans of orthonormal columns, descending."""
    return torch.linalg.svdvals(one.T @ two).clamp(max=1.0)


def principal_angles(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
    """(min(R₁, R₂),) principal angles between the spans of orthonormal columns, degrees, ascending."""
    return principal_cosines(one, two).acos().rad2deg()


def orthonormal(columns: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Left singular vectors (O, R) and values (R) of stacked columns, without those that vanish."""
    stacked = torch.cat([column.double() for column in columns], dim=1)
    q, r = torch.linalg.qr(stacked)
    left, values, _ = torch.linalg.svd(r, full_matrices=False)
    kept = int((values > RANK_TOLERANCE * values[:1]).sum())
    return q @ left[:, :kept], values[:kept]
