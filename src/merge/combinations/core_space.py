"""Core space merging (2509.17786).

    [B_1 … B_n] = U S_b ·,   [A_1ᵀ … A_nᵀ] = V S_a ·,   ΔW = U · inner(Uᵀ ΔW_1 V, …, Uᵀ ΔW_n V) · Vᵀ

The stacked factors are the balanced ones, ``B_i = U_i √σ_i`` and ``A_i = √σ_i V_iᵀ``, which every factoring shares; the
authors stack factors as they were trained.
"""

from collections.abc import Sequence
from typing import Any

from src.adapters.geometry import orthonormal
from src.adapters.pairs import LowRankPair
from src.merge.combination import Combination
from src.merge.subspace import Part, Subspace, checked_inner, merge_coordinates


class CoreSpace(Subspace):
    """Core space merging (2509.17786): merge small matrices in bases that span all experts; lossless for sums.

    The result has rank Σ r_i at most.

    Args:
        inner: How core matrices are merged, such as ``Ties``, ``Dare`` or ``TaskArithmetic``; unset means ``Ties``.
            ``Ties`` trims per module here.
    """

    def __init__(self, inner: Combination | None = None) -> None:
        self.inner = checked_inner(inner, "CoreSpace")

    def module(self, name: str, parts: Sequence[Part], shape: tuple[int, int]) -> tuple[LowRankPair, dict[str, Any]]:
        """Merge the cores."""
        return merge_cores(self.inner, name, parts, None)[0], {}


def merge_cores(
    inner: Combination, name: str, parts: Sequence[Part], rank: int | None
) -> tuple[LowRankPair, list[float]]:
    """The merged update, and the share of each expert's energy inside the bases."""
    u = orthonormal([part.u * part.sigma.sqrt() for part in parts])[0][:, :rank]
    v = orthonormal([part.v * part.sigma.sqrt() for part in parts])[0][:, :rank]
    cores = [part.times_right(u) @ v for part in parts]
    wholes = [part.sigma.square().sum().item() for part in parts]
    kept = [core.square().sum().item() / whole if whole else 1.0 for core, whole in zip(cores, wholes, strict=True)]
    return LowRankPair(v.T.contiguous(), u @ merge_coordinates(inner, name, parts, cores)), kept
