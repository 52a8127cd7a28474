"""The diagonal of the Fisher matrix, ``f_j = (1/n) Σ_i g_{i,j}²``, in core or in weight coordinates.

Every example's score is squared by itself: the square of a batch's mean gradient is smaller by about the batch size
(1905.12558). In weight coordinates g_i = Σ_t δ_t x_tᵀ is as large as the weight, so rows are taken a few at a time.

Legend of shapes: N examples, T tokens, p and q sides of a core (O and I of a weight), H halves of the examples.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from src.fisher.accumulate import Accumulator, Allocate, zeros
from src.fisher.base import ModuleFisher, Shapes, pooling_factors
from src.fisher.block import sum_of
from src.fisher.scores import core_score

ENTRIES = 2**22
"""Entries of scores that are squared together: bounds the temporaries beside one module's sum."""


@dataclass(frozen=True)
class DiagonalFisher(ModuleFisher):
    """Per-coordinate mean squares.

    Attributes:
        sums: ``Σ g²`` of each module, (H, p·q) float64.
    """

    representation = "diagonal"
    sums: dict[str, torch.Tensor]

    def module_diagonal(self, name: str) -> torch.Tensor:
        """(p·q,) diagonal of a module's block."""
        return self.sums[name].sum(0) / self.counts.sum()

    def diagonal(self) -> torch.Tensor:
        """(D,) diagonal."""
        return torch.cat([self.module_diagonal(name) for name in self.shapes])

    def module_trace(self, name: str) -> float:
        """Trace of a module's block."""
        return self.module_diagonal(name).sum().item()

    def module_product(self, name: str, vectors: torch.Tensor) -> torch.Tensor:
        """(P, p·q) products of a module's block."""
        return vectors * self.module_diagonal(name)

    def half(self, index: int) -> "DiagonalFisher":
        """The matrix of one half of the examples."""
        chosen = slice(index, index + 1)
        return DiagonalFisher(self.shapes, self.counts[chosen], {n: total[chosen] for n, total in self.sums.items()})

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a file holds."""
        return {"counts": self.counts} | {f"diagonal.{name}": total for name, total in self.sums.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor], *, shapes: Shapes, count: int) -> "DiagonalFisher":
        """The inverse of :meth:`tensors`."""
        sums = {name: tensors[f"diagonal.{name}"] for name in shapes}
        return cls(dict(shapes), tensors["counts"], sums).checked(count)

    @classmethod
    def pooled(cls, fishers: Sequence["DiagonalFisher"], shares: Sequence[float]) -> "DiagonalFisher":
        """``Σ share_i F_i``."""
        factors = list(zip(pooling_factors(fishers, shares), fishers, strict=True))
        counts = torch.stack([factor * f.counts for factor, f in factors]).sum(0)
        names = fishers[0].sums
        return cls(fishers[0].shapes, counts, {n: sum_of(factor * f.sums[n] for factor, f in factors) for n in names})


class DiagonalAccumulator(Accumulator[DiagonalFisher]):
    """Accumulates :class:`DiagonalFisher`; scores are formed a few examples at a time."""

    def __init__(self, shapes: Shapes, *, halves: bool = True, allocate: Allocate = zeros) -> None:
        super().__init__(shapes, halves=halves, allocate=allocate)
        kept = len(self.counts)
        self._sums = {name: allocate(f"diagonal.{name}", (kept, p * q)) for name, (p, q) in self.shapes.items()}

    def update(self, name: str, delta: torch.Tensor, x: torch.Tensor) -> None:
        """Add one module of a backward pass."""
        p, q = self.shapes[name]
        rows = max(1, ENTRIES // (p * q))
        for half, weight, (deltas, inputs) in self._parts(delta, x):
            for some in torch.arange(len(weight), device=delta.device).split(rows):
                squares = core_score(deltas[some], inputs[some]).double().square_()
                self._sums[name][half] += (weight[some] @ squares).cpu()

    def sums(self) -> Iterator[torch.Tensor]:
        """The sums, module by module."""
        yield from self._sums.values()

    def finish(self) -> DiagonalFisher:
        """The Fisher matrix."""
        return DiagonalFisher(self.shapes, self.counts, self._sums)
