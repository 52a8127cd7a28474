"""The patch at a reference point, in core coordinates: where re-learned coefficients start.

    θ_ref = θ0 + ΔW_u + U C Vᵀ

``patched`` is the whole safety patch. Any other point in the core space around the utility expert will do: a part
of the patch (``{utility: 1.0, safety: 0.5}``), or a merged adapter (``{logs/merged: 1.0}``), for a second step.
"""

import logging
from collections.abc import Sequence

import torch

from src.adapters.basis import CoreBasis
from src.adapters.pairs import weighted_sum
from src.adapters.peft_files import Adapter
from src.adapters.read_together import in_common_terms
from src.models.reference import NAMED, Reference, named_adapters, reference_weights

log = logging.getLogger(__name__)

OUTSIDE = 1e-3
"""Largest share of the update that may lie outside the core space."""


def reference_point(reference: Reference) -> dict[str, float]:
    """The weight of each adapter that a reference point is made of."""
    return {name: weight for name, weight in reference_weights(reference).items() if weight}


def is_patched(reference: Reference) -> bool:
    """Whether a point is θ0 + ΔW_u + ΔW_s, by whatever name."""
    return reference_point(reference) == NAMED["patched"]


def patch_at(
    reference: Reference, utility: Sequence[Adapter], weights: Sequence[float], safety: Adapter, basis: CoreBasis
) -> torch.Tensor | None:
    """(D,) core coordinates of what a reference point adds to θ0 + ΔW_u, float64.

    Nothing at the patched point, where they are those of the safety adapter, and where the core space cannot hold them,
    which is said: no step can start there.

    Args:
        reference: The point.
        utility: Utility adapters.
        weights: Their weights in ΔW_u.
        safety: Safety adapter.
        basis: Its core space.
    """
    if is_patched(reference):
        return None
    at, named = reference_weights(reference), named_adapters(reference) | {"safety": safety}
    beyond = at.pop("utility", 0.0) - 1.0
    parts = [(adapter, beyond * weight) for adapter, weight in zip(utility, weights, strict=True)]
    parts += [(named[name], weight) for name, weight in at.items()]
    # All are read together, the safety adapter too: biases make one more input, which the core space may have.
    *adapters, _ = in_common_terms([*(adapter for adapter, _ in parts), safety])
    moved = [(adapter, weight) for adapter, (_, weight) in zip(adapters, parts, strict=True) if weight]
    update = weighted_sum([one.pairs for one, _ in moved], [weight for _, weight in moved]) if moved else {}
    fits = all(basis.v[name].shape[0] == pair.shape[1] for name, pair in update.items() if name in basis.v)
    if fits and basis.residual(update) <= OUTSIDE:
        return basis.coordinates(update)
    log.warning(
        "model.relearn: the point %s is no patch in the adapters' core space (model.basis): no merge can re-learn "
        "coefficients from what is measured there; F_s and F_u serve as ever",
        reference,
    )
    return None
