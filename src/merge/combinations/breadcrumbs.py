"""Model Breadcrumbs (2312.06795): neither the outliers nor the small elements."""

from src.adapters.deltas import Delta, blocks
from src.errors import InputError
from src.merge.elementwise import Election, ElementWise, Rule, Sparsifier
from src.merge.ranges import share
from src.merge.selection import kept_count, kth_magnitude
from src.merge.sparsify import between


class Breadcrumbs(ElementWise):
    """Model Breadcrumbs (2312.06795): drop each update's largest and smallest elements, and sum. Full rank.

    Thresholds are those of a whole module, as in mergekit; the authors' code takes them row by row.

    Args:
        density: Share of elements that each update keeps, per module, above 0 to 1.
        gamma: Share of elements dropped as outliers, the largest ones; density + gamma is at most 1.
        election: ``none`` sums; ``peft`` and ``mergekit`` elect signs as TIES does.
        normalise: Divide by the agreeing updates or weights, or by the sum of weights without election.
    """

    def __init__(
        self, density: float = 0.9, gamma: float = 0.01, election: Election = "none", normalise: bool = False
    ) -> None:
        self.density, self.gamma = share(density, "Breadcrumbs density"), share(gamma, "Breadcrumbs gamma", zero=True)
        if density + gamma > 1 + 1e-9:
            raise InputError(f"Breadcrumbs density is {density} and gamma {gamma}; expected a sum of at most 1")
        self.election, self.normalise = election, normalise
        self._rule = Rule(election, normalise=normalise)

    def sparsifier(self, delta: Delta, key: str, module: str) -> Sparsifier:
        """Keep magnitudes between two thresholds."""
        size = delta.shape[0] * delta.shape[1]
        outliers = int(self.gamma * size)
        kept = outliers + kept_count(self.density, size)
        low, high = (kth_magnitude(lambda: blocks(delta), count) for count in (kept, outliers))
        return between(low, high)
