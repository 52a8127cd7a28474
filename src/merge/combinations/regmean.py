"""RegMean (2212.09849): the update whose outputs are closest to each expert's on that expert's own inputs.

    ΔWᵀ = (Σ w_i G_i)⁻¹ Σ w_i G_i ΔW_iᵀ,   G_i = X_iᵀX_i with off-diagonals times a

Stated for weights, it holds for updates alike, as the base's weights cancel. In coordinates of a core space (G_i to
Vᵀ G_i V) it is the least-squares routing of 2606.10617. Pure functions: the statistics come from the caller.

Legend of shapes: O output features, I input features.
"""

from collections.abc import Sequence

import torch


def shrunk(gram: torch.Tensor, off_diagonal: float) -> torch.Tensor:
    """(I, I) Gram matrix with its off-diagonal elements times ``off_diagonal`` (the paper's .9)."""
    return off_diagonal * gram + (1 - off_diagonal) * torch.diag(gram.diagonal())


def regmean(
    updates: Sequence[torch.Tensor],
    grams: Sequence[torch.Tensor],
    weights: Sequence[float] | None = None,
    *,
    off_diagonal: float = 0.9,
) -> torch.Tensor:
    """(O, I) merged update, float64.

    Args:
        updates: ΔW_i, (O, I) each.
        grams: XᵀX of the inputs that expert i sees, (I, I) each, on one scale (per token).
        weights: One per expert; unset means 1 for each.
        off_diagonal: Factor of off-diagonal elements, 0 to 1.

    Raises:
        ValueError: the summed Gram matrix is singular: fewer tokens than features, and off-diagonals not shrunk.
    """
    given = weights or [1.0] * len(updates)
    scaled = [w * shrunk(g.double(), off_diagonal) for w, g in zip(given, grams, strict=True)]
    right = torch.stack([g @ d.double().T for g, d in zip(scaled, updates, strict=True)]).sum(0)
    factor, failed = torch.linalg.cholesky_ex(torch.stack(scaled).sum(0))
    if failed:
        raise ValueError("the summed Gram matrix is singular; more tokens or a smaller off_diagonal make it regular")
    return torch.cholesky_solve(right, factor).T
