"""TIES-Merging (2306.01708): trim, elect a sign, average what agrees."""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Literal

from src.adapters.deltas import Delta, blocks
from src.merge.combination import Expert
from src.merge.elementwise import ElementWise, Majority, Rule, Sparsifier
from src.merge.ranges import finite, share
from src.merge.selection import kept_count, kth_magnitude
from src.merge.sparsify import above, keep_largest


class Ties(ElementWise):
    """TIES-Merging (2306.01708): keep each update's largest elements, elect a sign per element, average what has it.

    The result is full rank: choose ``rank``, ``energy`` or ``full_model`` for it.

    Args:
        density: Share of elements that each update keeps, above 0 to 1 (the paper's 20 %).
        convention: ``peft`` elects by unweighted updates and divides by the number of agreeing ones; ``mergekit``
            elects by weighted updates and divides by the agreeing weights. Equal where all weights are 1. By the first
            an expert of weight 0 still votes, and counts among those that agree.
        trim: Keep the largest elements of each module (``tensor``) or of the whole update (``global``, the paper's;
            not as ``inner`` of another combination, which sees one module at a time).
        majority: ``total`` elects the sign of the sum, ``frequency`` that of most updates.
        normalise: Divide by the agreeing updates or weights; false adds them up.
        scale: Factor λ of the result; 1 leaves it.
    """

    def __init__(
        self,
        density: float = 0.2,
        convention: Literal["peft", "mergekit"] = "peft",
        trim: Literal["tensor", "global"] = "tensor",
        majority: Majority = "total",
        normalise: bool = True,
        scale: float = 1.0,
    ) -> None:
        self.density = share(density, "Ties density")
        self.convention, self.trim, self.majority = convention, trim, majority
        self.normalise, self.scale = normalise, finite(scale, "Ties scale")
        self._rule = Rule(convention, majority, normalise, scale)

    def sparsifier(self, delta: Delta, key: str, module: str) -> Sparsifier:
        """Trim one module's update."""
        return keep_largest(delta, self.density)

    def prepared(self, experts: Sequence[Expert]) -> Sequence[Mapping[str, Sparsifier]]:
        """One threshold per expert where trimming is global."""
        if self.trim == "tensor" or self.density >= 1.0:
            return super().prepared(experts)
        return [dict.fromkeys(expert.deltas, self._global(expert)) for expert in experts]

    def _global(self, expert: Expert) -> Sparsifier:
        deltas = list(expert.deltas.values())
        count = kept_count(self.density, sum(delta.shape[0] * delta.shape[1] for delta in deltas))
        return above(kth_magnitude(lambda: chain.from_iterable(map(blocks, deltas)), count))
