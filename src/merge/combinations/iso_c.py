"""Iso-C (2502.04959): the sum of updates with a flat spectrum.

Σ w_i ΔW_i = U diag(σ) Vᵀ,   ΔW = mean(σ) · U Vᵀ
"""

from collections.abc import Sequence
from typing import Any

import torch

from src.adapters.geometry import spaces
from src.adapters.pairs import LowRankPair
from src.merge.ranges import finite
from src.merge.subspace import Part, Subspace


class IsoC(Subspace):
    """Iso-C (2502.04959): sum the updates and set all non-zero singular values to their mean.

    Published for full-rank updates, whose spectrum has no zeros: of low-rank ones only the directions that they have
    are flattened, at min(O, I) / rank times the level of a mean over all.

    Args:
        scale: Factor of the result; 1 leaves it.
    """

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = finite(scale, "IsoC scale")

    def module(self, name: str, parts: Sequence[Part], shape: tuple[int, int]) -> tuple[LowRankPair, dict[str, Any]]:
        """Flatten the spectrum of the sum."""
        a = torch.cat([part.v.T for part in parts])
        b = torch.cat([part.u * (part.weight * part.sigma) for part in parts], dim=1)
        u, sigma, v = spaces(LowRankPair(a, b))
        if not len(sigma):
            return LowRankPair(a[:1] * 0, b[:, :1] * 0), {}
        level = self.scale * sigma.mean()
        return LowRankPair(v.T.contiguous(), u * level), {"singular_value": level.item()}
