"""Overlap of F_s and F_u: do safety and utility data care about the same directions of the core space?

    cos θ_i = σ_i(E_sᵀ E_u)     E: (D, m) orthonormal eigenvectors of the m largest eigenvalues

Angles of 0° are shared directions; two random m-dimensional spaces share the mean cos²θ = m/D. Low-rank matrices
F = GᵀG go by Gram matrices, with E = Gᵀ W Λ^(−½) for G Gᵀ = W Λ Wᵀ; the others module by module, where blocks of
different modules are orthogonal. Beside them stands Spearman's rank correlation of both diagonals, ties by mean ranks.

Where eigenvalues are equal at the cut, the eigenvectors in it are an arbitrary choice among them.
"""

from typing import Any

import torch
from scipy.stats import rankdata

from src.fisher.base import Fisher, ModuleFisher
from src.fisher.diagonal import DiagonalFisher
from src.fisher.kronecker import KroneckerFisher
from src.fisher.lowrank import LowRankFisher
from src.gevp.pencil import common_shapes
from src.gevp.stack import ScoreStack

DIRECTIONS = 16
"""Most leading directions of each matrix that are compared."""
ROUNDING = 1e-10
"""Eigenvalues under this share of the largest are rounding, no directions."""

Pairs = tuple[torch.Tensor, torch.Tensor]


def overlap(safety: Fisher, utility: Fisher, directions: int = DIRECTIONS) -> dict[str, Any] | None:
    """Principal angles of leading eigenspaces and Spearman's correlation of diagonals; None where a matrix is zero.

    Args:
        safety: F_s.
        utility: F_u, over the same coordinates.
        directions: Largest m; fewer where a matrix has a lower rank.

    Returns:
        ``directions`` m, ``angles`` in degrees (m, ascending), ``shared`` = mean cos²θ, ``chance`` = m/D, ``spearman``
        (None where a diagonal is constant).

    Raises:
        ValueError: dimensions, modules or representations differ.
    """
    if safety.dim != utility.dim or safety.representation != utility.representation:
        found = [(f.representation, f.dim) for f in (safety, utility)]
        raise ValueError(f"F_s and F_u are {found}; expected one representation over the same coordinates")
    if isinstance(safety, LowRankFisher) and isinstance(utility, LowRankFisher):
        product = _lowrank_product(safety, utility, directions)
    elif isinstance(safety, ModuleFisher) and isinstance(utility, ModuleFisher):
        product = _module_product(safety, utility, directions)
    else:
        raise ValueError(f"representation {safety.representation}: expected a known one")
    m = min(product.shape)
    if m == 0:
        return None
    # With ranks under the number asked for, the smaller space is compared with a larger one.
    cosines = torch.linalg.svdvals(product).clamp(0.0, 1.0)
    return {
        "directions": m,
        "angles": cosines.acos().rad2deg().tolist(),
        "shared": cosines.square().mean().item(),
        "chance": max(product.shape) / safety.dim,
        "spearman": spearman(safety.diagonal(), utility.diagonal()),
    }


def spearman(one: torch.Tensor, two: torch.Tensor) -> float | None:
    """Rank correlation of two vectors (D,), −1 to 1; None where one of them is constant."""
    ranks = [torch.from_numpy(rankdata(vector.numpy())) for vector in (one, two)]
    a, b = (rank - rank.mean() for rank in ranks)
    norm = (a.norm() * b.norm()).item()
    return (a @ b).item() / norm if norm > 0 else None


def _lowrank_product(safety: LowRankFisher, utility: LowRankFisher, directions: int) -> torch.Tensor:
    """E_sᵀE_u of both spans through one Gram matrix of all scores."""
    gram = ScoreStack([safety, utility], [1.0, 1.0]).gram()
    n = safety.height
    values_s, left = _leading(gram[:n, :n], directions)
    values_u, right = _leading(gram[n:, n:], directions)
    return (left / values_s.sqrt()).T @ gram[:n, n:] @ (right / values_u.sqrt())


def _module_product(safety: ModuleFisher, utility: ModuleFisher, directions: int) -> torch.Tensor:
    """E_sᵀE_u where every eigenvector lies within a module."""
    shapes = common_shapes(safety, utility)
    sides = [{name: _module_leading(fisher, name, directions) for name in shapes} for fisher in (safety, utility)]
    kept = [_largest(side, directions) for side in sides]
    parts = [kept[0][name].T @ kept[1][name] for name in shapes]
    return torch.block_diag(*parts)


def _largest(pairs: dict[str, Pairs], directions: int) -> dict[str, torch.Tensor]:
    """Eigenvectors (p·q, k) of each module that belong to the largest eigenvalues of all modules."""
    values = torch.cat([value for value, _ in pairs.values()])
    chosen = torch.zeros(len(values), dtype=torch.bool)
    chosen[values.argsort(descending=True, stable=True)[:directions]] = True
    chosen &= values > ROUNDING * values.max().clamp_min(0.0)
    flags = chosen.split([len(value) for value, _ in pairs.values()])
    return {name: vectors[:, flag] for (name, (_, vectors)), flag in zip(pairs.items(), flags, strict=True)}


def _module_leading(fisher: ModuleFisher, name: str, directions: int) -> Pairs:
    """Largest eigenvalues (k,) of a module's block and their eigenvectors (p·q, k)."""
    if isinstance(fisher, DiagonalFisher):
        entries = fisher.module_diagonal(name)
        values, where = entries.topk(min(directions, len(entries)))
        vectors = torch.zeros(len(entries), len(values), dtype=torch.float64)
        vectors[where, torch.arange(len(values))] = 1.0
        return values, vectors
    if isinstance(fisher, KroneckerFisher):
        (alpha, a), (beta, b) = (torch.linalg.eigh(factor) for factor in fisher.factors(name))
        products = torch.outer(alpha, beta).flatten()
        values, where = products.topk(min(directions, len(products)))
        first, second = where // len(beta), where % len(beta)
        return values, (a[:, None, first] * b[None, :, second]).flatten(0, 1)
    block = fisher.module_block(name)
    values, vectors = torch.linalg.eigh((block + block.T) / 2)
    return values.flip(0)[:directions], vectors.flip(1)[:, :directions]


def _leading(matrix: torch.Tensor, directions: int) -> Pairs:
    """Largest eigenvalues above rounding and their eigenvectors (N, k)."""
    values, vectors = torch.linalg.eigh(matrix)
    values, vectors = values.flip(0)[:directions], vectors.flip(1)[:, :directions]
    kept = values > ROUNDING * values[0].clamp_min(0.0)
    return values[kept], vectors[:, kept]
