"""DARE (2311.03099): drop elements at random and rescale the rest."""

from src.adapters.deltas import Delta
from src.merge.elementwise import Election, ElementWise, Rule, Sparsifier
from src.merge.ranges import share
from src.merge.sparsify import Rescale, drop_at_random


class Dare(ElementWise):
    """DARE (2311.03099): keep each element of each update with probability ``density``, rescale, and sum.

    Masks are functions of (seed, expert, module), so order and sharding change nothing. Full rank.

    Args:
        density: Probability with which an element is kept, above 0 to 1.
        rescale: ``1/p`` divides by the density (unbiased); ``l1`` restores the sum of magnitudes; ``none``.
        election: ``none`` sums (DARE-linear); ``peft`` and ``mergekit`` elect signs as TIES does (DARE-TIES).
        normalise: Divide by the agreeing updates or weights, or by the sum of weights without election. PEFT's
            ``dare_ties`` is ``peft`` with it, mergekit's is ``mergekit`` without.
        seed: Seed of the masks.
    """

    def __init__(
        self,
        density: float = 0.5,
        rescale: Rescale = "1/p",
        election: Election = "none",
        normalise: bool = False,
        seed: int = 0,
    ) -> None:
        self.density = share(density, "Dare density")
        self.rescale, self.election, self.normalise, self.seed = rescale, election, normalise, seed
        self._rule = Rule(election, normalise=normalise)

    def sparsifier(self, delta: Delta, key: str, module: str) -> Sparsifier:
        """Drop at random."""
        return drop_at_random(delta, self.density, self.rescale, self.seed, key, module)
