"""The random-subspace control: as many directions as a filter keeps, but any directions.

    c' = X (Xᵀ B X)⁻¹ Xᵀ B c,    B = F_u + εI,   X (D, k) standard normal

Legend of shapes: k directions, D coordinates.
"""

import torch

from src.fisher.base import Fisher
from src.gevp.inverse import ridged_product

MOST_ENTRIES = 2**27
"""Most entries k · D of the subspace (1 GiB)."""


def random_projection(patch: torch.Tensor, utility: Fisher, epsilon: float, *, k: int, seed: int) -> torch.Tensor:
    """(D,) projection of a patch (D,) on k random directions, in the metric F_u + εI.

    Args:
        patch: The patch.
        utility: F_u.
        epsilon: Ridge ε.
        k: Number of directions; D or more keeps the whole patch, 0 nothing.
        seed: Seed of the directions.

    Raises:
        ValueError: k · D directions do not fit in memory, or are not independent in the metric.
    """
    dim = len(patch)
    if k >= dim:
        return patch.double()
    if k == 0:
        return torch.zeros(dim, dtype=torch.float64)
    if k * dim > MOST_ENTRIES:
        raise ValueError(f"{k} random directions in {dim} coordinates; expected at most {MOST_ENTRIES // dim}")
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(k, dim, generator=generator, dtype=torch.float64)
    product = ridged_product(utility, epsilon)
    duals = torch.stack([product(direction) for direction in directions])
    lower, failed = torch.linalg.cholesky_ex(directions @ duals.T)
    if failed:
        raise ValueError(f"{k} random directions in {dim} coordinates are dependent by rounding: raise the ridge rho")
    weights = torch.cholesky_solve((duals @ patch.double())[:, None], lower).squeeze(1)
    return weights @ directions
