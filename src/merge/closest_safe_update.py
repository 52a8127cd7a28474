"""The closest update that mostly stays in the subspace of alignment, in closed form (after 2605.30640).

    X = argmin ‖X − ΔW_u‖² + μ ‖X − P X‖² = P ΔW_u + (ΔW_u − P ΔW_u) / (1 + μ)

P projects on the k leading left singular vectors of V = W_aligned − W_base.
"""

from collections.abc import Mapping

import torch

from src.adapters.deltas import Delta, Deltas, combined, left_product, squared_norm
from src.adapters.geometry import spaces
from src.adapters.pairs import LowRankPair
from src.adapters.truncate import truncate
from src.errors import InputError
from src.merge.aligned import Aligned, alignment
from src.merge.base import FisherPair, Patch


class ClosestSafeUpdate(Aligned):
    """Shrink what of ΔW_u lies outside the subspace of W_aligned − W_base, by minimum change (after 2605.30640).

    Not the paper's own method: its text was not at hand, only its summary. There an update has aligned, partially
    aligned and off-subspace components, and the last are attenuated by their relative energy; here are two parts and
    one factor, 1 / (1 + μ), for all that lies outside.
    Strength 1 is the minimum; those below it lie on the line from ΔW_u to it.

    Args:
        penalty: μ, price of one unit of squared norm outside, at least 0; 0 changes nothing, infinity
            (written ``.inf``) projects.
        rank: k, dimension of the subspace per module, at least 1.
        aligned: Directory of the aligned model or of an adapter that holds W_aligned − W_base; unset takes the
            safety adapter.
        base: Directory of the base model's weights, where ``aligned`` is a model.
    """

    def __init__(
        self, penalty: float = 1.0, rank: int = 16, aligned: str | None = None, base: str | None = None
    ) -> None:
        if not penalty >= 0:
            raise InputError(f"method.penalty is {penalty}; expected a number of at least 0")
        if rank < 1:
            raise InputError(f"method.rank is {rank}; expected at least 1")
        self.penalty, self.rank, self.aligned, self.base = penalty, rank, aligned, base

    @property
    def needs_safety(self) -> bool:
        """Only where it stands for the direction of alignment."""
        return self.aligned is None

    def patch(self, utility: Mapping[str, Delta], safety: Mapping[str, Delta], fisher: FisherPair | None) -> Patch:
        """``−μ/(1 + μ) · (ΔW_u − P ΔW_u)``."""
        share = 1.0 if self.penalty == float("inf") else self.penalty / (1 + self.penalty)
        changes: Deltas = {}
        outside: dict[str, float] = {}
        with alignment(self.aligned, self.base, safety, utility) as directions:
            for name, direction in directions.items():
                delta, basis = utility[name], self._basis(direction)
                norm = squared_norm(delta)
                if isinstance(delta, LowRankPair):
                    b = delta.b.double()
                    rest = LowRankPair(delta.a.double(), b - basis @ (basis.T @ b))
                    away, changes[name] = rest.squared_norm(), rest.scaled(-share)
                else:
                    inside = LowRankPair(left_product(basis, delta), basis)
                    away = norm - inside.squared_norm()
                    changes |= combined([{name: delta}, {name: inside}], [-share, share])
                outside[name] = max(0.0, away) / norm if norm > 0 else 0.0
        return Patch(changes, {"energy_outside": outside})

    def _basis(self, direction: Delta) -> torch.Tensor:
        pair = truncate(direction, rank=self.rank, energy=None).pair
        return spaces(pair)[0]
