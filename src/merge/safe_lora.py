"""Safe LoRA (2405.16833): project the utility update where it leaves the direction of alignment.

V = W_aligned − W_base,   C = V Vᵀ / ‖V‖_F,   ΔW ← C ΔW where cos(C ΔW, ΔW) ≤ τ
"""

from collections.abc import Mapping

from src.adapters.geometry import cosine
from src.adapters.pairs import LowRankPair, Pairs
from src.errors import InputError
from src.merge.aligned import alignment, projected
from src.merge.base import FisherPair, MergeMethod, Patch


class SafeLora(MergeMethod):
    """Safe LoRA (2405.16833): replace ΔW_u by ``C ΔW_u`` in modules where both differ; no safety adapter is added.

    Args:
        tau: Cosine between ``C ΔW_u`` and ΔW_u at or under which a module is projected, -1 to 1 (the code's .35).
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

    def patch(
        self, utility: Mapping[str, LowRankPair], safety: Mapping[str, LowRankPair], fisher: FisherPair | None
    ) -> Patch:
        """``C ΔW_u − ΔW_u`` in the modules that are projected."""
        pairs: Pairs = {}
        cosines: dict[str, float] = {}
        with alignment(self.aligned, self.base, safety, utility) as directions:
            for name, pair in utility.items():
                inside = projected(directions[name], pair)
                cosines[name] = cosine(inside, pair)
                if cosines[name] <= self.tau:
                    pairs[name] = LowRankPair(pair.a.double(), inside.b - pair.b.double())
        return Patch(pairs, {"projected": list(pairs), "cosines": cosines})
