"""Element-wise masks of the safety patch: a ratio per element, made a weight, times the patch.

    P = ΔW_s or ΔW_s − ΔW_u,   w = hard or soft mask of the ratio r,   patch = w ⊙ P

hard: 1 for the largest share of r in a module; soft: 1 / (1 + exp(−(r − τ)/γ)). Full rank, evaluated in blocks.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from src.adapters.deltas import Delta, Deltas, LazyDelta, combined, row_blocks
from src.errors import InputError
from src.merge.combination import share
from src.merge.selection import at_least, kth_magnitude

Mask = Literal["hard", "soft"]
Form = Literal["additive", "interpolating"]
Ratio = Callable[[str, slice], torch.Tensor]


@dataclass(frozen=True)
class Masking:
    """Settings of a mask, checked.

    Attributes:
        mask: ``hard`` or ``soft``.
        top: Share of elements that ``hard`` keeps.
        tau: Ratio at which ``soft`` is one half.
        gamma: Width of ``soft``.
        form: What is masked.
    """

    mask: Mask
    top: float
    tau: float
    gamma: float
    form: Form

    def __post_init__(self) -> None:
        share(self.top, "method.top")
        if not self.gamma > 0:
            raise InputError(f"method.gamma is {self.gamma}; expected a number above 0")


def whole_patch(utility: Mapping[str, Delta], safety: Mapping[str, Delta], form: Form) -> Deltas:
    """P: ΔW_s, or ΔW_s − ΔW_u in every module that either has."""
    return combined([safety, utility], [1.0, -1.0 if form == "interpolating" else 0.0])


def masked_patch(patch: Mapping[str, Delta], ratio: Ratio, masking: Masking) -> Deltas:
    """``w ⊙ P`` per module.

    Args:
        patch: P.
        ratio: Module and rows to the ratios of those elements, at least 0.
        masking: How a ratio becomes a weight.
    """
    return {name: _masked(name, delta, ratio, masking) for name, delta in patch.items()}


def _masked(name: str, delta: Delta, ratio: Ratio, masking: Masking) -> Delta:
    thresholds: list[float] = []

    def threshold() -> float:
        if not thresholds:
            count = int(masking.top * delta.shape[0] * delta.shape[1])
            rows = row_blocks(delta.shape)
            thresholds.append(kth_magnitude(lambda: (ratio(name, block) for block in rows), count))
        return thresholds[0]

    def evaluate(rows: slice) -> torch.Tensor:
        values = ratio(name, rows)
        if masking.mask == "hard":
            weight = at_least(values, threshold()).to(values.dtype)
        else:
            weight = torch.sigmoid((values - masking.tau) / masking.gamma)
        return delta.block(rows) * weight

    return LazyDelta(delta.shape, evaluate)
