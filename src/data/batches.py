"""Length-sorted batches, the same whatever the number of processes.

Batches are formed over all rows first and dealt to the processes whole, so a row always meets the same neighbours and
the same padding: its numbers do not depend on the world size.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil

import torch
from torch.utils.data import Dataset, Sampler

from src.data.chat import Encoded

WINDOW = 4
"""Batches of training rows that are sorted by length together."""


@dataclass
class Batch:
    """Right-padded token ids of N rows, at most T long.

    Attributes:
        index: (N,) position of each row in its data set.
        ids: (N, T) int64 token ids.
        lengths: (N,) int64 number of real tokens of each row.
        answer_starts: (N,) int64 position of the first answer token.
        weight: Factor of its loss in training (:class:`LengthBatches`), else 1.0; 0.0 for a repeated batch that only
            keeps sharded processes in step.
    """

    index: torch.Tensor
    ids: torch.Tensor
    lengths: torch.Tensor
    answer_starts: torch.Tensor
    weight: float = 1.0

    def to(self, device: torch.device) -> "Batch":
        """The batch on another device (called by Lightning)."""
        return Batch(
            self.index, self.ids.to(device), self.lengths.to(device), self.answer_starts.to(device), self.weight
        )

    def split(self, rows: int) -> Iterator["Batch"]:
        """Parts of at most so many rows, each cut to its own longest row."""
        for start in range(0, len(self.index), rows):
            yield self.part(slice(start, start + rows))

    def part(self, rows: slice | list[int]) -> "Batch":
        """Some rows, cut to the longest of them."""
        width = int(self.lengths[rows].max())
        return Batch(
            self.index[rows], self.ids[rows, :width], self.lengths[rows], self.answer_starts[rows], self.weight
        )

    @property
    def answer_mask(self) -> torch.Tensor:
        """(N, T) bool: true where a token belongs to the answer."""
        positions = torch.arange(self.ids.shape[1], device=self.ids.device)
        return (positions >= self.answer_starts[:, None]) & (positions < self.lengths[:, None])

    @property
    def common_prefix(self) -> int:
        """Number of tokens that all rows begin with, short of the token that predicts the first answer token.

        0 where sharing them saves nothing: one row, or fewer than 8 tokens.
        """
        same = (self.ids == self.ids[0]).all(0).long().cumprod(0).sum()
        length = min(int(same), int(self.answer_starts.min()) - 1)
        return length if len(self.ids) > 1 and length >= 8 else 0


class EncodedRows(Dataset[Batch]):
    """Encoded rows, read a batch at a time: the key is ``(indices, weight)``."""

    def __init__(self, rows: list[Encoded], pad_id: int) -> None:
        self.rows, self.pad_id = rows, pad_id

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[list[int], float]) -> Batch:
        indices, weight = key
        rows = [self.rows[i] for i in indices]
        width = max(len(row.ids) for row in rows)
        return Batch(
            index=torch.tensor(indices),
            ids=torch.tensor([row.ids + [self.pad_id] * (width - len(row.ids)) for row in rows]),
            lengths=torch.tensor([len(row.ids) for row in rows]),
            answer_starts=torch.tensor([row.answer_start for row in rows]),
            weight=weight,
        )


class LengthBatches(Sampler[tuple[list[int], float]]):
    """Deals whole batches of rows of similar length to the processes, the same number to each.

    Where they do not come out even, a process repeats one: with weight 1 when shuffling (training), with weight 0
    otherwise (validation, Fisher passes).

    An optimiser step of several batches takes the mean of their losses, each a mean over answer tokens. With
    ``answers``, batches weigh by their tokens, so that the step is that of one batch of all their rows.

    Args:
        lengths: Number of tokens of each row.
        batch_size: Rows per batch.
        rank: This process.
        world_size: Number of processes.
        seed: Shuffle anew every epoch (training); ``None`` keeps the order of length, longest first, so that a batch
            too big for the memory fails at once.
        window: When shuffling, number of batches over whose rows the sorting by length goes; 1 sorts nothing. Wider
            windows pad less, and make the rows of a step more alike than chance would: 16 cost 7 % of validation loss
            on the demo's rows, 4 cost nothing measurable (``tests/benchmarks/test_fit_speed.py``).
        epoch: Tells the epoch that begins; asked when the first batch is drawn, because Lightning makes the first
            iterator of a resumed run before it knows the epoch.
        answers: Number of answer tokens of each row; ``None`` leaves the weights at 1.
        accumulate: Tells how many batches of each process an optimiser step has; asked with ``epoch``.
    """

    def __init__(
        self,
        lengths: list[int],
        batch_size: int,
        *,
        rank: int,
        world_size: int,
        seed: int | None = None,
        window: int = WINDOW,
        epoch: Callable[[], int] = int,
        answers: list[int] | None = None,
        accumulate: Callable[[], int] = lambda: 1,
    ) -> None:
        self.lengths, self.batch_size, self.rank, self.world_size = lengths, batch_size, rank, world_size
        self.seed, self.window, self.epoch = seed, window, epoch
        self.answers, self.accumulate = answers, accumulate

    def _batches(self) -> list[list[int]]:
        order = sorted(range(len(self.lengths)), key=lambda i: (-self.lengths[i], i))
        size = self.batch_size
        if self.seed is None:
            return [order[i : i + size] for i in range(0, len(order), size)]
        # Neighbours in length are drawn anew each epoch: shuffle, sort within windows, shuffle batches.
        draw = random.Random(f"{self.seed}/{self.epoch()}")
        draw.shuffle(order)
        batches = []
        rows = self.window * size
        for start in range(0, len(order), rows):
            near = sorted(order[start : start + rows], key=lambda i: -self.lengths[i])
            batches += [near[i : i + size] for i in range(0, len(near), size)]
        draw.shuffle(batches)
        return batches

    def __iter__(self) -> Iterator[tuple[list[int], float]]:
        batches = self._batches()
        dealt = [(batch, 1.0) for batch in batches]
        for place in range(len(batches), len(self) * self.world_size):
            again = batches[(place % self.world_size - len(batches)) % len(batches)]
            dealt.append((again, 0.0 if self.seed is None else 1.0))
        if self.answers is not None:
            dealt = list(self._weighed(dealt, self.answers))
        yield from dealt[self.rank :: self.world_size]

    def _weighed(self, dealt: list[tuple[list[int], float]], answers: list[int]) -> Iterator[tuple[list[int], float]]:
        """Batches with weights by which the mean over an optimiser step's batches is that over all its tokens.

        Lightning divides by the number of batches of a whole step, also where an epoch ends within one.
        """
        together = self.accumulate() * self.world_size
        for start in range(0, len(dealt), together):
            step = [batch for batch, _ in dealt[start : start + together]]
            tokens = [sum(answers[row] for row in batch) for batch in step]
            for batch, own in zip(step, tokens, strict=True):
                yield batch, own * together / max(sum(tokens), 1)

    def __len__(self) -> int:
        return ceil(ceil(len(self.lengths) / self.batch_size) / self.world_size)
