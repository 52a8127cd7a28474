"""TSV-Merge (2412.00081): singular triplets of all experts, decorrelated.

ΔW = U⊥ diag(w_i σ_i) V⊥ᵀ,   U⊥, V⊥ the polar factors of the stacked U_i and V_i
"""

from collections.abc import Sequence
from typing import Any

import torch

from src.adapters.geometry import RANK_TOLERANCE
from src.adapters.pairs import LowRankPair
from src.errors import InputError
from src.merge.subspace import Part, Subspace


class TsvM(Subspace):
    """TSV-Merge (2412.00081): stack the experts' singular triplets and replace the bases by the nearest orthonormal.

    Where the stacked bases are dependent (equal experts), the polar factor of their span is taken.

    Args:
        keep: Triplets kept of each expert, the largest; unset keeps all, or min(O, I) / n where there are more.
    """

    def __init__(self, keep: int | None = None) -> None:
        if keep is not None and keep < 1:
            raise InputError(f"TsvM keep is {keep}; expected at least 1")
        self.keep = keep

    def module(self, name: str, parts: Sequence[Part], shape: tuple[int, int]) -> tuple[LowRankPair, dict[str, Any]]:
        """Decorrelate and recombine."""
        parts = [part for part in parts if len(part.sigma) and part.weight]
        if not parts:  # an adapter has no module of rank 0
            return LowRankPair(torch.zeros(1, shape[1]), torch.zeros(shape[0], 1)), {}
        room = min(shape)
        each = self.keep or (room if sum(len(p.sigma) for p in parts) <= room else max(1, room // len(parts)))
        u = polar(torch.cat([part.u[:, :each] for part in parts], dim=1))
        v = polar(torch.cat([part.v[:, :each] for part in parts], dim=1))
        sigma = torch.cat([part.weight * part.sigma[:each] for part in parts])
        return LowRankPair(v.T.contiguous(), u * sigma), {}


def polar(columns: torch.Tensor) -> torch.Tensor:
    """The nearest matrix with orthonormal columns (or, where columns are dependent, the nearest partial isometry)."""
    q, r = torch.linalg.qr(columns)
    left, values, right = torch.linalg.svd(r, full_matrices=False)
    kept = values > RANK_TOLERANCE * values[0]
    return q @ (left[:, kept] @ right[kept])
