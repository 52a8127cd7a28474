"""Sizes and angles of updates; of low-rank ones from their factors alone.

    ⟨B₁A₁, B₂A₂⟩ = tr((B₁ᵀB₂)(A₂A₁ᵀ))

Legend of shapes: O output features, I input features, R rank.
"""

from collections.abc import Mapping, Sequence

import torch

from src.adapters.deltas import Delta, row_blocks
from src.adapters.pairs import LowRankPair
from src.adapters.truncate import singular_triplets

RANK_TOLERANCE = 1e-6


def inner(one: LowRankPair, two: LowRankPair) -> float:
    """Frobenius inner product of two updates of equal shape."""
    left = one.b.double().T @ two.b.double()
    right = one.a.double() @ two.a.double().T
    return (left * right).sum().item()


def cosine(one: Delta, two: Delta) -> float:
    """Cosine between two updates; 0 where one of them is zero."""
    if isinstance(one, LowRankPair) and isinstance(two, LowRankPair):
        product, first, second = inner(one, two), one.squared_norm(), two.squared_norm()
    else:
        product = first = second = 0.0
        for rows in row_blocks(one.shape):
            x, y = one.block(rows).double(), two.block(rows).double()
            product += (x * y).sum().item()
            first += x.square().sum().item()
            second += y.square().sum().item()
    norms = (first * second) ** 0.5
    return product / norms if norms > 0 else 0.0


def whole_cosine(one: Mapping[str, LowRankPair], two: Mapping[str, LowRankPair]) -> float:
    """Cosine between two adapters as one vector each; a module that one of them lacks counts in the norms only."""
    product = sum(inner(one[name], two[name]) for name in one if name in two)
    norms = sum(p.squared_norm() for p in one.values()) * sum(p.squared_norm() for p in two.values())
    return product / norms**0.5 if norms > 0 else 0.0


def spaces(pair: LowRankPair) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U (O, R), σ (R), V (I, R) of the directions with non-zero singular values."""
    left, values, right = singular_triplets(pair)
    kept = int((values > RANK_TOLERANCE * values[0]).sum()) if len(values) and values[0] > 0 else 0
    return left[:, :kept], values[:kept], right[:, :kept]


def principal_cosines(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
    """(min(R₁, R₂),) cosines of the principal angles between the spans of orthonormal columns, descending."""
    return torch.linalg.svdvals(one.T @ two).clamp(max=1.0)


def orthonormal(columns: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Left singular vectors (O, R) and values (R) of stacked columns, without those that vanish."""
    stacked = torch.cat([column.double() for column in columns], dim=1)
    q, r = torch.linalg.qr(stacked)
    left, values, _ = torch.linalg.svd(r, full_matrices=False)
    kept = int((values > RANK_TOLERANCE * values[0]).sum()) if len(values) and values[0] > 0 else 0
    return q @ left[:, :kept], values[:kept]
