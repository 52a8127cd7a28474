"""AlignGuard as a projection after training, ``agl_posthoc`` (after 2508.02079, which regularises training).

P = the k leading eigenvectors of F_s in the core space,   ΔW_u ← ΔW_u − γ P ΔW_u,   then + ΔW_s
"""

import logging
from collections.abc import Mapping

import torch

from src.adapters.deltas import Delta, Deltas, combined, squared_norm
from src.errors import InputError
from src.fisher.lowrank import LowRankFisher
from src.gevp.leading import leading_directions
from src.merge.base import FisherPair, MergeMethod, Patch
from src.merge.ranges import share

log = logging.getLogger(__name__)

OUTSIDE = 0.1
"""Share of ΔW_u outside the core space above which a warning says so."""
NO_FISHER = "method AlignGuardPosthoc needs Fisher files of the representation lowrank: --fisher"


class AlignGuardPosthoc(MergeMethod):
    """AlignGuard (2508.02079) after training: remove from ΔW_u its alignment-critical part, then add ΔW_s.

    The paper regularises training by the projector; this is a named baseline, not the paper's method. Needs Fisher
    files in core coordinates with ``--model.representation lowrank`` and ``--model.basis union``, of which F_s alone
    is used: without the union only what of ΔW_u lies in the safety adapter's own space can be removed. Strength alpha
    multiplies the removal and the safety update alike.

    Args:
        k: Number of leading eigen-directions of F_s that count as alignment-critical, over all modules together; at
            least 1.
        gamma: Share of the utility update removed along them, 0 to 1.
        add_safety: Add the safety update too; false only removes.
    """

    needs_fisher = True
    representations = ("lowrank",)
    reads_utility_fisher = False

    def __init__(self, k: int = 32, gamma: float = 1.0, add_safety: bool = True) -> None:
        if k < 1:
            raise InputError(f"method.k is {k}; expected at least 1")
        share(gamma, "method.gamma", zero=True)
        self.k, self.gamma, self.add_safety = k, gamma, add_safety

    def patch(self, utility: Mapping[str, Delta], safety: Mapping[str, Delta], fisher: FisherPair | None) -> Patch:
        """``ΔW_s − γ P ΔW_u``.

        Raises:
            InputError: the Fisher file does not hold scores, or k exceeds their number.
        """
        if fisher is None or not isinstance(fisher.safety, LowRankFisher):
            raise InputError(NO_FISHER)
        directions = leading_directions(fisher.safety, self.k)
        if (outside := fisher.basis.residual(utility)) > OUTSIDE:
            log.warning(
                "method AlignGuardPosthoc: %.0f %% of the utility update's norm lies outside the core space of the "
                "Fisher files, where nothing can be removed; measure with --model.basis union",
                100 * outside,
            )
        c = fisher.basis.coordinates(utility)
        critical = directions @ (directions.T @ c)
        removed = fisher.basis.patch(critical)
        deltas = self._added(safety, removed)
        total = sum(squared_norm(delta) for delta in utility.values())
        return Patch(deltas, {"utility_energy_critical": critical.square().sum().item() / total if total > 0 else 0.0})

    def outline(
        self, utility: Mapping[str, Delta], safety: Mapping[str, Delta], fisher: FisherPair | None
    ) -> Mapping[str, Delta]:
        """The safety update and zeros in the core space: no eigenvectors are computed."""
        if fisher is None:
            raise InputError(NO_FISHER)
        return self._added(safety, fisher.basis.patch(torch.zeros(fisher.basis.dim, dtype=torch.float64)))

    def _added(self, safety: Mapping[str, Delta], removed: Mapping[str, Delta]) -> Deltas:
        return combined([safety, removed], [float(self.add_safety), -self.gamma])
