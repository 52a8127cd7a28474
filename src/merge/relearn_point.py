"""The coefficients at the point where mean scores were measured: re-learned coefficients start there.

    θ_ref = θ0 + ΔW_u + U C_ref Vᵀ

``patched`` is the whole safety patch. Any other point in the core space will do: half of the patch (``{utility: 1.0,
safety: 0.5}``), or a merged adapter (``{logs/merged: 1.0}``), from which the step of an earlier run goes on.
"""

from collections.abc import Sequence

import torch

from src.adapters.basis import CoreBasis
from src.adapters.pairs import Pairs, weighted_sum
from src.adapters.peft_files import Adapter, read_adapter
from src.adapters.read_together import same_inputs
from src.errors import InputError
from src.merge.fisher_passes import Pass, check_keys
from src.models.reference import NAMED, reference_weights

OUTSIDE = 1e-3
"""Largest share of the update at the reference point that may lie outside the core space."""


def start_of(one: Pass, basis: CoreBasis, experts: Sequence[Adapter], safety: Adapter) -> torch.Tensor | None:
    """(D,) coefficients at a pass's reference point; nothing at the patched point, where they are the whole patch's.

    Args:
        one: A pass with mean scores, of these adapters.
        basis: Its coordinates.
        experts: The utility adapters.
        safety: The safety adapter.

    Raises:
        InputError: the record does not say where it was measured, an adapter at that point is missing or has changed,
            or the point is outside of the core space around θ0 + ΔW_u.
    """
    check_keys(one, ("reference",))
    at = reference_weights(one.file.record["reference"])
    if at == NAMED["patched"]:
        return None
    update = _beyond_utility(one, at, experts, safety)
    outside = basis.residual(update)
    if outside > OUTSIDE:
        raise InputError(
            f"{one.path}: measured at {at}, and {outside:.1%} of what that adds to the utility adapters lies outside the "
            "core space; re-learned coefficients need --model.reference_safety patched, or a merged adapter of these very "
            "adapters by Sst"
        )
    return basis.coordinates(update)


def _beyond_utility(one: Pass, at: dict[str, float], experts: Sequence[Adapter], safety: Adapter) -> Pairs:
    """The update at a reference point, less ΔW_u."""
    beyond = at.get("utility", 0.0) - 1.0
    own = [entry["weight"] for entry in one.file.record["utility"]]
    parts = [(expert, beyond * weight) for expert, weight in zip(experts, own, strict=True)]
    parts += [
        (safety if name == "safety" else _read(one, name), weight) for name, weight in at.items() if name != "utility"
    ]
    parts = [(adapter, weight) for adapter, weight in parts if weight]
    adapters = same_inputs([adapter for adapter, _ in parts])
    return weighted_sum([adapter.pairs for adapter in adapters], [weight for _, weight in parts]) if parts else {}


def _read(one: Pass, name: str) -> Adapter:
    """An adapter that the reference point names itself, as it was when the pass ran."""
    known = one.file.record.get("reference_identity") or {}
    try:
        adapter = read_adapter(name)
    except InputError as error:
        raise InputError(f"{one.path}: measured at the adapter {name}, which cannot be read: {error}") from None
    if known.get(name) != adapter.identity:
        raise InputError(f"{one.path}: measured at the adapter {name}, whose weights have changed since; measure again")
    return adapter
