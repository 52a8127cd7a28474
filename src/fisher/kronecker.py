"""The Kronecker-factored Fisher matrix (K-FAC, 1503.05671), ``F_m ≈ A_m ⊗ B_m`` for row-major vec(C).

    A_m = (1/n) Σ_{i,t} δ_t δ_tᵀ  (p, p),     B_m = (1/M_m) Σ_{i,t} x_t x_tᵀ  (q, q)

n examples, M_m relevant tokens: those whose output gradient at module m is no rounding of zero (padding, and whatever
the answer's loss does not depend on, is none): over ``ROUNDING`` times the largest of the example. (The query of a
first token meets one key only: its gradient is zero, which kernels round to 1e-9 or to 0 as they please.)
This is K-FAC's *expand* convention for weights shared over tokens (2311.00636): tokens count as independent examples,
gradients as independent of inputs. With one relevant token per example n = M, both factors are plain means, and the
matrix equals the exact block where ``δδᵀ`` and ``xxᵀ`` are uncorrelated over the examples (always so for one example).

Legend of shapes: N examples, T tokens, p and q sides of a core (O and I of a weight), H halves of the examples.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch

from src.fisher.accumulate import Accumulator, Allocate, zeros
from src.fisher.base import ModuleFisher, Shapes, check_shape, halves_of, pooling_factors

ROUNDING = 1e-5
"""Output gradients under this share of the example's largest count as zero, in every format of numbers."""


@dataclass(frozen=True)
class KroneckerFisher(ModuleFisher):
    """Per-module pairs of factors.

    Attributes:
        left: ``Σ δδᵀ`` of each module, (H, p, p) float64.
        right: ``Σ xxᵀ`` of each module, (H, q, q) float64.
        tokens: Weight of the relevant tokens of each module, (H,) float64.
    """

    representation = "kronecker"
    left: dict[str, torch.Tensor]
    right: dict[str, torch.Tensor]
    tokens: dict[str, torch.Tensor]

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A (p, p) and B (q, q) of a module; zeros where no token was relevant."""
        a, b, tokens = self.left[name].sum(0), self.right[name].sum(0), self.tokens[name].sum()
        return a / self.counts.sum(), b / tokens if tokens > 0 else b

    def module_trace(self, name: str) -> float:
        """Trace of a module's block."""
        a, b = self.factors(name)
        return (a.trace() * b.trace()).item()

    def module_product(self, name: str, vectors: torch.Tensor) -> torch.Tensor:
        """(P, p·q) products of a module's block: ``vec(A C B)``."""
        a, b = self.factors(name)
        return (a @ vectors.view(-1, *self.shapes[name]) @ b).flatten(1)

    def module_diagonal(self, name: str) -> torch.Tensor:
        """(p·q,) diagonal of a module's block."""
        a, b = self.factors(name)
        return torch.outer(a.diagonal(), b.diagonal()).flatten()

    def half(self, index: int) -> "KroneckerFisher":
        """The matrix of one half of the examples."""
        chosen = slice(index, index + 1)
        kept = ({n: total[chosen] for n, total in sums.items()} for sums in (self.left, self.right, self.tokens))
        return KroneckerFisher(self.shapes, self.counts[chosen], *kept)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a file holds."""
        kinds = {"left": self.left, "right": self.right, "tokens": self.tokens}
        named = {f"{kind}.{name}": total for kind, sums in kinds.items() for name, total in sums.items()}
        return {"counts": self.counts} | named

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor], *, shapes: Shapes, count: int) -> "KroneckerFisher":
        """The inverse of :meth:`tensors`."""
        halves = halves_of(tensors["counts"])
        sides = {n: {"left": (p, p), "right": (q, q), "tokens": ()} for n, (p, q) in shapes.items()}
        kinds = (
            {n: check_shape(f"{kind}.{n}", tensors[f"{kind}.{n}"], (halves, *own[kind])) for n, own in sides.items()}
            for kind in ("left", "right", "tokens")
        )
        return cls(dict(shapes), tensors["counts"], *kinds).checked(count)

    @classmethod
    def pooled(cls, fishers: Sequence["KroneckerFisher"], shares: Sequence[float]) -> "KroneckerFisher":
        """The Kronecker approximation of the pooled examples: factors are averaged, not their products."""
        factors = list(zip(pooling_factors(fishers, shares), fishers, strict=True))
        counts = reduce(add, (factor * f.counts for factor, f in factors))
        kinds = (
            {n: reduce(add, (factor * getattr(f, kind)[n] for factor, f in factors)) for n in fishers[0].shapes}
            for kind in ("left", "right", "tokens")
        )
        return cls(fishers[0].shapes, counts, *kinds)


class KroneckerAccumulator(Accumulator[KroneckerFisher]):
    """Accumulates :class:`KroneckerFisher`; no score is ever formed.

    The tokens of one backward pass are multiplied in the format that they come in (float32 at least), as in
    :mod:`src.fisher.diagonal`; sums over passes are float64.
    """

    def __init__(self, shapes: Shapes, *, halves: bool = True, allocate: Allocate = zeros) -> None:
        super().__init__(shapes, halves=halves)
        kept = len(self.counts)
        self._left = {name: allocate(f"left.{name}", (kept, p, p)) for name, (p, _) in self.shapes.items()}
        self._right = {name: allocate(f"right.{name}", (kept, q, q)) for name, (_, q) in self.shapes.items()}
        self._tokens = {name: torch.zeros(kept, dtype=torch.float64) for name in self.shapes}

    def update(self, name: str, delta: torch.Tensor, x: torch.Tensor) -> None:
        """Add one module of a backward pass."""
        for half, weight, (deltas, inputs) in self._parts(delta, x):
            largest = deltas.abs().amax(2)
            # What is not finite must reach the sums: it ends the pass (`unsound`).
            relevant = (largest > ROUNDING * largest.amax(1, keepdim=True)) | ~largest.isfinite()
            weights = weight[:, None].expand_as(relevant)[relevant]
            for sums, tokens in ((self._left, deltas[relevant]), (self._right, inputs[relevant])):
                sums[name][half] += ((tokens * weights[:, None].to(tokens.dtype)).T @ tokens).cpu()
            self._tokens[name][half] += weights.sum().cpu()

    def sums(self) -> Iterator[torch.Tensor]:
        """The sums, module by module."""
        for name in self.shapes:
            yield from (self._left[name], self._right[name], self._tokens[name])

    def finish(self) -> KroneckerFisher:
        """The Fisher matrix."""
        return KroneckerFisher(self.shapes, self.counts, self._left, self._right, self._tokens)
