"""RESTA (2402.11746): add the safety vector, optionally to a task vector thinned by DARE.

θ0 + ΔW_u + γ ΔW_s,   or   θ0 + DARE(ΔW_u) + γ ΔW_s
"""

from collections.abc import Mapping

from src.adapters.deltas import Delta, combined
from src.merge.base import FisherPair, MergeMethod, Patch
from src.merge.combination import as_expert
from src.merge.combinations.dare import Dare
from src.merge.ranges import finite, share


class Resta(MergeMethod):
    """RESTA (2402.11746): add the safety update times gamma; with a density, thin the utility update by DARE first.

    DARE is 2311.03099. Strength alpha multiplies gamma and the thinning alike: 1 is the paper's merge.

    Args:
        gamma: Factor of the safety update, which alpha multiplies too (the paper tunes it; 1 adds it whole).
        density: Share of utility elements that DARE keeps, above 0 to 1; unset leaves the utility update as it is
            (and the result low-rank).
        seed: Seed of DARE's mask.
    """

    def __init__(self, gamma: float = 1.0, density: float | None = None, seed: int = 0) -> None:
        self.gamma, self.seed = finite(gamma, "method.gamma"), seed
        self.density = None if density is None else share(density, "method.density")

    def patch(self, utility: Mapping[str, Delta], safety: Mapping[str, Delta], fisher: FisherPair | None) -> Patch:
        """``γ ΔW_s``, and ``DARE(ΔW_u) − ΔW_u`` where a density is given."""
        if self.density is None:
            return Patch(combined([safety], [self.gamma]))
        thinned = Dare(self.density, seed=self.seed).combine([as_expert(utility, "utility")]).deltas
        return Patch(combined([safety, thinned, utility], [self.gamma, 1.0, -1.0]))
