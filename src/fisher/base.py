"""What every representation of a Fisher matrix can do.

    F = (1/n) Σ_i g_i g_iᵀ,     g_i = ∇_c Σ_{t ∈ answer} log p(y_t | x, y_<t)

A representation is exact (``lowrank``), exact within a module (``block``), or approximate (``kronecker``,
``diagonal``). None holds a ridge: that is an argument of the solve. ``magnitude`` shares their
code and is no matrix: it keeps the mean of |g| per weight.

Legend of shapes: D coordinates, P vectors, p and q sides of a module's core, H halves of the examples (1 or 2).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Self, TypeVar

import torch

Representation = Literal["lowrank", "block", "kronecker", "diagonal", "magnitude"]
Shapes = Mapping[str, tuple[int, int]]
"""(p, q) of each module in the order of the coordinates; the sides (O, I) of the weight in weight coordinates."""

Kind = TypeVar("Kind", bound="Fisher")


class Fisher(ABC):
    """A Fisher matrix over D coordinates, symmetric and positive semi-definite."""

    representation: ClassVar[Representation]
    count: int
    """n, the number of examples (rows; answer tokens with granularity ``token``)."""

    @property
    @abstractmethod
    def dim(self) -> int:
        """D."""

    @abstractmethod
    def trace(self) -> float:
        """tr(F)."""

    @abstractmethod
    def matvec(self, vector: torch.Tensor) -> torch.Tensor:
        """(D,) product ``F v``, in float64."""

    @abstractmethod
    def energies(self, vectors: torch.Tensor) -> torch.Tensor:
        """(P,) quadratic forms ``vᵀ F v`` of vectors (P, D), in float64."""

    def energy(self, vector: torch.Tensor) -> float:
        """Quadratic form ``vᵀ F v``: twice the second-order change of log-likelihood along v (nats per example)."""
        return self.energies(vector[None]).item()

    @abstractmethod
    def dense(self) -> torch.Tensor:
        """(D, D) matrix in float64, for tests and small problems."""

    @abstractmethod
    def diagonal(self) -> torch.Tensor:
        """(D,) diagonal in float64, without the matrix."""

    @abstractmethod
    def halves(self, seed: int) -> tuple[Self, Self] | None:
        """The Fisher matrices of two disjoint halves of the rows; None where they can't be told apart.

        Args:
            seed: Seed of the split, where it is made now. Accumulated representations were split by row id.
        """

    @abstractmethod
    def row_halves(self) -> tuple[Self, Self] | None:
        """The matrices of both halves by row id (:func:`src.fisher.accumulate.row_half`), whatever the representation.

        What else was measured on the same rows, such as mean scores, falls into the same halves. None where a half is
        empty or the rows are not known.
        """

    @abstractmethod
    def tensors(self) -> dict[str, torch.Tensor]:
        """What a file holds; names of per-module tensors are ``kind.module``."""

    @classmethod
    @abstractmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor], *, shapes: Shapes, count: int) -> Self:
        """The inverse of :meth:`tensors`."""

    @classmethod
    @abstractmethod
    def pooled(cls, fishers: Sequence[Self], shares: Sequence[float]) -> Self:
        """``Σ share_i F_i`` for shares that sum to 1."""


def weighted_mean(fishers: Sequence[Kind], weights: Sequence[float]) -> Kind:
    """The weighted mean ``Σ w_i F_i / Σ w_i`` of Fisher matrices of several data sets, in the same representation.

    Exact but for ``kronecker``, whose factors are averaged: the Kronecker approximation of the pooled examples.

    Raises:
        ValueError: dimensions or representations differ, or a weight is negative or all are zero.
    """
    if len(fishers) != len(weights) or min(weights) < 0 or not 0 < sum(weights) < float("inf"):
        raise ValueError(f"weights {weights} must be non-negative with a positive sum, one for each Fisher matrix")
    if len({fisher.dim for fisher in fishers}) > 1:
        raise ValueError(f"Fisher matrices of dimensions {[fisher.dim for fisher in fishers]} have no mean")
    if len({fisher.representation for fisher in fishers}) > 1:
        raise ValueError(f"representations {[fisher.representation for fisher in fishers]} have no mean")
    kept = [(fisher, weight / sum(weights)) for fisher, weight in zip(fishers, weights, strict=True) if weight]
    if len(kept) == 1:
        return kept[0][0]
    return type(fishers[0]).pooled([fisher for fisher, _ in kept], [share for _, share in kept])


@dataclass(frozen=True)
class ModuleFisher(Fisher):
    """A Fisher matrix without entries between modules, kept as sums over each half of the examples.

    Attributes:
        shapes: (p, q) of each module.
        counts: (H,) weight of the examples in each half, float64: F is a sum divided by their total, once.
    """

    shapes: dict[str, tuple[int, int]]
    counts: torch.Tensor
    count: int = field(init=False)

    def __post_init__(self) -> None:
        total = self.counts.sum().item()
        if not total > 0:
            raise ValueError("a Fisher matrix needs at least one example")
        object.__setattr__(self, "count", max(1, round(total)))

    @property
    def dim(self) -> int:
        """D."""
        return sum(p * q for p, q in self.shapes.values())

    @abstractmethod
    def module_trace(self, name: str) -> float:
        """Trace of a module's block."""

    @abstractmethod
    def module_product(self, name: str, vectors: torch.Tensor) -> torch.Tensor:
        """(P, p·q) products of a module's block with vectors (P, p·q)."""

    def module_block(self, name: str) -> torch.Tensor:
        """(p·q, p·q) block of a module."""
        p, q = self.shapes[name]
        return self.module_product(name, torch.eye(p * q, dtype=torch.float64))

    def module_diagonal(self, name: str) -> torch.Tensor:
        """(p·q,) diagonal of a module's block."""
        return self.module_block(name).diagonal()

    @abstractmethod
    def half(self, index: int) -> Self:
        """The matrix of one half of the examples."""

    def checked(self, count: int) -> Self:
        """The matrix itself, if it is of so many examples.

        Raises:
            ValueError: it is not: a file's record and its sums are of different passes.
        """
        if self.count != count:
            raise ValueError(f"the sums are of {self.count} examples, the record says {count}")
        return self

    def split(self, vectors: torch.Tensor) -> dict[str, torch.Tensor]:
        """The parts (…, p·q) of vectors (…, D), by module, in float64."""
        parts = vectors.double().split([p * q for p, q in self.shapes.values()], dim=-1)
        return dict(zip(self.shapes, parts, strict=True))

    def trace(self) -> float:
        """tr(F)."""
        return sum(self.module_trace(name) for name in self.shapes)

    def matvec(self, vector: torch.Tensor) -> torch.Tensor:
        """(D,) product ``F v``, in float64."""
        return torch.cat([self.module_product(name, part[None])[0] for name, part in self.split(vector).items()])

    def energies(self, vectors: torch.Tensor) -> torch.Tensor:
        """(P,) quadratic forms ``vᵀ F v`` of vectors (P, D), in float64."""
        parts = self.split(vectors).items()
        return torch.stack([(part * self.module_product(name, part)).sum(1) for name, part in parts]).sum(0)

    def dense(self) -> torch.Tensor:
        """(D, D) matrix in float64, for tests and small problems."""
        return torch.block_diag(*(self.module_block(name) for name in self.shapes))

    def diagonal(self) -> torch.Tensor:
        """(D,) diagonal."""
        return torch.cat([self.module_diagonal(name) for name in self.shapes])

    def halves(self, seed: int) -> tuple[Self, Self] | None:
        """Both halves, as they were split by row id in the pass; None where one half was kept or is empty."""
        if len(self.counts) < 2 or not bool((self.counts > 0).all()):
            return None
        return self.half(0), self.half(1)

    def row_halves(self) -> tuple[Self, Self] | None:
        """Both halves: the pass has split them by row id."""
        return self.halves(0)


