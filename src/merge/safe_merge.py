"""SafeMERGE (2503.17239): mix in the safety update where the utility update leaves the direction of alignment.

ΔW ← a ΔW_u + (1 − a) ΔW_s where cos(C ΔW_u, ΔW_u) < τ,   C = V Vᵀ / ‖V‖_F,   V = W_aligned − W_base
"""

from collections.abc import Mapping

from src.adapters.deltas import Delta, combined
from src.adapters.geometry import cosine
from src.errors import InputError
from src.merge.aligned import Aligned, alignment, projected
from src.merge.base import FisherPair, Patch
from src.merge.ranges import share


class SafeMerge(Aligned):
    """SafeMERGE (2503.17239): interpolate with the safety adapter in the modules that drifted from alignment.

    Strength 1 is the paper's merge; those below it lie on the line from ΔW_u to it. It merges ΔW, as the formula says;
    the authors' code mixes factors (PEFT's ``linear``), which adds the cross terms B_u A_s and B_s A_u. Modules
    without a direction of alignment (V = 0) stay as they are; the authors' code calls their cosine 0 and merges them.

    Args:
        tau: Cosine between ``C ΔW_u`` and ΔW_u under which a module is merged, -1 to 1 (the code's .35; the paper's
            .6 to .8).
        keep: Weight of the utility update in those modules, 0 to 1 (the code's .8; the paper's .7).
        aligned: Directory of the aligned model or of an adapter that holds W_aligned − W_base; unset takes the
            safety adapter.
        base: Directory of the base model's weights, where ``aligned`` is a model.
    """

    def __init__(
        self, tau: float = 0.35, keep: float = 0.8, aligned: str | None = None, base: str | None = None
    ) -> None:
        if not -1 <= tau <= 1:
            raise InputError(f"method.tau is {tau}; expected a cosine, -1 to 1")
        self.tau, self.keep = tau, share(keep, "method.keep", zero=True)
        self.aligned, self.base = aligned, base

    def patch(self, utility: Mapping[str, Delta], safety: Mapping[str, Delta], fisher: FisherPair | None) -> Patch:
        """``(1 − a)(ΔW_s − ΔW_u)`` in the modules that are merged."""
        with alignment(self.aligned, self.base, safety, utility) as directions:
            cosines = {name: cosine(projected(v, utility[name]), utility[name]) for name, v in directions.items()}
        merged = [name for name, value in cosines.items() if value < self.tau]
        both = [{name: deltas[name] for name in merged if name in deltas} for deltas in (safety, utility)]
        return Patch(combined(both, [1.0 - self.keep, self.keep - 1.0]), {"merged": merged, "cosines": cosines})
