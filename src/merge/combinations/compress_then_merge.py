"""Compress, then merge (2606.03723): core space merging that keeps fewer directions, see :mod:`.core_space`."""

from collections.abc import Sequence
from typing import Any

from src.adapters.pairs import LowRankPair
from src.errors import InputError
from src.merge.combination import Combination
from src.merge.combinations.core_space import merge_cores
from src.merge.subspace import Part, Subspace, checked_inner


class CompressThenMerge(Subspace):
    """Compress, then merge (2606.03723): coordinates in the r leading shared directions, then any combination.

    The result has rank r; the share of each expert's energy in those directions is reported. Written from the
    definition ``U_rᵀ ΔW_i V_r`` with bases from the stacked factors; the paper's text was not at hand.

    Args:
        rank: Shared directions r on each side, at least 1.
        inner: How coordinates are merged: any combination that needs no Fisher files; unset means ``Ties``, which trims
            per module here.
    """

    def __init__(self, rank: int = 16, inner: Combination | None = None) -> None:
        if rank < 1:
            raise InputError(f"CompressThenMerge rank is {rank}; expected at least 1")
        self.rank, self.inner = rank, checked_inner(inner, "CompressThenMerge")

    def module(self, name: str, parts: Sequence[Part], shape: tuple[int, int]) -> tuple[LowRankPair, dict[str, Any]]:
        """Compress, merge, and report what the compression kept."""
        pair, kept = merge_cores(self.inner, name, parts, self.rank)
        return pair, {"kept_energy": kept}
