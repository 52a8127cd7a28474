"""The diagonal of the Fisher matrix, ``f_j = (1/n) Σ_i g_{i,j}²``, in core or in weight coordinates.

Every example's score is squared by itself: the square of a batch's mean gradient is smaller by about the batch size
(1905.12558). In weight coordinates g_i = Σ_t δ_t x_tᵀ is as large as the weight, so rows are taken a few at a time, in
the format of their scores; what these few add up to (on a GPU, the rows of a backward pass) is added to a sum in
float64. :mod:`src.fisher.magnitude` takes the mean of |g| in the same way.

Legend of shapes: N examples, T tokens, p and q sides of a core (O and I of a weight), H halves of the examples.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import TypeVar

import torch

from src.fisher.scores import core_score
from src.fisher.summed import SummedAccumulator, SummedFisher

ENTRIES = 2**22
"""Entries of scores that are taken together: bounds the temporaries beside one module's sum."""


@dataclass(frozen=True)
class PerCoordinate(SummedFisher):
    """One mean per coordinate; ``sums`` holds the sum of each module, (H, p·q)."""

    @staticmethod
    def entry(p: int, q: int) -> tuple[int, ...]:
        """Shape of one half's sum of a module."""
        return (p * q,)

    def module_trace(self, name: str) -> float:
        """Sum of a module's means."""
        return self.mean(name).sum().item()


@dataclass(frozen=True)
class DiagonalFisher(PerCoordinate):
    """Per-coordinate mean squares."""

    representation = "diagonal"

    def module_diagonal(self, name: str) -> torch.Tensor:
        """(p·q,) diagonal of a module's block."""
        return self.mean(name)

    def module_product(self, name: str, vectors: torch.Tensor) -> torch.Tensor:
        """(P, p·q) products of a module's block."""
        return vectors * self.module_diagonal(name)


Means = TypeVar("Means", bound=PerCoordinate)


class CoordinateAccumulator(SummedAccumulator[Means]):
    """Accumulates a mean per coordinate; scores are formed a few examples at a time."""

    @abstractmethod
    def measure_(self, scores: torch.Tensor) -> torch.Tensor:
        """What is averaged, of scores (N, p·q), in place."""

    def update(self, name: str, delta: torch.Tensor, x: torch.Tensor) -> None:
        """Add one module of a backward pass."""
        p, q = self.shapes[name]
        rows = max(1, ENTRIES // (p * q))
        for half, weight, (deltas, inputs) in self._parts(delta, x):
            chunks = torch.arange(len(weight), device=delta.device).split(rows)
            kept = self._sums[name][half]
            # Each copy to the host waits for the GPU, and is as large as the weight: several chunks are added up first.
            apart = len(chunks) > 1 and delta.device != kept.device
            total = torch.zeros(kept.shape, dtype=delta.dtype, device=delta.device) if apart else kept
            for some in chunks:
                values = self.measure_(core_score(deltas[some], inputs[some]))
                total += (weight[some].to(values.dtype) @ values).to(total.device)
            if apart:
                kept += total.cpu()


class DiagonalAccumulator(CoordinateAccumulator[DiagonalFisher]):
    """Accumulates :class:`DiagonalFisher`."""

    kind = DiagonalFisher

    def measure_(self, scores: torch.Tensor) -> torch.Tensor:
        """``g²``."""
        return scores.square_()
