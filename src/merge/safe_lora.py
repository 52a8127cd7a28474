"""Safe LoRA (2405.16833): project the utility update where it leaves the direction of alignment.

V = W_aligned − W_base,   C = V Vᵀ / ‖V‖_F,   ΔW ← C ΔW where cos(C ΔW, ΔW) ≤ τ
"""

from collections.abc import Mapping

from src.adapters.deltas import Delta, Deltas, combined
from src.adapters.geometry import cosine
from src.adapters.pairs import LowRankPair
from src.errors import InputError
from src.merge.aligned import Aligned, alignment, projected
from src.merge.base import FisherPair, Patch


class SafeLora(Aligned):
    """Safe LoRA (2405.16833): replace ΔW_u by ``C ΔW_u`` in modules where both differ; no safety adapter is added.

    Strength 1 is the paper's projection; those below it lie on the line from ΔW_u to it.

    Args:
        tau: Cosine between ``C ΔW_u`` and ΔW_u at or under which a module is projected, -1 to 1 (.35 is
            SafeMERGE's; the code has .5, and takes the ten modules of lowest cosine where it is not told otherwise).
        aligned: Directory of the aligned model or of an adapter that holds W_aligned − W_base; unset takes the
            safety adapter.
        base: Directory of the base model's weights, where ``aligned`` is a model.
    """

    def __init__(self, tau: float = 0.35, aligned: str | None = None, base: str | None = None) -> None:
        if not -1 <= tau <= 1:
            raise InputError(f"method.tau is {tau}; expected a cosine, -1 to 1")
        self.tau, self.aligned, self.base = tau, aligned, base

    @property
    def needs_safety(self) -> bool:
        """Only where it stands for the direction of alignment."""
        return self.aligned is None

    def patch(self, utility: Mapping[str, Delta], safety: Mapping[str, Delta], fisher: FisherPair | None) -> Patch:
        """``C ΔW_u − ΔW_u`` in the modules that are projected."""
        inside: Deltas = {}
        cosines: dict[str, float] = {}
        with alignment(self.aligned, self.base, safety, utility) as directions:
            for name, direction in directions.items():
                inside[name] = projected(direction, utility[name])
                cosines[name] = cosine(inside[name], utility[name])
        drifted = [name for name, value in cosines.items() if value <= self.tau]
        changes = {name: _change(inside[name], utility[name]) for name in drifted}
        return Patch(changes, {"projected": drifted, "cosines": cosines})


def _change(inside: Delta, delta: Delta) -> Delta:
    """``C ΔW − ΔW``, in the factors of ΔW where it has some."""
    if isinstance(inside, LowRankPair) and isinstance(delta, LowRankPair):
        return LowRankPair(delta.a.double(), inside.b - delta.b.double())
    return combined([{"": inside}, {"": delta}], [1.0, -1.0])[""]
