"""SST without data: the patch against the utility update, element by element.

r = P² / (ΔW_u² + ε)
"""

from collections.abc import Mapping

import torch

from src.adapters.deltas import Delta
from src.errors import InputError
from src.merge.base import FisherPair, MergeMethod, Patch
from src.merge.masked import Form, Mask, Masking, masked_patch, whole_patch


class SstV(MergeMethod):
    """SST-V: keep the patch where it is large against the utility update, ``r = P² / (ΔW_u² + ε)``. No data.

    The published data-free variant of SST-Merge. Full rank.

    Args:
        mask: ``hard`` keeps the elements with the largest ratios; ``soft`` weighs by 1 / (1 + exp(−(r − tau)/gamma)).
        top: Share of elements that ``hard`` keeps per module, above 0 to 1.
        tau: Ratio at which ``soft`` gives one half.
        gamma: Width of ``soft``, above 0.
        form: ``additive`` masks ΔW_s, ``interpolating`` masks ΔW_s − ΔW_u.
        epsilon: Added to the squared utility update, above 0, in squared weight units.
    """

    takes_full_rank = True

    def __init__(
        self,
        mask: Mask = "hard",
        top: float = 0.2,
        tau: float = 1.0,
        gamma: float = 0.1,
        form: Form = "additive",
        epsilon: float = 1e-12,
    ) -> None:
        if not epsilon > 0:
            raise InputError(f"method.epsilon is {epsilon}; expected a number above 0")
        self._masking = Masking(mask, top, tau, gamma, form)
        self.mask, self.top, self.tau, self.gamma, self.form, self.epsilon = mask, top, tau, gamma, form, epsilon

    def patch(self, utility: Mapping[str, Delta], safety: Mapping[str, Delta], fisher: FisherPair | None) -> Patch:
        """The masked patch."""
        whole = whole_patch(utility, safety, self.form)

        def ratio(name: str, rows: slice) -> torch.Tensor:
            above = whole[name].block(rows).double().square()
            below = utility[name].block(rows).double().square() if name in utility else torch.zeros_like(above)
            return above / (below + self.epsilon)

        return Patch(masked_patch(whole, ratio, self._masking))
