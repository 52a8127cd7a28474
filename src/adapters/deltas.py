"""Updates of modules, low-rank or dense, read in blocks of rows.

A low-rank update is its two factors. An element-wise merge is full rank: it is never stored but evaluated block by
block, always in the same blocks, so that every pass over it sees the same bits and memory stays that of one block.

Legend of shapes: O output features, I input features.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from src.adapters.pairs import LowRankPair, weighted_sum

BLOCK_ELEMENTS = 1 << 17
"""Elements of a block: 512 KiB in float32: a few of them fit in the second-level cache of current processors."""


class Delta(Protocol):
    """One module's update: its shape (O, I), and any block of its rows."""

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""

    def block(self, rows: slice) -> torch.Tensor:
        """The rows of one block of :func:`row_blocks`, in the update's own number format."""

    def dense(self) -> torch.Tensor:
        """The whole update, in float64."""


Deltas = dict[str, Delta]


@dataclass(frozen=True)
class DenseDelta:
    """An update that is held as a (O, I) matrix."""

    matrix: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return self.matrix.shape[0], self.matrix.shape[1]

    def block(self, rows: slice) -> torch.Tensor:
        """Some rows of the matrix."""
        return self.matrix[rows]

    def dense(self) -> torch.Tensor:
        """The matrix in float64."""
        return self.matrix.double()


@dataclass(frozen=True)
class LazyDelta:
    """An update that is evaluated when a block of it is asked for.

    Attributes:
        shape: (O, I).
        evaluate: Rows to values; a pure function of the rows.
    """

    shape: tuple[int, int]
    evaluate: Callable[[slice], torch.Tensor]

    def block(self, rows: slice) -> torch.Tensor:
        """Evaluate some rows."""
        return self.evaluate(rows)

    def dense(self) -> torch.Tensor:
        """Evaluate the whole update, in float64."""
        return matrix(self).double()


def row_blocks(shape: tuple[int, int]) -> list[slice]:
    """The blocks of rows in which updates of this shape are always read."""
    step = max(1, BLOCK_ELEMENTS // max(1, shape[1]))
    return [slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]


def blocks(delta: Delta) -> Iterator[torch.Tensor]:
    """All blocks of an update, from its first row to its last."""
    for rows in row_blocks(delta.shape):
        yield delta.block(rows)


def matrix(delta: Delta) -> torch.Tensor:
    """(O, I) whole update in its own number format."""
    return torch.cat(list(blocks(delta)))


def squared_norm(delta: Delta) -> float:
    """Squared Frobenius norm, in float64."""
    if isinstance(delta, LowRankPair):
        return delta.squared_norm()
    return sum(block.double().square().sum().item() for block in blocks(delta))


def left_product(left: torch.Tensor, delta: Delta) -> torch.Tensor:
    """(K, I) ``leftᵀ ΔW`` for ``left`` (O, K), in float64."""
    if isinstance(delta, LowRankPair):
        return (left.T @ delta.b.double()) @ delta.a.double()
    total = torch.zeros(left.shape[1], delta.shape[1], dtype=torch.float64)
    for rows in row_blocks(delta.shape):
        total.addmm_(left[rows].double().T, delta.block(rows).double())
    return total


def changes(delta: Delta) -> bool:
    """Whether an update may change anything: not where a factor is zero, as B is where PEFT begins."""
    return not isinstance(delta, LowRankPair) or bool(delta.a.any() and delta.b.any())


def is_lowrank(deltas: Mapping[str, Delta]) -> bool:
    """Whether every update is held as factors."""
    return all(isinstance(delta, LowRankPair) for delta in deltas.values())


def lowrank(deltas: Mapping[str, Delta]) -> dict[str, LowRankPair]:
    """The updates as pairs.

    Raises:
        ValueError: one is full rank; the message names its module.
    """
    pairs = {}
    for name, delta in deltas.items():
        if not isinstance(delta, LowRankPair):
            raise ValueError(f"{name}: the update is full rank")
        pairs[name] = delta
    return pairs


def combined(updates: Sequence[Mapping[str, Delta]], weights: Sequence[float]) -> Deltas:
    """``sum_i w_i delta_i`` per module: exact factors where all updates of a module are low-rank, else lazy.

    A module that an update lacks adds nothing, and neither does an update of weight 0.

    Raises:
        ValueError: the numbers of updates and weights differ, or two updates of a module differ in shape.
    """
    if len(updates) != len(weights):
        raise ValueError(f"{len(updates)} updates but {len(weights)} weights")
    names = dict.fromkeys(name for deltas, w in zip(updates, weights, strict=True) if w != 0.0 for name in deltas)
    total: Deltas = {}
    for name in names:
        terms = [(d[name], w) for d, w in zip(updates, weights, strict=True) if name in d and w != 0.0]
        factors = [({name: delta}, w) for delta, w in terms if isinstance(delta, LowRankPair)]
        if len(factors) == len(terms):
            total[name] = weighted_sum([pairs for pairs, _ in factors], [w for _, w in factors])[name]
        else:
            total[name] = _lazy_sum(name, terms)
    return total


def _lazy_sum(name: str, terms: list[tuple[Delta, float]]) -> Delta:
    shapes = list(dict.fromkeys(delta.shape for delta, _ in terms))
    if len(shapes) > 1:
        raise ValueError(f"{name}: updates of shapes {shapes[0]} and {shapes[1]} cannot be added")
    if len(terms) == 1 and terms[0][1] == 1.0:
        return terms[0][0]

    def evaluate(rows: slice) -> torch.Tensor:
        first, weight = terms[0]
        total = first.block(rows) * weight
        for delta, weight in terms[1:]:
            total = total + delta.block(rows) * weight
        return total

    return LazyDelta(shapes[0], evaluate)
