"""Element-wise combinations: sparsify each update, elect a sign, sum what agrees.

    S_i = sparsify(ΔW_i),   ΔW = λ · Σ_i w_i S_i ⊙ m_i / divisor

with two conventions for the election (mask m_i and divisor), which agree where all weights are 1:

* ``peft`` (2306.01708 as PEFT writes it): sign of Σ S_i, unweighted; the divisor counts the agreeing updates;
* ``mergekit``: sign of Σ w_i S_i; the divisor is the sum of the agreeing weights.

Results are full rank. They are evaluated in blocks of rows, so the number of updates costs time but no memory.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import copysign, inf
from typing import Literal

import torch

from src.adapters.deltas import Delta, LazyDelta
from src.merge.combination import Combination, Combined, Expert, common_shape, module_names

Election = Literal["peft", "mergekit", "none"]
Majority = Literal["total", "frequency"]
Sparsifier = Callable[[torch.Tensor, slice], torch.Tensor]
"""A block of an update and its rows to the sparse block."""


@dataclass(frozen=True)
class Rule:
    """How sparse updates become one: the settings of :func:`elect_and_sum`, and the factor λ of the result."""

    election: Election = "none"
    majority: Majority = "total"
    normalise: bool = False
    scale: float = 1.0


class ElementWise(Combination):
    """A combination that treats every element of the updates alone, given statistics of the whole update."""

    full_rank = True
    _rule = Rule()

    @abstractmethod
    def sparsifier(self, delta: Delta, key: str, module: str) -> Sparsifier:
        """Look at one whole update, once; returns what sparsifies its blocks."""

    def prepared(self, experts: Sequence[Expert]) -> Sequence[Mapping[str, Sparsifier]]:
        """Of each expert the modules' sparsifiers that need a look at the whole expert; none by default."""
        return [{} for _ in experts]

    def combine(self, experts: Sequence[Expert]) -> Combined:
        """Combine lazily, module by module."""
        prepared = self.prepared(experts)
        return Combined({name: self._module(name, experts, prepared) for name in module_names(experts)})

    def _module(self, name: str, experts: Sequence[Expert], prepared: Sequence[Mapping[str, Sparsifier]]) -> LazyDelta:
        given = [(expert, own) for expert, own in zip(experts, prepared, strict=True) if name in expert.deltas]
        present = [expert for expert, _ in given]
        every = [expert.weight for expert in experts]
        sparsifiers: list[Sparsifier] = []

        def evaluate(rows: slice) -> torch.Tensor:
            if not sparsifiers:
                sparsifiers.extend(own.get(name) or self.sparsifier(e.deltas[name], e.key, name) for e, own in given)
            sparse = [
                sparsify(expert.deltas[name].block(rows), rows)
                for sparsify, expert in zip(sparsifiers, present, strict=True)
            ]
            return apply_rule(self._rule, sparse, [expert.weight for expert in present], sum(every))

        return LazyDelta(common_shape(name, experts), evaluate)


def apply_rule(rule: Rule, sparse: list[torch.Tensor], weights: list[float], total_weight: float) -> torch.Tensor:
    """Merge blocks of the updates that have the module; ``total_weight`` counts those that lack it too."""
    if rule.election != "none":
        merged = elect_and_sum(
            sparse, weights, election=rule.election, majority=rule.majority, normalise=rule.normalise
        )
    else:
        merged = weighted(sparse, weights)
        if rule.normalise and abs(total_weight) >= 1e-8:
            merged /= total_weight
    return merged if rule.scale == 1.0 else merged * rule.scale


def weighted(blocks: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """``Σ w_i S_i``."""
    total = blocks[0] * weights[0]
    for block, weight in zip(blocks[1:], weights[1:], strict=True):
        total.add_(block, alpha=_factor(weight, total))
    return total


def _factor(weight: float, like: torch.Tensor) -> float:
    """The weight, infinite where the number format of a tensor cannot hold it (torch refuses such a factor)."""
    return weight if abs(weight) <= torch.finfo(like.dtype).max else copysign(inf, weight)


def elect_and_sum(
    blocks: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    election: Literal["peft", "mergekit"],
    majority: Majority,
    normalise: bool,
) -> torch.Tensor:
    """Elect one sign per element and sum the updates that have it.

    Args:
        blocks: Sparse updates of equal shape; zeros never agree, and an elected sum of 0 counts as plus.
        weights: One per update.
        election: Whether the sign is elected by unweighted (``peft``) or by weighted updates (``mergekit``).
        majority: ``total`` elects the sign of the sum, ``frequency`` that of the sum of signs.
        normalise: Divide by the number of agreeing updates (``peft``) or the sum of their weights (``mergekit``).
    """
    voters = list(blocks) if election == "peft" else [b * w for b, w in zip(blocks, weights, strict=True)]
    votes = voters if majority == "total" else [voter.sign() for voter in voters]
    side = (weighted(votes, [1.0] * len(votes)) >= 0).to(blocks[0].dtype).mul_(2).sub_(1)
    total, divisor = torch.zeros_like(blocks[0]), torch.zeros_like(blocks[0])
    for voter, weight in zip(voters, weights, strict=True):
        # Magnitudes where the sign agrees, zeros elsewhere; then ones where it agrees.
        agreeing = (voter * side).clamp_(min=0)
        factor = _factor(weight, total)
        total.add_(agreeing, alpha=factor if election == "peft" else 1.0)
        divisor.add_(agreeing.sign_(), alpha=factor if election == "mergekit" else 1.0)
    total.mul_(side)
    if not normalise:
        return total
    if election == "peft":
        return total / divisor.clamp_(min=1.0)
    divisor[divisor == 0] = 1.0
    return total / divisor
