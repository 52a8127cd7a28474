"""Task arithmetic (2212.04089): the weighted sum of updates, exact."""

from collections.abc import Mapping, Sequence

from src.adapters.deltas import Delta, combined
from src.merge.base import FisherPair, Patch
from src.merge.combination import Combination, Combined, Expert


class TaskArithmetic(Combination):
    """Add the updates: ``Σ w_i ΔW_i`` of experts, ``ΔW_u + α ΔW_s`` of the safety adapter (2212.04089). Exact.

    Strength alpha is the paper's scaling coefficient λ of the safety adapter; those of experts are utility_weights.
    """

    def combine(self, experts: Sequence[Expert]) -> Combined:
        """The weighted sum."""
        return Combined(combined([expert.deltas for expert in experts], [expert.weight for expert in experts]))

    def sum_weights(self, weights: Sequence[float]) -> list[float]:
        """The weights themselves."""
        return list(weights)

    def patch(self, utility: Mapping[str, Delta], safety: Mapping[str, Delta], fisher: FisherPair | None) -> Patch:
        """The safety update itself."""
        return Patch(dict(safety))
