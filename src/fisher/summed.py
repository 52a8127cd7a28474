"""What the representations kept as one sum per module share: halves, files, weighted means, accumulation.

Legend of shapes: H halves of the examples; the rest of a sum's shape is its representation's.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Generic, Self, TypeVar

import torch

from src.fisher.accumulate import Accumulator, Allocate, zeros
from src.fisher.base import ModuleFisher, Shapes, check_shape, halves_of, pooling_factors


@dataclass(frozen=True)
class SummedFisher(ModuleFisher):
    """A Fisher matrix of one float64 sum per module.

    Attributes:
        sums: Sum of each module, (H, …).
    """

    sums: dict[str, torch.Tensor]

    @staticmethod
    @abstractmethod
    def entry(p: int, q: int) -> tuple[int, ...]:
        """Shape of one half's sum of a module."""

    def mean(self, name: str) -> torch.Tensor:
        """A module's sum over all examples, divided by their weight."""
        return self.sums[name].sum(0) / self.counts.sum()

    def half(self, index: int) -> Self:
        """The matrix of one half of the examples."""
        chosen = slice(index, index + 1)
        return type(self)(self.shapes, self.counts[chosen], {n: total[chosen] for n, total in self.sums.items()})

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a file holds."""
        named = {f"{self.representation}.{name}": total for name, total in self.sums.items()}
        return {"counts": self.counts} | named

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor], *, shapes: Shapes, count: int) -> Self:
        """The inverse of :meth:`tensors`."""
        halves, kind = halves_of(tensors["counts"]), cls.representation
        sums = {
            name: check_shape(f"{kind}.{name}", tensors[f"{kind}.{name}"], (halves, *cls.entry(p, q)))
            for name, (p, q) in shapes.items()
        }
        return cls(dict(shapes), tensors["counts"], sums).checked(count)

    @classmethod
    def pooled(cls, fishers: Sequence[Self], shares: Sequence[float]) -> Self:
        """``Σ share_i F_i``."""
        factors = list(zip(pooling_factors(fishers, shares), fishers, strict=True))
        counts = torch.stack([factor * f.counts for factor, f in factors]).sum(0)
        sums = {name: reduce(add, (factor * f.sums[name] for factor, f in factors)) for name in fishers[0].sums}
        return cls(fishers[0].shapes, counts, sums)


Summed = TypeVar("Summed", bound=SummedFisher)


class SummedAccumulator(Accumulator[Summed], Generic[Summed]):
    """Accumulates one sum per module.

    Args:
        shapes: (p, q) of each module.
        halves: Keep the two halves of the rows apart.
        allocate: Where sums live.
    """

    kind: type[Summed]
    """What is accumulated."""

    def __init__(self, shapes: Shapes, *, halves: bool = True, allocate: Allocate = zeros) -> None:
        super().__init__(shapes, halves=halves)
        self._sums = {
            name: allocate(f"{self.kind.representation}.{name}", (len(self.counts), *self.kind.entry(p, q)))
            for name, (p, q) in self.shapes.items()
        }

    def sums(self) -> Iterator[torch.Tensor]:
        """The sums, module by module."""
        yield from self._sums.values()

    def finish(self) -> Summed:
        """The Fisher matrix."""
        return self.kind(self.shapes, self.counts, self._sums)
