"""The published diagonal SST-Merge in weight coordinates, of two diagonal Fisher matrices.

r_i = f_s,i / (f_u,i + ε),   patch = α_layer · w(r) ⊙ P
"""

from collections.abc import Mapping

import torch

from src.adapters.deltas import Delta, Deltas, changes, combined
from src.errors import InputError
from src.fisher.diagonal import DiagonalFisher
from src.merge.base import FisherPair, MergeMethod, Patch
from src.merge.masked import Form, Mask, Masking, masked_patch, whole_patch, without_effect
from src.merge.ranges import above_zero, finite
from src.merge.weight_fishers import per_weight


class SstDiagonal(MergeMethod):
    """The published SST-Merge: keep the patch where ``r = f_s / (f_u + ε)`` is large, weight by weight. Full rank.

    The form in which SST-Merge was first published (no arXiv id). Its published code takes the top share over all
    modules together, and squashes standardised ratios in ``soft``; here each module keeps its own share, and ``tau``
    and ``gamma`` are those of the ratio. Needs Fisher files of ``--model.coordinates weight --model.representation
    diagonal``. With ``--model.labels random_tokens`` they need no data. Strength alpha multiplies the masked patch.

    Args:
        mask: ``hard`` keeps the elements with the largest ratios; ``soft`` weighs by 1 / (1 + exp(−(r − tau)/gamma)).
        top: Share of elements that ``hard`` keeps per module, above 0 to 1 (the paper's 20 %).
        tau: Ratio at which ``soft`` gives one half.
        gamma: Width of ``soft``, above 0.
        form: ``additive`` masks ΔW_s, ``interpolating`` masks ΔW_s − ΔW_u.
        rho: Ridge on F_u, relative to its mean: ε = rho · tr(F_u)/D. Above 0.
        layer_weights: Factor of the patch of modules by name, finite; others have 1, and 0 leaves a module out.
    """

    full_rank = True
    needs_fisher = True
    coordinates = "weight"
    representations = ("diagonal",)

    def __init__(
        self,
        mask: Mask = "hard",
        top: float = 0.2,
        tau: float = 1.0,
        gamma: float = 0.1,
        form: Form = "additive",
        rho: float = 1e-6,
        layer_weights: dict[str, float] | None = None,
    ) -> None:
        for name, weight in (layer_weights or {}).items():
            finite(weight, f"method.layer_weights.{name}")
        self._masking = Masking(mask, top, tau, gamma, form)
        self.mask, self.top, self.tau, self.gamma, self.form = mask, top, tau, gamma, form
        self.rho, self.layer_weights = above_zero(rho, "method.rho"), layer_weights

    def without_effect(self) -> dict[str, str]:
        """What the mask leaves unread."""
        return without_effect(self.mask)

    def patch(self, utility: Mapping[str, Delta], safety: Mapping[str, Delta], fisher: FisherPair | None) -> Patch:
        """The masked patch.

        Raises:
            InputError: the Fisher files are missing, of another form, zero, or lack a module.
        """
        if fisher is None:
            raise InputError("method SstDiagonal needs both Fisher files: pass --fisher")
        one, two = fisher.safety, fisher.utility
        if not isinstance(one, DiagonalFisher) or not isinstance(two, DiagonalFisher):
            raise InputError("method SstDiagonal needs diagonal Fisher files in weight coordinates")
        epsilon = self.rho * two.trace() / two.dim
        if not epsilon > 0:
            raise InputError("method SstDiagonal: the utility Fisher matrix is zero")
        unknown = [name for name in self.layer_weights or {} if name not in one.shapes]
        if unknown:
            raise InputError(f"method.layer_weights: no module {unknown[0]} in the Fisher files")
        diagonals = [{name: per_weight(f, name) for name in f.shapes} for f in (one, two)]
        try:
            made = sst_diagonal(
                utility,
                safety,
                diagonals[0],
                diagonals[1],
                self._masking,
                epsilon=epsilon,
                layer_weights=self.layer_weights,
            )
        except ValueError as error:
            raise InputError(f"method SstDiagonal: {error}; measure with --model.basis union") from None
        return Patch(made, {"epsilon": epsilon})


def sst_diagonal(
    utility: Mapping[str, Delta],
    safety: Mapping[str, Delta],
    fisher_safety: Mapping[str, Delta],
    fisher_utility: Mapping[str, Delta],
    masking: Masking,
    *,
    epsilon: float,
    layer_weights: Mapping[str, float] | None = None,
) -> Deltas:
    """The masked patch.

    Args:
        utility: ΔW_u.
        safety: ΔW_s.
        fisher_safety: Diagonal of F_s for every weight of a module, (O, I).
        fisher_utility: Diagonal of F_u.
        masking: How a ratio becomes a weight.
        epsilon: Ridge on F_u, above 0, in units of Fisher information.
        layer_weights: Factor of each module's patch; a module that is not named has 1, and 0 leaves it out.

    Raises:
        ValueError: a module of the patch has no Fisher information.
    """
    whole = {n: delta for n, delta in whole_patch(utility, safety, masking.form).items() if changes(delta)}
    for name in whole:
        if name not in fisher_safety or name not in fisher_utility:
            raise ValueError(f"{name}: no diagonal Fisher information in weight coordinates")

    def ratio(name: str, rows: slice) -> torch.Tensor:
        return fisher_safety[name].block(rows).double() / (fisher_utility[name].block(rows).double() + epsilon)

    patch = masked_patch(whole, ratio, masking)
    factors = layer_weights or {}
    total: Deltas = {}
    for name, delta in patch.items():
        total |= combined([{name: delta}], [factors.get(name, 1.0)])
    return total
