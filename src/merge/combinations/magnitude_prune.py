"""Magnitude pruning: the largest elements of each update, summed."""

from src.adapters.deltas import Delta
from src.merge.combination import share
from src.merge.elementwise import ElementWise, Sparsifier
from src.merge.sparsify import keep_largest


class MagnitudePrune(ElementWise):
    """Keep each update's largest elements and sum: PEFT's ``magnitude_prune``, TIES (2306.01708) without election.

    Full rank. No paper of its own.

    Args:
        density: Share of elements that each update keeps, per module, above 0 to 1.
    """

    def __init__(self, density: float = 0.2) -> None:
        self.density = share(density, "MagnitudePrune density")

    def sparsifier(self, delta: Delta, key: str, module: str) -> Sparsifier:
        """Trim one module's update."""
        return keep_largest(delta, self.density)
