"""SST by magnitude, the ablation: the safety update against the utility update, without squares or data.

r = |ΔW_s| / (|ΔW_u| + ε)
"""

from collections.abc import Mapping

import torch

from src.adapters.deltas import Delta
from src.errors import InputError
from src.merge.base import FisherPair, MergeMethod, Patch
from src.merge.masked import Form, Mask, Masking, masked_patch, whole_patch


class SstM(MergeMethod):
    """SST-M, the magnitude ablation: keep the patch where ``|ΔW_s| / (|ΔW_u| + ε)`` is large. No data.

    Magnitudes are those of updates: in whole weights the base would make nearly every ratio 1. Full rank.

    Args:
        mask: ``hard`` keeps the elements with the largest ratios; ``soft`` weighs by 1 / (1 + exp(−(r − tau)/gamma)).
        top: Share of elements that ``hard`` keeps per module, above 0 to 1.
        tau: Ratio at which ``soft`` gives one half.
        gamma: Width of ``soft``, above 0.
        form: ``additive`` masks ΔW_s, ``interpolating`` masks ΔW_s − ΔW_u.
        epsilon: Added to the utility magnitude, above 0, in weight units.
    """

    takes_full_rank = True

    def __init__(
        self,
        mask: Mask = "hard",
        top: float = 0.2,
        tau: float = 1.0,
        gamma: float = 0.1,
        form: Form = "additive",
        epsilon: float = 1e-8,
    ) -> None:
        if not epsilon > 0:
            raise InputError(f"method.epsilon is {epsilon}; expected a number above 0")
        self._masking = Masking(mask, top, tau, gamma, form)
        self.mask, self.top, self.tau, self.gamma, self.form, self.epsilon = mask, top, tau, gamma, form, epsilon

    def patch(self, utility: Mapping[str, Delta], safety: Mapping[str, Delta], fisher: FisherPair | None) -> Patch:
        """The masked patch."""
        whole = whole_patch(utility, safety, self.form)

        def ratio(name: str, rows: slice) -> torch.Tensor:
            blocks = [d[name].block(rows).double().abs() if name in d else None for d in (safety, utility)]
            like = whole[name].block(rows).double()
            above, below = (torch.zeros_like(like) if b is None else b for b in blocks)
            return above / (below + self.epsilon)

        return Patch(masked_patch(whole, ratio, self._masking))
