"""How a Fisher matrix is accumulated: per backward pass and module, reduced over processes once, divided once.

A recorder (:mod:`src.fisher.scores`) hands over each module's projected output gradients and inputs as the backward
pass meets them, so nothing but one module's temporaries is alive beside the sums; of cores, which are small, all
modules' parts, which come to the host in one copy: each copy waits for a GPU.

Legend of shapes: N examples of a backward pass, T tokens, p and q sides of a core, H halves.
"""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch
import torch.distributed

from src.fisher.base import Shapes

Result = TypeVar("Result")
Allocate = Callable[[str, tuple[int, ...]], torch.Tensor]
"""Makes a float64 tensor of zeros with a name and a shape."""


def zeros(_: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Sums in memory."""
    return torch.zeros(shape, dtype=torch.float64)


def mapped_tensor(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of zeros in a mapped file.

    Raises:
        OSError: the disk has no room for it; a mapped file without its blocks would end the process at a write.
    """
    size = torch.Size(shape).numel()
    with path.open("wb") as handle:
        os.posix_fallocate(handle.fileno(), 0, max(1, size * dtype.itemsize))
    return torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(shape)


def mapped(folder: Path) -> Allocate:
    """Sums in files of a folder, mapped: for weight coordinates, where all modules together outgrow the memory."""

    def allocate(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        path = folder / f"{name}.sum"
        path.unlink(missing_ok=True)
        return mapped_tensor(path, shape, torch.float64)

    return allocate


@dataclass(frozen=True)
class Examples:
    """The examples that one backward pass takes scores of.

    Attributes:
        index: (N,) int64 position of each one's row in the data: the order of stored scores.
        half: (N,) int64, which half of the rows it belongs to, by its row's id.
        weight: (N,) float64: 1/draws, or 0 where the row is no example of this pass.
        token: Which answer token, with one score per token; 0 with one per row.
    """

    index: torch.Tensor
    half: torch.Tensor
    weight: torch.Tensor
    token: int = 0


def row_half(row_id: str) -> int:
    """0 or 1, from nothing but the row's id: the half of the rows that it belongs to."""
    return hashlib.sha256(f"half\0{row_id}".encode()).digest()[0] & 1


def examples(
    index: torch.Tensor,
    row_ids: Sequence[str],
    *,
    draws: int = 1,
    present: torch.Tensor | None = None,
    token: int = 0,
    row_weights: torch.Tensor | None = None,
) -> Examples:
    """The examples of one backward pass over a batch.

    Args:
        index: (N,) positions of the rows in the data.
        row_ids: Their identifiers.
        draws: Draws of labels per row, each a backward pass of its own.
        present: (N,) bool, rows that this pass is about; unset means all.
        token: Which answer token the pass is about.
        row_weights: (N,) weight of each row in the mean over all rows; unset means 1.
    """
    half = torch.tensor([row_half(row) for row in row_ids], dtype=torch.int64)
    weight = torch.full((len(row_ids),), 1 / draws, dtype=torch.float64)
    if row_weights is not None:
        weight = weight * row_weights
    if present is not None:
        weight = weight * present.cpu()
    return Examples(index.cpu(), half, weight, token)


class Accumulator(ABC, Generic[Result]):
    """Sums over examples, H halves of them apart.

    Args:
        shapes: (p, q) of each module.
        halves: Keep the two halves of the rows apart, for diagnostics on held-out rows; twice the memory.
    """

    def __init__(self, shapes: Shapes, *, halves: bool = True) -> None:
        self.shapes = dict(shapes)
        self.counts = torch.zeros(2 if halves else 1, dtype=torch.float64)
        self._batch: Examples
        self._placed: dict[torch.device, list[tuple[int, torch.Tensor | None, torch.Tensor]]] = {}

    def begin(self, batch: Examples) -> None:
        """Announce the examples of the next backward pass, and count them."""
        self._batch, self._placed = batch, {}
        for half, chosen in enumerate(self._chosen()):
            self.counts[half] += batch.weight[chosen].sum()

    @abstractmethod
    def update(self, name: str, delta: torch.Tensor, x: torch.Tensor) -> None:
        """Add one module of the backward pass: ``delta`` (N, T, p) and ``x`` (N, T, q), projected."""

    @abstractmethod
    def sums(self) -> Iterator[torch.Tensor]:
        """Everything that is summed over processes, in the same order on each of them."""

    def state(self) -> dict[str, torch.Tensor]:
        """What a shard on the disk holds: counts and sums."""
        return {"counts": self.counts} | {f"sum.{i}": total for i, total in enumerate(self.sums())}

    def absorb(self, state: Mapping[str, torch.Tensor]) -> None:
        """Add the state of another accumulator of the same settings."""
        self.counts += state["counts"]
        for i, total in enumerate(self.sums()):
            total.add_(state[f"sum.{i}"])

    def unsound(self) -> str | None:
        """The first module with NaN or infinite sums, if any; each module has as many sums as the others."""
        sound = [bool(torch.isfinite(total).all()) for total in self.sums()]
        each = len(sound) // len(self.shapes)
        parts = zip(self.shapes, range(0, len(sound), each), strict=True)
        return next((name for name, i in parts if not all(sound[i : i + each])), None)

    @abstractmethod
    def finish(self) -> Result:
        """The result, from sums and counts; once, after :meth:`reduce`."""

    def reduce(self, device: torch.device | None = None) -> None:
        """Add up the sums and the counts of all processes, tensor by tensor; a process may have seen no row at all.

        Args:
            device: Device of the collective, where the backend needs one (NCCL); unset means the CPU.
        """
        if not torch.distributed.is_initialized():
            return
        for total in (self.counts, *self.sums()):
            moved = total.to(device) if device is not None else total
            torch.distributed.all_reduce(moved)
            if moved is not total:
                total.copy_(moved)

    def _chosen(self) -> list[torch.Tensor]:
        """Positions of the examples with weight, by half."""
        seen = self._batch.weight > 0
        if len(self.counts) == 1:
            return [seen.nonzero().squeeze(1)]
        return [(seen & (self._batch.half == half)).nonzero().squeeze(1) for half in range(2)]

    def _parts(self, *tensors: torch.Tensor) -> Iterator[tuple[int, torch.Tensor, list[torch.Tensor]]]:
        """``(half, weights (n,), the half's rows of the tensors)`` for each half that has examples."""
        device, weight = tensors[0].device, self._batch.weight
        if device not in self._placed:
            self._placed[device] = [
                (half, None if len(chosen) == len(weight) else chosen.to(device), weight[chosen].to(device))
                for half, chosen in enumerate(self._chosen())
                if len(chosen)
            ]
        for half, rows, weights in self._placed[device]:
            yield half, weights, [tensor if rows is None else tensor[rows] for tensor in tensors]


@dataclass(frozen=True)
class MeanScores:
    """Mean signed scores ``(1/n) Σ_i g_i``: which way, where the Fisher matrix says how much.

    Attributes:
        mean: (D,) over all examples, float64.
        halves: (2, D) over the examples of each half (:func:`row_half`); None where they were not kept apart, or one
            has no example.
    """

    mean: torch.Tensor
    halves: torch.Tensor | None = None


class MeanAccumulator(Accumulator[MeanScores]):
    """Accumulates :class:`MeanScores`."""

    def __init__(self, shapes: Shapes, *, halves: bool = True, allocate: Allocate = zeros) -> None:
        super().__init__(shapes, halves=halves)
        kept = len(self.counts)
        self._sums = {name: allocate(f"mean.{name}", (kept, *shape)) for name, shape in self.shapes.items()}
        self._parts_now: dict[str, list[tuple[int, torch.Tensor]]] = {}

    def begin(self, batch: Examples) -> None:
        """Announce the examples of the next backward pass; what one that did not end has left counts for nothing."""
        super().begin(batch)
        self._parts_now = {}

    def update(self, name: str, delta: torch.Tensor, x: torch.Tensor) -> None:
        """Add one module, ``Σ_n w_n Σ_t δ x``: one product over all tokens of a half; the last one adds all up."""
        own = self._parts_now[name] = []
        for half, weight, (deltas, inputs) in self._parts(delta, x):
            weighted = deltas.double() * weight[:, None, None]
            own.append((half, weighted.flatten(0, 1).T @ inputs.double().flatten(0, 1)))
        if len(self._parts_now) < len(self.shapes):
            return
        totals = [self._sums[module][half] for module, parts in self._parts_now.items() for half, _ in parts]
        if totals:
            found = torch.cat([part.flatten() for parts in self._parts_now.values() for _, part in parts]).cpu()
            for total, part in zip(totals, found.split([total.numel() for total in totals]), strict=True):
                total.add_(part.view_as(total))
        self._parts_now = {}

    def sums(self) -> Iterator[torch.Tensor]:
        """The sums, module by module."""
        yield from self._sums.values()

    def finish(self) -> MeanScores:
        """The mean of all examples, and of each half.

        Raises:
            ValueError: there was no example.
        """
        if not self.counts.sum() > 0:
            raise ValueError("a mean score needs at least one example")
        mean = torch.cat([total.sum(0).reshape(-1) for total in self._sums.values()]) / self.counts.sum()
        if len(self.counts) < 2 or not bool((self.counts > 0).all()):
            return MeanScores(mean)
        return MeanScores(mean, torch.cat([t.flatten(1) for t in self._sums.values()], dim=1) / self.counts[:, None])
