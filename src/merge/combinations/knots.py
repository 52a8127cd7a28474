"""KnOTS (2410.19735): align the experts by one SVD, merge there.

[ΔW_1 … ΔW_n] = U Σ [V_1 … V_n]ᵀ,   ΔW = U · inner(Σ V_1ᵀ, …, Σ V_nᵀ)
"""

from collections.abc import Sequence
from typing import Any

from src.adapters.geometry import orthonormal
from src.adapters.pairs import LowRankPair
from src.merge.combination import Combination
from src.merge.subspace import Part, Subspace, checked_inner, merge_coordinates


class Knots(Subspace):
    """KnOTS (2410.19735): one SVD of all updates side by side, then merge their coordinates in its left basis.

    The result has rank Σ r_i at most.

    Args:
        inner: How coordinates are merged, such as ``Ties`` or ``Dare``; unset means ``Ties`` with its defaults
            (density .2, as the authors' for vision models; theirs for Llama 3 8B keeps all: ``density: 1.0``).
            ``Ties`` trims per module here.
    """

    def __init__(self, inner: Combination | None = None) -> None:
        self.inner = checked_inner(inner, "Knots")

    def module(self, name: str, parts: Sequence[Part], shape: tuple[int, int]) -> tuple[LowRankPair, dict[str, Any]]:
        """Merge ``Uᵀ ΔW_i = Σ V_iᵀ``."""
        # The right factors have orthonormal rows, so the stacked left factors have the same U and Σ as the updates.
        u, _ = orthonormal([part.u * part.sigma for part in parts])
        merged = merge_coordinates(self.inner, name, parts, [part.times_right(u) for part in parts])
        return LowRankPair(merged, u), {}
