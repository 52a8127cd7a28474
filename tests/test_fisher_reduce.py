"""Fisher matrices over several gloo processes: sums and counts are reduced once; a process may hold no row at all."""

import pytest
import torch
import torch.distributed
import torch.multiprocessing

from src.fisher.accumulate import MeanAccumulator, MeanScores, examples
from src.fisher.block import BlockAccumulator
from src.fisher.diagonal import DiagonalAccumulator
from src.fisher.kronecker import KroneckerAccumulator
from src.fisher.magnitude import MagnitudeAccumulator

SHAPES = {"a": (2, 3), "b": (1, 4)}
KINDS = [
    BlockAccumulator,
    KroneckerAccumulator,
    DiagonalAccumulator,
    MagnitudeAccumulator,
    MeanAccumulator,
]
ROWS, TOKENS = 7, 3
# Rank 2 of 3 holds nothing; rows are dealt out of order and unevenly.
DEALS = {1: [[3, 0, 6, 1, 2, 5, 4]], 2: [[5, 0], [6, 1, 4, 2, 3]], 3: [[4, 6, 1], [0, 2, 3, 5], []]}


def activations(name, rows):
    p, q = SHAPES[name]
    draw = torch.Generator().manual_seed(p * q)
    delta, x = (torch.randn(ROWS, TOKENS, side, generator=draw, dtype=torch.float64) for side in (p, q))
    return delta[rows], x[rows]


def accumulated(rows):
    made = [kind(SHAPES) for kind in KINDS]
    for accumulator in made if rows else []:
        accumulator.begin(examples(torch.tensor(rows), [f"row {i}" for i in rows]))
        for name in SHAPES:
            accumulator.update(name, *activations(name, rows))
    return made


def results(made):
    found = [accumulator.finish() for accumulator in made]
    return [{"mean": one.mean} if isinstance(one, MeanScores) else one.tensors() for one in found]


def one_process(rank, world, meeting, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    made = accumulated(DEALS[world][rank])
    for accumulator in made:
        accumulator.reduce()
    torch.save(results(made), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.processes
@pytest.mark.parametrize("world", [1, 2, 3])
def test_world_sizes_give_the_same_result(world, tmp_path):
    torch.multiprocessing.spawn(one_process, (world, tmp_path / "meeting", tmp_path), nprocs=world)
    expected = results(accumulated(list(range(ROWS))))
    for rank in range(world):
        for found, wanted in zip(torch.load(tmp_path / f"{rank}.pt"), expected, strict=True):
            assert set(found) == set(wanted)
            for name in wanted:
                torch.testing.assert_close(found[name], wanted[name], rtol=1e-13, atol=1e-13)


def test_without_processes_there_is_nothing_to_reduce():
    made = accumulated(list(range(ROWS)))
    before = results(made)
    for accumulator in made:
        accumulator.reduce()
    for one, two in zip(before, results(made), strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one)
