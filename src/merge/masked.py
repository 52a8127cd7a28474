"""Element-wise masks of the safety patch: a ratio per element, made a weight, times the patch.

    P = ΔW_s or ΔW_s − ΔW_u,   w = hard or soft mask of the ratio r,   patch = w ⊙ P

hard: 1 for the largest share of r in a module; soft: 1 / (1 + exp(−(r − τ)/γ)). Full rank, evaluated in blocks.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from src.adapters.deltas import Delta, Deltas, LazyDelta, combined, row_blocks
from src.merge.base import FisherPair, MergeMethod, Patch
from src.merge.ranges import above_zero, finite, share
from src.merge.selection import at_least, kept_count, kth_magnitude

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
        finite(self.tau, "method.tau")
        above_zero(self.gamma, "method.gamma")


def without_effect(mask: Mask) -> dict[str, str]:
    """Options that a mask leaves unread, and with what they are read."""
    return {"tau": "mask soft", "gamma": "mask soft"} if mask == "hard" else {"top": "mask hard"}


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
            count = kept_count(masking.top, delta.shape[0] * delta.shape[1])
            rows = row_blocks(delta.shape)
            thresholds.append(kth_magnitude(lambda: (ratio(name, block) for block in rows), count))
        return thresholds[0]

    def evaluate(rows: slice) -> torch.Tensor:
        values = ratio(name, rows)
        if masking.mask == "hard":
            # Where fewer elements have a ratio at all, the threshold is 0: those without one are still left out.
            weight = (at_least(values, threshold()) & (values > 0)).to(values.dtype)
        else:
            weight = torch.sigmoid((values - masking.tau) / masking.gamma)
        return delta.block(rows) * weight

    return LazyDelta(delta.shape, evaluate)


class RatioMask(MergeMethod):
    """A patch masked by a ratio of updates, element by element. No data; full rank.

    Args:
        mask: ``hard`` keeps the elements with the largest ratios; ``soft`` weighs by 1 / (1 + exp(−(r − tau)/gamma)).
        top: Share of elements that ``hard`` keeps per module, above 0 to 1.
        tau: Ratio at which ``soft`` gives one half.
        gamma: Width of ``soft``, above 0.
        form: ``additive`` masks ΔW_s, ``interpolating`` masks ΔW_s − ΔW_u.
        epsilon: Added below the ratio's line, above 0: keeps it finite where there is no utility update.
    """

    full_rank = True

    def __init__(
        self,
        mask: Mask = "hard",
        top: float = 0.2,
        tau: float = 1.0,
        gamma: float = 0.1,
        form: Form = "additive",
        epsilon: float = 1e-12,
    ) -> None:
        above_zero(epsilon, "method.epsilon")
        self._masking = Masking(mask, top, tau, gamma, form)
        self.mask, self.top, self.tau, self.gamma, self.form, self.epsilon = mask, top, tau, gamma, form, epsilon

    def without_effect(self) -> dict[str, str]:
        """What the mask leaves unread."""
        return without_effect(self.mask)

    @abstractmethod
    def parts(
        self, patch: torch.Tensor, safety: torch.Tensor, utility: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What stands above and below the ratio's line, of the same block of P, ΔW_s and ΔW_u (float64)."""

    def patch(self, utility: Mapping[str, Delta], safety: Mapping[str, Delta], fisher: FisherPair | None) -> Patch:
        """The masked patch."""
        whole = whole_patch(utility, safety, self.form)

        def ratio(name: str, rows: slice) -> torch.Tensor:
            patch = whole[name].block(rows).double()
            blocks = [d[name].block(rows).double() if name in d else torch.zeros_like(patch) for d in (safety, utility)]
            above, below = self.parts(patch, *blocks)
            return above / (below + self.epsilon)

        return Patch(masked_patch(whole, ratio, self._masking))
