"""An update limited in rank, and the share of its energy (squared Frobenius norm) that is kept.

* Factors: QR of both and one small SVD: exact, O((O + I) r²).
* Full rank to a given rank: block Krylov iteration from random vectors (1504.05477). Kept energy is measured, never
  estimated; iteration ends when one more round adds less than ``TOLERANCE`` of it.
* Full rank to a given share of energy: eigenvectors of the smaller Gram matrix, exact, O(min(O, I)³).

Legend of shapes: O output features, I input features, K kept rank, S = K + oversampling.
"""

from dataclasses import dataclass

import torch

from src.adapters.deltas import Delta, DenseDelta, matrix, squared_norm
from src.adapters.pairs import LowRankPair

OVERSAMPLING = 10
TOLERANCE = 1e-4
MOST_ROUNDS = 12
SEED = 0


@dataclass(frozen=True)
class Truncated:
    """A rank-limited update, its energy, and that of the update it stands for."""

    pair: LowRankPair
    kept: float
    total: float


def truncate(delta: Delta, *, rank: int | None, energy: float | None) -> Truncated:
    """The best update of at most this rank, or of the smallest rank that keeps this share of energy.

    Args:
        delta: The update.
        rank: Largest rank, at least 1; or
        energy: Share of energy to keep, above 0 to 1.
    """
    if isinstance(delta, LowRankPair):
        left, values, right = singular_triplets(delta)
        return _cut(left, values, right, values.square().sum().item(), rank, energy)
    dense = matrix(delta)
    total = squared_norm(DenseDelta(dense))
    if total == 0.0:
        return Truncated(_zero(dense.shape[0], dense.shape[1]), 0.0, 0.0)
    if rank is not None and rank + OVERSAMPLING < min(dense.shape) // 2:
        left, values, right = _block_krylov(dense, rank)
        return _cut(left, values, right, total, rank, None)
    left, values, right = _by_gram(dense)
    return _cut(left, values, right, total, rank, energy)


def singular_triplets(pair: LowRankPair) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U (O, r), σ (r), V (I, r) of ``b a``, float64, by QR of both factors and one small SVD."""
    qb, rb = torch.linalg.qr(pair.b.double())
    qa, ra = torch.linalg.qr(pair.a.double().T)
    left, values, right = torch.linalg.svd(rb @ ra.T, full_matrices=False)
    return qb @ left, values, qa @ right.T


def from_triplets(left: torch.Tensor, values: torch.Tensor, right: torch.Tensor) -> LowRankPair:
    """``U diag(σ) Vᵀ`` with the singular values shared evenly between both factors."""
    root = values.clamp(min=0).sqrt()
    return LowRankPair((right * root).T.contiguous(), left * root)


def _zero(rows: int, columns: int) -> LowRankPair:
    return LowRankPair(torch.zeros(1, columns), torch.zeros(rows, 1))


def _cut(
    left: torch.Tensor,
    values: torch.Tensor,
    right: torch.Tensor,
    total: float,
    rank: int | None,
    energy: float | None,
) -> Truncated:
    energies = values.double().square()
    if energy is None:
        count = min(rank or len(values), len(values))
    else:
        # The last digits of a sum must not add a direction.
        short = energies.cumsum(0) < energy * total * (1 - 1e-12)
        count = min(int(short.sum()) + 1, len(values))
    nonzero = int((values > 1e-12 * values[:1]).sum())
    count = max(1, min(count, nonzero))
    pair = from_triplets(left[:, :count], values[:count], right[:, :count])
    return Truncated(pair, energies[:count].sum().item(), total)


def _block_krylov(dense: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(SEED)
    block = dense @ torch.randn(dense.shape[1], rank + OVERSAMPLING, generator=draw).to(dense.dtype)
    basis = torch.linalg.qr(block.double()).Q
    images = dense.T @ basis.to(dense.dtype)
    before = 0.0
    for _ in range(MOST_ROUNDS):
        q, r = torch.linalg.qr(images.double())
        small_left, values, small_right = torch.linalg.svd(r.T)
        kept = values[:rank].square().sum().item()
        full = basis.shape[1] + rank + OVERSAMPLING > min(dense.shape)
        if kept - before <= TOLERANCE * kept or full:
            break
        before = kept
        newest = torch.linalg.qr(images[:, -(rank + OVERSAMPLING) :]).Q
        block = _beside(basis, (dense @ newest).double())
        basis = torch.cat([basis, block], dim=1)
        images = torch.cat([images, dense.T @ block.to(dense.dtype)], dim=1)
    return basis @ small_left, values, q @ small_right.T


def _beside(basis: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """Orthonormal columns for what of ``block`` lies outside ``basis``; twice, as one pass leaves rounding errors."""
    for _ in range(2):
        block = torch.linalg.qr(block - basis @ (basis.T @ block)).Q
    return block


def _by_gram(dense: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    wide = dense.double() if dense.shape[0] <= dense.shape[1] else dense.double().T
    _, vectors = torch.linalg.eigh(wide @ wide.T)
    left = vectors.flip(1)
    projected = left.T @ wide
    values = projected.norm(dim=1)
    right = (projected / values.clamp(min=torch.finfo(torch.float64).tiny)[:, None]).T
    return (left, values, right) if wide.shape == dense.shape else (right, values, left)
