"""Leading eigenvectors of one Fisher matrix."""

import torch

from src.errors import InputError
from src.fisher.lowrank import LowRankFisher


def leading_directions(fisher: LowRankFisher, k: int, key: str = "method.k") -> torch.Tensor:
    """(D, k) orthonormal leading eigenvectors of F, from the Gram matrix of its scores.

    Args:
        fisher: F, by its scores.
        k: Number of eigenvectors.
        key: What the user calls k, for the message.

    Raises:
        InputError: F has fewer than k non-zero eigenvalues.
    """
    factor = fisher.factor()
    values, vectors = torch.linalg.eigh(factor @ factor.T)
    rank = int((values > values[-1] * 1e-12).sum())
    if k > rank:
        raise InputError(f"{key} is {k}; expected 1 to {rank}, the rank of F_s")
    return factor.T @ (vectors[:, -k:] / values[-k:].sqrt())
