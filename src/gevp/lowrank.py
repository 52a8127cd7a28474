"""The pencil of two low-rank Fisher matrices, solved exactly through Gram matrices.

With the scaled scores stacked, ``S = [G_s/√n_s; G_u/√n_u]`` and ``S Sᵀ = Q Λ Qᵀ``, the columns of ``Z = Sᵀ Q Λ^(-1/2)``
are an orthonormal basis of everything that the data have seen, and

    Zᵀ F_s Z = Λ^½ Q_sᵀ Q_s Λ^½,     Zᵀ F_u Z = Λ^½ Q_uᵀ Q_u Λ^½

so the D-dimensional pencil becomes a dense one of size m ≤ n_s + n_u. Cost O((n_s+n_u)² D + (n_s+n_u)³), memory O(nD);
no D × D matrix is formed (method.md sections 4 and 5).
"""

import torch

from src.fisher.lowrank import COLUMNS, LowRankFisher
from src.gevp.eigensystem import Eigensystem

SPAN_TOLERANCE = 1e-13
"""Eigenvalues of the Gram matrix under this share of the largest are rounding, not directions (float64)."""


def gram(scores: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """(N, N) float64 Gram matrix of scaled scores, accumulated over column blocks."""
    total = torch.zeros(scores.shape[0], scores.shape[0], dtype=torch.float64)
    for block in scores.split(COLUMNS, dim=1):
        wide = block.double() * scale[:, None]
        total.addmm_(wide, wide.T)
    return total


def whitened_eigh(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised symmetric eigenpairs of ``left v = λ right v``, descending, ``Vᵀ right V = I``.

    ``right`` is factorised (Cholesky) and ``left`` whitened by the factor; no matrix is inverted.

    Raises:
        ValueError: ``right`` is not positive definite.
    """
    lower, failed = torch.linalg.cholesky_ex((right + right.T) / 2)
    if failed.item():
        raise ValueError("the right side of the pencil is not positive definite: raise the ridge rho")
    half = torch.linalg.solve_triangular(lower, (left + left.T) / 2, upper=False)
    white = torch.linalg.solve_triangular(lower, half.T, upper=False)
    values, vectors = torch.linalg.eigh((white + white.T) / 2)
    back = torch.linalg.solve_triangular(lower.T, vectors, upper=True)
    return values.flip(0), back.flip(1)


def solve_lowrank(safety: LowRankFisher, utility: LowRankFisher, *, rho: float, rho_s: float) -> Eigensystem:
    """Solve ``(F_s + σI) v = λ (F_u + εI) v`` with ``ε = ρ tr(F_u)/D`` and ``σ = ρ_s tr(F_s)/D``.

    Args:
        safety: F_s over D coordinates.
        utility: F_u over the same coordinates.
        rho: Relative ridge of F_u, above 0.
        rho_s: Relative ridge of F_s, at least 0; 0 drops what neither data set has seen.

    Raises:
        ValueError: dimensions differ, a ridge is out of range, or a Fisher matrix is zero.
    """
    if safety.dim != utility.dim:
        raise ValueError(f"F_s has {safety.dim} coordinates, F_u {utility.dim}")
    if not rho > 0:
        raise ValueError(f"rho is {rho}; expected a number above 0")
    if not rho_s >= 0:
        raise ValueError(f"rho_s is {rho_s}; expected a number of at least 0")
    trace_s, trace_u = safety.trace(), utility.trace()
    if trace_s <= 0 or trace_u <= 0:
        raise ValueError(f"the {'safety' if trace_s <= 0 else 'utility'} Fisher matrix is zero")
    epsilon, sigma = rho * trace_u / safety.dim, rho_s * trace_s / safety.dim

    n_s = safety.scores.shape[0]
    dtype = torch.promote_types(safety.scores.dtype, utility.scores.dtype)
    stack = torch.cat([safety.scores.to(dtype), utility.scores.to(dtype)])
    # Both sides to trace 1, so that neither hides the other under the span's tolerance.
    scale_s, scale_u = (safety.count * trace_s) ** -0.5, (utility.count * trace_u) ** -0.5
    scale = torch.full((stack.shape[0],), scale_u, dtype=torch.float64)
    scale[:n_s] = scale_s

    spectrum, q = torch.linalg.eigh(gram(stack, scale))
    kept = spectrum > SPAN_TOLERANCE * spectrum[-1]
    spectrum, q = spectrum[kept], q[:, kept]
    half = q * spectrum.sqrt()
    identity = torch.eye(len(spectrum), dtype=torch.float64)
    left = trace_s * (half[:n_s].T @ half[:n_s]) + sigma * identity
    right = trace_u * (half[n_s:].T @ half[n_s:]) + epsilon * identity
    values, vectors = whitened_eigh(left, right)
    return Eigensystem(
        values=values.clamp_min(0.0),
        complement_value=sigma / epsilon,
        dim=safety.dim,
        epsilon=epsilon,
        sigma=sigma,
        trace_ratio=trace_s / trace_u,
        stack=stack,
        scale=scale,
        to_span=q / spectrum.sqrt(),
        vectors=vectors,
        metric=right,
    )
