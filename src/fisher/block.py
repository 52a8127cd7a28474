"""The block-diagonal Fisher matrix: exact within a module, zero between modules.

    F_m = (1/n) Σ_i g_{i,m} g_{i,m}ᵀ     (p·q, p·q)

Legend of shapes: N examples, T tokens, P vectors, p and q sides of a core, H halves of the examples.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from src.fisher.accumulate import Accumulator, Allocate, zeros
from src.fisher.base import ModuleFisher, Shapes, pooling_factors
from src.fisher.scores import core_score


@dataclass(frozen=True)
class BlockFisher(ModuleFisher):
    """Per-module blocks.

    Attributes:
        sums: ``Σ g gᵀ`` of each module, (H, p·q, p·q) float64.
    """

    representation = "block"
    sums: dict[str, torch.Tensor]

    def block(self, name: str) -> torch.Tensor:
        """(p·q, p·q) block of a module."""
        return self.sums[name].sum(0) / self.counts.sum()

    def module_trace(self, name: str) -> float:
        """Trace of a module's block."""
        return self.block(name).trace().item()

    def module_product(self, name: str, vectors: torch.Tensor) -> torch.Tensor:
        """(P, p·q) products of a module's block."""
        return vectors @ self.block(name)

    def half(self, index: int) -> "BlockFisher":
        """The matrix of one half of the examples."""
        chosen = slice(index, index + 1)
        return BlockFisher(self.shapes, self.counts[chosen], {n: total[chosen] for n, total in self.sums.items()})

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a file holds."""
        return {"counts": self.counts} | {f"block.{name}": total for name, total in self.sums.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor], *, shapes: Shapes, count: int) -> "BlockFisher":
        """The inverse of :meth:`tensors`."""
        sums = {name: tensors[f"block.{name}"] for name in shapes}
        return cls(dict(shapes), tensors["counts"], sums).checked(count)

    @classmethod
    def pooled(cls, fishers: Sequence["BlockFisher"], shares: Sequence[float]) -> "BlockFisher":
        """``Σ share_i F_i``."""
        factors = list(zip(pooling_factors(fishers, shares), fishers, strict=True))
        counts = torch.stack([factor * f.counts for factor, f in factors]).sum(0)
        names = fishers[0].sums
        return cls(fishers[0].shapes, counts, {n: sum_of(factor * f.sums[n] for factor, f in factors) for n in names})


def sum_of(tensors: Iterator[torch.Tensor]) -> torch.Tensor:
    """The sum of tensors, one at a time."""
    total = next(tensors)
    for tensor in tensors:
        total = total + tensor
    return total


class BlockAccumulator(Accumulator[BlockFisher]):
    """Accumulates :class:`BlockFisher`; Gram matrices in float64."""

    def __init__(self, shapes: Shapes, *, halves: bool = True, allocate: Allocate = zeros) -> None:
        super().__init__(shapes, halves=halves, allocate=allocate)
        kept = len(self.counts)
        self._sums = {name: allocate(f"block.{name}", (kept, p * q, p * q)) for name, (p, q) in self.shapes.items()}

    def update(self, name: str, delta: torch.Tensor, x: torch.Tensor) -> None:
        """Add one module of a backward pass."""
        for half, weight, (scores,) in self._parts(core_score(delta, x).double()):
            self._sums[name][half] += ((scores * weight[:, None]).T @ scores).cpu()

    def sums(self) -> Iterator[torch.Tensor]:
        """The sums, module by module."""
        yield from self._sums.values()

    def finish(self) -> BlockFisher:
        """The Fisher matrix."""
        return BlockFisher(self.shapes, self.counts, self._sums)
