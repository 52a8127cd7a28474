"""The published diagonal SST-Merge in weight coordinates, as a pure function of two diagonal Fisher matrices.

r_i = f_s,i / (f_u,i + ε),   patch = α_layer · w(r) ⊙ P
"""

from collections.abc import Mapping

import torch

from src.adapters.deltas import Delta, Deltas, combined
from src.merge.masked import Masking, masked_patch, whole_patch


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
        layer_weights: Factor of each module's patch; a module that is not named has 1.

    Raises:
        ValueError: a module of the patch has no Fisher information.
    """
    whole = whole_patch(utility, safety, masking.form)
    for name in whole:
        if name not in fisher_safety or name not in fisher_utility:
            raise ValueError(f"{name}: no diagonal Fisher information in weight coordinates")

    def ratio(name: str, rows: slice) -> torch.Tensor:
        return fisher_safety[name].block(rows).double() / (fisher_utility[name].block(rows).double() + epsilon)

    patch = masked_patch(whole, ratio, masking)
    factors = layer_weights or {}
    return {name: combined([{name: delta}], [factors.get(name, 1.0)]).get(name, delta) for name, delta in patch.items()}
