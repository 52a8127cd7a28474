"""Reference points of a Fisher matrix: the base model plus a weighted sum of adapters."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from src.adapters.pairs import Pairs, weighted_sum
from src.adapters.peft_files import Adapter, read_adapter
from src.adapters.read_together import in_common_terms
from src.errors import InputError

Reference = Literal["base", "utility", "patched"] | dict[str, float]
NAMED: Mapping[str, Mapping[str, float]] = {
    "base": {},
    "utility": {"utility": 1.0},
    "patched": {"utility": 1.0, "safety": 1.0},
}


def reference_weights(reference: Reference) -> dict[str, float]:
    """The weight of each adapter at a reference point."""
    return dict(NAMED[reference] if isinstance(reference, str) else reference)


def reference_update(
    reference: Reference, utility: Sequence[Adapter], weights: Sequence[float], safety: Adapter
) -> Pairs:
    """The update of the base model at a reference point.

    Args:
        reference: ``base`` (θ0), ``utility`` (θ0 + ΔW_u), ``patched`` (θ0 + ΔW_u + ΔW_s), or a weight for each of
            ``utility``, ``safety`` and any other adapter (directory or hub id).
        utility: Utility adapters.
        weights: Their weights in ΔW_u.
        safety: Safety adapter.
    """
    chosen = reference_weights(reference)
    parts: list[tuple[Adapter, float]] = []
    for name, weight in chosen.items():
        own_weights = weights if name == "utility" else [1.0]
        if not all(math.isfinite(weight * own) for own in own_weights):
            raise InputError(
                f"reference {chosen}: the weight of {name} is {weight} times {own_weights}; expected finite numbers"
            )
        if name == "utility":
            parts += [(adapter, weight * own) for adapter, own in zip(utility, weights, strict=True)]
        else:
            parts.append((safety if name == "safety" else read_adapter(name), weight))
    adapters = in_common_terms([adapter for adapter, _ in parts])
    return weighted_sum([adapter.pairs for adapter in adapters], [weight for _, weight in parts])


def named_adapters(reference: Reference) -> dict[str, Adapter]:
    """The adapters that a reference point names itself, by those names."""
    named = [] if isinstance(reference, str) else [name for name in reference if name not in ("utility", "safety")]
    return {name: read_adapter(name) for name in named}


def named_by(references: Iterable[Reference]) -> list[Adapter]:
    """Every adapter that some reference points name themselves, once."""
    found: dict[str, Adapter] = {}
    for reference in references:
        found |= named_adapters(reference)
    return list(found.values())
