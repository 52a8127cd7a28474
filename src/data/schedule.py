"""The work of an evaluation as one list of batches: for each model each suite, the same whatever the processes.

Batches are filled up to a budget of tokens, padding counted; a beginning that is computed once counts once. They are
formed over all rows before anything is dealt out or left out, so a row meets the same neighbours in one process or
three, in one go or after an interruption, and its numbers are the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import Dataset

from src.data.batches import Batch, EncodedRows
from src.data.chat import Encoded

HALVINGS = 12
"""Steps of the search for the smallest budget that gives as many batches."""


@dataclass
class SuiteBatch(Batch):
    """A batch of one suite for one model (their positions)."""

    model: int = 0
    suite: int = 0

    def to(self, device: torch.device) -> "SuiteBatch":
        """The batch on another device."""
        return SuiteBatch(**vars(super().to(device)), model=self.model, suite=self.suite)


@dataclass(frozen=True)
class Step:
    """One batch to compute: positions of its model, its suite and its rows; weight 0 only keeps processes in step."""

    model: int
    suite: int
    rows: tuple[int, ...]
    weight: float = 1.0


def shared_beginning(rows: Sequence[list[int]]) -> int:
    """Number of tokens that all rows begin with."""
    first, last = min(rows), max(rows)
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))


def budget_batches(
    units: Sequence[tuple[int, ...]], lengths: Sequence[int], *, beginning: int, max_rows: int, max_tokens: int
) -> list[list[int]]:
    """Batches of whole units (rows that belong together), longest first.

    Args:
        units: Rows of each unit.
        lengths: Tokens of each row.
        beginning: Tokens that all of these rows share; they count once a batch.
        max_rows: Most rows in a batch.
        max_tokens: Most tokens in a batch, padding included; a single unit may exceed it.
    """
    order = sorted(units, key=lambda unit: (-max(lengths[i] for i in unit), unit))
    batches: list[list[int]] = []
    width = 0
    for unit in order:
        if batches:
            rows = len(batches[-1]) + len(unit)
            if rows <= max_rows and beginning + rows * (width - beginning) <= max_tokens:
                batches[-1] += unit
                continue
        batches.append(list(unit))
        width = max(lengths[i] for i in unit)
    return batches


def even_batches(
    units: Sequence[tuple[int, ...]], lengths: Sequence[int], *, beginning: int, max_rows: int, max_tokens: int
) -> list[list[int]]:
    """The batches of :func:`budget_batches`, with what they hold evened out: no small one is left to a last process.

    Where the budget takes several, their number is even where it can be, so that two processes have as much to do; it
    does not depend on how many there are.
    """

    def batches(share: float) -> list[list[int]]:
        rows, tokens = max(1, int(max_rows * share)), max(1, int(max_tokens * share))
        return budget_batches(units, lengths, beginning=beginning, max_rows=rows, max_tokens=tokens)

    found = batches(1.0)
    wanted = len(found) + (len(found) > 1 and len(found) % 2)
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        share = (low + high) / 2
        tried = batches(share)
        if len(tried) > wanted:
            low = share
        else:
            high, found = share, tried
    return found


def deal(batches: Sequence[Sequence[Step]], rank: int, world_size: int, *, in_step: bool = True) -> list[Step]:
    """This process's share of blocks of batches, filled up so that all processes make as many steps.

    At least one step is left, of weight 0, where nothing is to do: a loop over nothing would not end its epoch.

    Args:
        batches: The batches of each block.
        rank: Number of the process.
        world_size: Number of processes.
        in_step: Whether all processes work on the same block at a time, as sharded weights need it. Otherwise blocks
            are dealt as one, so that short ones keep no process waiting.
    """
    mine: list[Step] = []
    blocks = batches if in_step else [[step for block in batches for step in block]]
    for block in blocks:
        share = list(block[rank::world_size])
        if block and len(share) < -(-len(block) // world_size):
            last = block[-1]
            share.append(Step(last.model, last.suite, last.rows, 0.0))
        mine += share
    return mine


class SuiteBatches(Dataset[SuiteBatch]):
    """Encoded rows of all suites; the key is a step."""

    def __init__(self, suites: Sequence[list[Encoded]], pad_id: int) -> None:
        self.suites = [EncodedRows(rows, pad_id) for rows in suites]

    def __len__(self) -> int:
        return sum(map(len, self.suites))

    def __getitem__(self, step: Step) -> SuiteBatch:
        batch = self.suites[step.suite][(list(step.rows), step.weight)]
        return SuiteBatch(**vars(batch), model=step.model, suite=step.suite)
