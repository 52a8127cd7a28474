"""Task arithmetic (2212.04089): the patch is the whole safety update."""

from collections.abc import Mapping

from src.adapters.pairs import LowRankPair
from src.merge.base import FisherPair, MergeMethod, Patch


class TaskArithmetic(MergeMethod):
    """Add the whole safety update: ``θ0 + ΔW_u + α ΔW_s`` (task arithmetic, 2212.04089)."""

    def patch(
        self, utility: Mapping[str, LowRankPair], safety: Mapping[str, LowRankPair], fisher: FisherPair | None
    ) -> Patch:
        """The safety update itself."""
        return Patch(dict(safety))
