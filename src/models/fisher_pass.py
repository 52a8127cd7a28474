"""One pass of Fisher measurement: what it accumulates, and the shards that it leaves on the disk as it goes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed

from src.errors import InputError
from src.fisher.accumulate import Accumulator, Allocate, MeanAccumulator, MeanScores, zeros
from src.fisher.base import Fisher, Representation, Shapes
from src.fisher.block import BlockAccumulator
from src.fisher.diagonal import DiagonalAccumulator
from src.fisher.kronecker import KroneckerAccumulator
from src.fisher.lowrank_accumulator import LowRankAccumulator
from src.fisher.magnitude import MagnitudeAccumulator
from src.fisher.scores import Granularity
from src.fisher.shards import Shards, join_scores

ROWS = "rows"
"""Number of rows of a shard."""
Coordinates = Literal["core", "weight"]
Make = Callable[[], tuple[Accumulator[Any], MeanAccumulator | None]]


def make_accumulators(
    representation: Representation, shapes: Shapes, *, mean: bool, halves: bool, allocate: Allocate = zeros
) -> tuple[Accumulator[Any], MeanAccumulator | None]:
    """Fresh sums of one pass.

    Args:
        representation: Form of the Fisher matrix.
        shapes: (p, q) of each module.
        mean: Take mean signed scores too.
        halves: Keep two halves of the rows apart (``lowrank``, which keeps every row, for mean scores alone).
        allocate: Where sums live.
    """
    kinds: dict[str, type[BlockAccumulator | KroneckerAccumulator | DiagonalAccumulator | MagnitudeAccumulator]] = {
        "block": BlockAccumulator,
        "kronecker": KroneckerAccumulator,
        "diagonal": DiagonalAccumulator,
        "magnitude": MagnitudeAccumulator,
    }
    if representation == "lowrank":
        fisher: Accumulator[Any] = LowRankAccumulator(shapes)
    else:
        fisher = kinds[representation](shapes, halves=halves, allocate=allocate)
    return fisher, MeanAccumulator(shapes, halves=halves, allocate=allocate) if mean else None


@dataclass
class FisherPass:
    """A pass under way.

    Attributes:
        name: ``safety``, ``utility`` or ``benign``.
        rows: Number of its rows that have an answer token.
        weights: (n,) weight of each example of a row, mean 1 over the examples, by what an example is.
        make: Makes fresh accumulators.
        shards: Where finished parts go.
        rank: This process.
        steps_per_shard: Steps between two shards.
        finished: Numbers of shards that are on the disk already.
    """

    name: str
    rows: int
    weights: Mapping[Granularity, torch.Tensor]
    make: Make
    shards: Shards
    rank: int
    steps_per_shard: int
    finished: frozenset[int]

    def __post_init__(self) -> None:
        self.fisher, self.mean = self.make()
        self.problem = ""
        self._open: int | None = None
        self._rows = 0

    def skips(self, step: int) -> bool:
        """Whether a step's rows are on the disk already."""
        return step // self.steps_per_shard in self.finished

    def end_step(self, step: int, rows: int) -> None:
        """Mark a step as measured, with its number of rows; write a shard when it is the last of one."""
        self._open = step // self.steps_per_shard
        self._rows += rows
        if (step + 1) % self.steps_per_shard == 0:
            self.flush()

    def flush(self) -> None:
        """Write what has been accumulated since the last shard; no sums where there was no row.

        Scores that are not finite are a :attr:`problem`, and nothing is written: processes must stop together.
        """
        if self._open is None:
            return
        unsound = [sums.unsound() for sums in (self.fisher, self.mean) if sums is not None]
        if module := next(filter(None, unsound), None):
            self.problem = (
                f"F_{self.name}: the scores of {module} are NaN or infinite; see whether the base with the adapters of "
                "its reference point gives finite losses"
            )
        tensors = {ROWS: torch.tensor([self._rows])}
        if self._rows:
            tensors |= self.fisher.state()
        if self._rows and self.mean is not None:
            tensors |= {f"mean.{name}": tensor for name, tensor in self.mean.state().items()}
        if not self.problem:
            self.shards.write(self.rank, self._open, tensors)
        self.fisher, self.mean = self.make()
        self._open, self._rows = None, 0

    def join(self, device: torch.device) -> tuple[Fisher | None, MeanScores | None]:
        """Fisher matrix and mean scores of all processes; call it on every process, after all have flushed.

        Low-rank scores are joined from the disk, by the first process alone (None on the others). Sums are added up
        over this process's shards, then over processes, once; counts with them.

        Raises:
            InputError: a part was lost since it was written.
        """
        fisher, mean = self.make()
        rows = torch.zeros(1, dtype=torch.int64)
        for tensors in self.shards.of(self.rank):
            rows += tensors[ROWS]
            if tensors[ROWS] and not isinstance(fisher, LowRankAccumulator):
                fisher.absorb(tensors)
            if tensors[ROWS] and mean is not None:
                mean.absorb({k.removeprefix("mean."): v for k, v in tensors.items() if k.startswith("mean.")})
        self._check_rows(rows.to(device))
        if mean is not None:
            mean.reduce(device)
        found = None if mean is None else mean.finish()
        if isinstance(fisher, LowRankAccumulator):
            return (join_scores(self.shards, self.rows) if self.rank == 0 else None), found
        fisher.reduce(device)
        return fisher.finish(), found

    def _check_rows(self, found: torch.Tensor) -> None:
        """Stop, on all processes alike, where their parts do not hold every row."""
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(found)
        if found.item() != self.rows:
            raise InputError(
                f"{self.shards.folder}: the parts of F_{self.name} hold {found.item()} of {self.rows} rows: one was "
                "damaged or lost since it was written; run the same command again, which measures its rows anew"
            )
