"""The diagonal of the Fisher matrix, ``f_j = (1/n) Σ_i g_{i,j}²``, in core or in weight coordinates.

Every example's score is squared by itself: the square of a batch's mean gradient is smaller by about the batch size
(1905.12558). In weight coordinates g_i = Σ_t δ_t x_tᵀ is as large as the weight, so rows are taken a few at a time.

Legend of shapes: N examples, T tokens, p and q sides of a core (O and I of a weight), H halves of the examples.
"""

from dataclasses import dataclass

import torch

from src.fisher.accumulate import Allocate, zeros
from src.fisher.base import Shapes
from src.fisher.scores import core_score
from src.fisher.summed import SummedAccumulator, SummedFisher

ENTRIES = 2**22
"""Entries of scores that are squared together: bounds the temporaries beside one module's sum."""


@dataclass(frozen=True)
class DiagonalFisher(SummedFisher):
    """Per-coordinate mean squares; ``sums`` holds ``Σ g²`` of each module, (H, p·q)."""

    representation = "diagonal"

    def module_diagonal(self, name: str) -> torch.Tensor:
        """(p·q,) diagonal of a module's block."""
        return self.mean(name)

    def diagonal(self) -> torch.Tensor:
        """(D,) diagonal."""
        return torch.cat([self.module_diagonal(name) for name in self.shapes])

    def module_trace(self, name: str) -> float:
        """Trace of a module's block."""
        return self.module_diagonal(name).sum().item()

    def module_product(self, name: str, vectors: torch.Tensor) -> torch.Tensor:
        """(P, p·q) products of a module's block."""
        return vectors * self.module_diagonal(name)


class DiagonalAccumulator(SummedAccumulator[DiagonalFisher]):
    """Accumulates :class:`DiagonalFisher`; scores are formed a few examples at a time."""

    def __init__(self, shapes: Shapes, *, halves: bool = True, allocate: Allocate = zeros) -> None:
        super().__init__(shapes, DiagonalFisher, lambda p, q: (p * q,), halves=halves, allocate=allocate)

    def update(self, name: str, delta: torch.Tensor, x: torch.Tensor) -> None:
        """Add one module of a backward pass."""
        p, q = self.shapes[name]
        rows = max(1, ENTRIES // (p * q))
        for half, weight, (deltas, inputs) in self._parts(delta, x):
            for some in torch.arange(len(weight), device=delta.device).split(rows):
                squares = core_score(deltas[some], inputs[some]).double().square_()
                self._sums[name][half] += (weight[some] @ squares).cpu()