def check_shape(name: str, tensor: torch.Tensor, expected: tuple[int, ...]) -> torch.Tensor:
    """A tensor of a file, if it is what its name says.

    Raises:
        ValueError: it has another shape, or no numbers with a fraction.
    """
    if tuple(tensor.shape) != expected or not tensor.is_floating_point():
        raise ValueError(f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}; expected floats of {expected}")
    return tensor


def halves_of(counts: torch.Tensor) -> int:
    """H, the number of halves that a file keeps apart.

    Raises:
        ValueError: these are no counts.
    """
    if counts.ndim != 1 or len(counts) not in (1, 2):
        raise ValueError(f"counts of shape {tuple(counts.shape)}; expected one or two halves")
    return len(counts)


def pooling_factors(fishers: Sequence[ModuleFisher], shares: Sequence[float]) -> list[float]:
    """Factor of each matrix's sums and counts so that pooled sums over pooled counts are ``Σ share_i F_i``.

    Raises:
        ValueError: modules or the numbers of halves differ.
    """
    if len({(tuple(f.shapes.items()), len(f.counts)) for f in fishers}) > 1:
        raise ValueError("Fisher matrices of different modules, or split into different halves, have no mean")
    totals = [fisher.counts.sum().item() for fisher in fishers]
    return [share * sum(totals) / total for share, total in zip(shares, totals, strict=True)]
