"""Magnitude pruning: the largest elements of each update, added."""

from collections.abc import Mapping

from src.adapters.deltas import Delta
from src.merge.base import FisherPair, Patch
from src.merge.combination import as_expert
from src.merge.elementwise import ElementWise, Sparsifier
from src.merge.ranges import share
from src.merge.sparsify import keep_largest


class MagnitudePrune(ElementWise):
    """Keep each update's largest elements and sum: PEFT's ``magnitude_prune``, TIES (2306.01708) without election.

    Full rank. No paper of its own.

    Args:
        density: Share of elements that each update keeps, per module, above 0 to 1.
        patch_only: As a method: prune the safety update alone and leave the utility update whole. The control of a
            patch's largest elements.
    """

    AS_METHOD = ("patch_only",)

    def __init__(self, density: float = 0.2, patch_only: bool = False) -> None:
        self.density, self.patch_only = share(density, "MagnitudePrune density"), patch_only

    def sparsifier(self, delta: Delta, key: str, module: str) -> Sparsifier:
        """Trim one module's update."""
        return keep_largest(delta, self.density)

    def patch(self, utility: Mapping[str, Delta], safety: Mapping[str, Delta], fisher: FisherPair | None) -> Patch:
        """What pruning both and adding changes, or the pruned safety update."""
        if not self.patch_only:
            return super().patch(utility, safety, fisher)
        pruned = self.combine([as_expert(safety, "safety")])
        return Patch(pruned.deltas, pruned.findings)
