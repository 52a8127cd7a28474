"""DELLA-Merging (2406.11617): drop at random, the small elements more often."""

from src.adapters.deltas import Delta
from src.errors import InputError
from src.merge.elementwise import Election, ElementWise, Rule, Sparsifier
from src.merge.ranges import finite, share
from src.merge.sparsify import Rescale, drop_by_rank


class Della(ElementWise):
    """DELLA (2406.11617): keep each element with a probability linear in its magnitude rank in its row; elect, average.

    Full rank; masks are functions of (seed, expert, module).

    Args:
        density: Mean probability with which an element is kept, above 0 to 1.
        epsilon: Half the spread: a row's smallest element is kept with density − epsilon, its largest with density +
            epsilon. Both must lie above 0 and at most at 1.
        rescale: ``1/p`` divides each element by its own probability (unbiased); ``l1`` restores the sum of magnitudes
            (mergekit's choice, biased); ``none``.
        election: How signs are elected, as in TIES; ``none`` elects nothing (DELLA-linear, which sums, with
            ``normalise`` false).
        normalise: Divide by the agreeing updates or weights, or by the sum of weights without election.
        scale: Factor λ of the result; 1 leaves it.
        seed: Seed of the masks.
    """

    def __init__(
        self,
        density: float = 0.5,
        epsilon: float = 0.15,
        rescale: Rescale = "1/p",
        election: Election = "mergekit",
        normalise: bool = True,
        scale: float = 1.0,
        seed: int = 0,
    ) -> None:
        self.density = share(density, "Della density")
        if not (epsilon >= 0 and density - epsilon > 0 and density + epsilon <= 1):
            raise InputError(
                f"Della epsilon is {epsilon}; density - epsilon must be above 0 and density + epsilon at most 1 "
                f"(density is {density})"
            )
        self.epsilon, self.rescale, self.election = epsilon, rescale, election
        self.normalise, self.scale, self.seed = normalise, finite(scale, "Della scale"), seed
        self._rule = Rule(election, normalise=normalise, scale=scale)

    def sparsifier(self, delta: Delta, key: str, module: str) -> Sparsifier:
        """Drop by rank."""
        return drop_by_rank(delta, self.density, self.epsilon, self.rescale, self.seed, key, module)
