"""Accumulates the scores of a pass: every example's score is kept, in the order of the data's rows.

Legend of shapes: n examples, k stored scores (n times the draws of labels), D coordinates.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from src.fisher.accumulate import Accumulator
from src.fisher.base import Shapes
from src.fisher.lowrank import LowRankFisher
from src.fisher.scores import core_score


@dataclass(frozen=True)
class ScoreOrder:
    """The order in which scores are stored, by row, token and draw, and what is known of their examples.

    Attributes:
        order: (k,) int64 positions.
        groups: (n,) row of each example, where rows have several; else None.
        weights: (n,) weight of each example, where any is not 1; else None.
    """

    order: torch.Tensor
    groups: torch.Tensor | None
    weights: torch.Tensor | None


def score_order(keys: torch.Tensor, weights: torch.Tensor, count: int) -> ScoreOrder:
    """The order of scores.

    Args:
        keys: (k, 2) row and answer token of each score.
        weights: (k,) float64 weight of each score: its example's, divided by the number of draws.
        count: n, the number of examples; each has k/n scores.
    """
    order = keys[:, 1].argsort(stable=True)
    order = order[keys[order, 0].argsort(stable=True)]
    draws = len(keys) // count
    groups = keys[order][::draws, 0].clone() if bool((keys[:, 1] > 0).any()) else None
    own = weights[order].view(count, draws).sum(1)
    return ScoreOrder(order, groups, None if torch.allclose(own, torch.ones_like(own), rtol=1e-12) else own)


class LowRankAccumulator(Accumulator[LowRankFisher]):
    """Accumulates :class:`LowRankFisher` in memory; scores stay float32 (or wider), ordered by row and token."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__(shapes, halves=False)
        self._parts_now: dict[str, torch.Tensor] = {}
        self._scores: list[torch.Tensor] = []
        self._keys: list[torch.Tensor] = []
        self._weights: list[torch.Tensor] = []

    def update(self, name: str, delta: torch.Tensor, x: torch.Tensor) -> None:
        """Add one module; the backward pass is complete with its last one."""
        self._parts_now[name] = core_score(delta, x)
        if len(self._parts_now) < len(self.shapes):
            return
        batch, kept = self._batch, self._batch.weight > 0
        # Copied once: each copy to the host waits for the GPU.
        scores = torch.cat([self._parts_now[module] for module in self.shapes], dim=1).cpu()[kept]
        self._scores.append(scores * batch.weight[kept, None].sqrt().to(scores.dtype))
        self._keys.append(torch.stack([batch.index[kept], torch.full_like(batch.index[kept], batch.token)], dim=1))
        self._weights.append(batch.weight[kept])
        self._parts_now = {}

    def sums(self) -> Iterator[torch.Tensor]:
        """No sums: scores go into shards, which :func:`src.fisher.shards.join_scores` puts together."""
        yield from ()

    def unsound(self) -> str | None:
        """The first module with NaN or infinite scores, if any."""
        sizes = [p * q for p, q in self.shapes.values()]
        sound = [torch.isfinite(part).all(0) for part in self._scores]
        modules = zip(self.shapes, *(part.split(sizes) for part in sound), strict=True)
        return next((name for name, *parts in modules if not all(part.all() for part in parts)), None)

    def state(self) -> dict[str, torch.Tensor]:
        """Scores, their keys and weights."""
        lists = {"scores": self._scores, "keys": self._keys, "weights": self._weights}
        return {"counts": self.counts} | {name: torch.cat(parts) for name, parts in lists.items() if parts}

    def finish(self) -> LowRankFisher:
        """The Fisher matrix.

        Raises:
            ValueError: there was no example.
        """
        if not sum(len(part) for part in self._scores):
            raise ValueError("a Fisher matrix needs at least one example")
        count = round(self.counts.sum().item())
        found = score_order(torch.cat(self._keys), torch.cat(self._weights), count)
        return LowRankFisher(torch.cat(self._scores)[found.order], count, found.groups, weights=found.weights)
