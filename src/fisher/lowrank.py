"""The exact Fisher matrix, held as the scores of its examples: ``F = GᵀG / n`` with G (n·m, D), m draws each.

Where examples have weights w_i, a score is stored times ``√w_i`` and the divisor is ``Σ w_i``.

A part of the examples (a half for held-out measurements) is a choice of rows of the same scores: a mapped file stays
one, and nothing is copied but the column block that a product works on. So is the mean over several data sets.

Legend of shapes: n examples, D coordinates, P vectors, M rows of stored scores.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch

from src.fisher.accumulate import row_half
from src.fisher.base import Fisher, Shapes
from src.fisher.score_tables import StackedTables, Table, column_blocks, release, rows_of


@dataclass(frozen=True)
class LowRankFisher(Fisher):
    """Fisher information ``F = GᵀG / total``. The scores may be mapped files: they are read in column blocks.

    Attributes:
        stored: (M, D) scores, a tensor or mapped: G, or ``chosen`` says which rows of them are G's (rows, D); several
            rows per example where labels were drawn several times (scaled by 1/√draws).
        count: n, the number of examples.
        groups: (n,) int64 row of the data that each example is of, with one example per answer token: tokens of
            one row are never told apart by a split. Unset means one example per row.
        rows: (n,) identifier of the row of each example, where known: a row that two data sets share is one row.
        chosen: (rows,) int64 rows of the stored scores that are G's; unset means all.
        weights: (n,) float64 weight of each example, whose root its scores carry; unset means 1 each.
    """

    representation = "lowrank"
    stored: Table
    count: int
    groups: torch.Tensor | None = None
    rows: tuple[str, ...] | None = None
    chosen: torch.Tensor | None = None
    weights: torch.Tensor | None = None

    def __post_init__(self) -> None:
        rows = self.height if self.stored.ndim == 2 else 0
        if rows == 0 or self.count < 1 or rows % self.count:
            found = f"{(rows, *self.stored.shape[1:])} for {self.count} examples"
            raise ValueError(
                f"a Fisher matrix needs (rows, D) scores of at least one example, as many each; not {found}"
            )

    @property
    def dim(self) -> int:
        """D."""
        return self.stored.shape[1]

    @property
    def total(self) -> float:
        """Weight of all examples: n where they have none of their own."""
        return float(self.count) if self.weights is None else self.weights.sum().item()

    @property
    def scores(self) -> torch.Tensor:
        """(rows, D) G; a copy where rows are chosen, so not for what must stay small."""
        return self.columns(slice(None))

    @property
    def height(self) -> int:
        """Rows of G."""
        return self.stored.shape[0] if self.chosen is None else len(self.chosen)

    def columns(self, columns: slice) -> torch.Tensor:
        """(rows, columns) a column block of G, as it is stored; a view where no rows are chosen."""
        return rows_of(self.stored, self.chosen, columns)

    def release(self) -> None:
        """Give back the memory of what was read of a mapped file."""
        release(self.stored)

    def blocks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Column slices and the (rows, columns) float64 blocks of G that they cut out."""
        for columns in column_blocks(self.height, self.dim):
            yield columns, self.columns(columns).double()
            self.release()

    def factor(self) -> torch.Tensor:
        """``G / √total`` in float64: F is its Gram matrix over columns."""
        return self.scores.double() / self.total**0.5

    def trace(self) -> float:
        """tr(F)."""
        return sum(block.square().sum().item() for _, block in self.blocks()) / self.total

    def matvec(self, vector: torch.Tensor) -> torch.Tensor:
        """(D,) product ``F v``, in float64."""
        inner = self._times(vector[None])
        return torch.cat([(block.T @ inner).squeeze(1) for _, block in self.blocks()]) / self.total

    def energies(self, vectors: torch.Tensor) -> torch.Tensor:
        """(P,) quadratic forms ``vᵀ F v`` of vectors (P, D), in float64."""
        return self._times(vectors).square().sum(0) / self.total

    def dense(self) -> torch.Tensor:
        """(D, D) matrix in float64, for tests and small problems."""
        return self.factor().T @ self.factor()

    def diagonal(self) -> torch.Tensor:
        """(D,) diagonal."""
        return torch.cat([block.square().sum(0) for _, block in self.blocks()]) / self.total

    def subset(self, examples: torch.Tensor) -> "LowRankFisher":
        """The Fisher of some of the examples ((k,) int64 positions), which shares these scores."""
        draws = self.height // self.count
        rows = (examples[:, None] * draws + torch.arange(draws)).reshape(-1)
        chosen = rows if self.chosen is None else self.chosen[rows]
        groups = None if self.groups is None else self.groups[examples]
        names = None if self.rows is None else tuple(self.rows[i] for i in examples.tolist())
        weights = None if self.weights is None else self.weights[examples]
        return LowRankFisher(self.stored, len(examples), groups, names, chosen, weights)

    def named(self, rows: Sequence[str]) -> "LowRankFisher":
        """The matrix with the identifiers of its rows, given those of all rows of the data; as it is where they differ.

        A file of one example per row does not say which rows have no answer; where there are any, rows go by position.
        """
        if self.groups is None:
            return replace(self, rows=tuple(rows)) if len(rows) == self.count else self
        owners = self.groups.tolist()
        return replace(self, rows=tuple(rows[i] for i in owners)) if max(owners) < len(rows) else self

    def _owners(self) -> torch.Tensor:
        """(n,) int64 number of the row of each example, rows counted as they occur."""
        if self.rows is not None:
            numbers: dict[str, int] = {}
            return torch.tensor([numbers.setdefault(row, len(numbers)) for row in self.rows])
        return torch.arange(self.count) if self.groups is None else self.groups

    def halves(self, seed: int) -> "tuple[LowRankFisher, LowRankFisher] | None":
        """The Fisher matrices of two random halves of the rows; None for a single row."""
        names, owners = self._owners().unique(return_inverse=True)
        if len(names) < 2:
            return None
        order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
        first = torch.zeros(len(names), dtype=torch.bool).index_fill_(0, order[: len(names) // 2], True)[owners]
        return self.subset(first.nonzero().squeeze(1)), self.subset((~first).nonzero().squeeze(1))

    def row_halves(self) -> "tuple[LowRankFisher, LowRankFisher] | None":
        """The Fisher matrices of both halves by row id; None where one is empty or the rows are not known."""
        if self.rows is None:
            return None
        half = torch.tensor([row_half(row) for row in self.rows])
        if not 0 < int(half.sum()) < len(half):
            return None
        return self.subset((half == 0).nonzero().squeeze(1)), self.subset((half == 1).nonzero().squeeze(1))

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a file holds."""
        return {"scores": self.scores} | {
            name: own for name, own in (("groups", self.groups), ("weights", self.weights)) if own is not None
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor], *, shapes: Shapes, count: int) -> "LowRankFisher":
        """The inverse of :meth:`tensors`.

        Raises:
            ValueError: scores are no table, or scores and modules have different numbers of coordinates, or there are
                not as many groups or weights as examples.
        """
        dim, found = sum(p * q for p, q in shapes.values()), tuple(tensors["scores"].shape)
        if not tensors["scores"].is_floating_point():
            raise ValueError(f"scores are {tensors['scores'].dtype}; expected floats")
        if len(found) != 2 or found[1] != dim:
            raise ValueError(f"scores of shape {found}; expected (rows, {dim}), the bases' coordinates")
        groups, weights = tensors.get("groups"), tensors.get("weights")
        for name, own in (("groups", groups), ("weights", weights)):
            if own is not None and (tuple(own.shape) != (count,) or own.is_floating_point() != (name == "weights")):
                raise ValueError(
                    f"{name} is {own.dtype} of shape {tuple(own.shape)}; expected ({count},), one an example"
                )
        if weights is not None and not bool((weights > 0).all()):
            raise ValueError("weights of examples that are not above 0")
        return cls(tensors["scores"], count, groups, weights=weights)

    @classmethod
    def pooled(cls, fishers: Sequence["LowRankFisher"], shares: Sequence[float]) -> "LowRankFisher":
        """``Σ share_i F_i``: the scores of all data sets, scaled as they are read.

        Raises:
            ValueError: the data sets have different numbers of draws.
        """
        if len(draws := {fisher.height // fisher.count for fisher in fishers}) > 1:
            raise ValueError(f"Fisher matrices of {sorted(draws)} draws per example have no mean; take as many in each")
        total = sum(fisher.total for fisher in fishers)
        factors = [share * total / f.total for share, f in zip(shares, fishers, strict=True)]
        scores = StackedTables([f.stored for f in fishers], [f.chosen for f in fishers], [f**0.5 for f in factors])
        own_weights = [torch.ones(f.count).double() if f.weights is None else f.weights for f in fishers]
        weights = torch.cat([factor * own for factor, own in zip(factors, own_weights, strict=True)])
        groups, used = [], 0
        for fisher in fishers:
            own = torch.arange(fisher.count) if fisher.groups is None else fisher.groups
            groups.append(own + used)
            used += int(own.max()) + 1
        known = [fisher.rows for fisher in fishers if fisher.rows is not None]
        rows = tuple(chain.from_iterable(known)) if len(known) == len(fishers) else None
        joined = torch.cat(groups) if any(f.groups is not None for f in fishers) else None
        return cls(scores, sum(f.count for f in fishers), joined, rows, weights=weights)

    def _times(self, vectors: torch.Tensor) -> torch.Tensor:
        """(rows, P) products of the scores with vectors (P, D)."""
        total = torch.zeros(self.height, len(vectors), dtype=torch.float64)
        for columns, block in self.blocks():
            total.addmm_(block, vectors[:, columns].double().T)
        return total
