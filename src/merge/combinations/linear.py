"""The weighted mean of updates, exact."""

from collections.abc import Sequence

from src.adapters.deltas import combined
from src.errors import InputError
from src.merge.combination import Combination, Combined, Expert


class Linear(Combination):
    """Average the updates: ``Σ w_i ΔW_i / Σ w_i`` (model soups, 2203.05482). Exact.

    As a method, the safety adapter is one more expert of weight 1: strength 1 is the mean of both.
    """

    def combine(self, experts: Sequence[Expert]) -> Combined:
        """The weighted mean."""
        weights = self.sum_weights([expert.weight for expert in experts])
        return Combined(combined([expert.deltas for expert in experts], weights))

    def sum_weights(self, weights: Sequence[float]) -> list[float]:
        """The weights over their sum."""
        total = sum(weights)
        if abs(total) < 1e-8:
            raise InputError(f"utility_weights sum to {total:g}; the method Linear divides by their sum")
        return [weight / total for weight in weights]
