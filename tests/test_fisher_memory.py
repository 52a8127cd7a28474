"""What stays out of memory (halves of mapped scores, sums of whole weights), and what a pass takes of the disk."""

import ctypes
import gc
import threading
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from src.cli import main
from src.fisher.accumulate import examples, mapped, zeros
from src.fisher.base import weighted_mean
from src.fisher.files import FisherFile, load_fisher
from src.fisher.lowrank import LowRankFisher
from src.fisher.shards import Shards, join_scores
from src.gevp.filters import soft
from src.gevp.heldout import mean_kept, split_rows
from src.gevp.pencil import make_pencil
from src.models.fisher import FisherModule
from src.models.fisher_pass import FisherPass, make_accumulators
from src.models.fisher_record import write_pass
from tests.commands import fisher_flags


def storages(values):
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in values if isinstance(t, torch.Tensor)}


class Allocations(TorchDispatchMode):
    """The bytes of every storage that an operation makes anew."""

    def __init__(self):
        super().__init__()
        self.bytes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = storages(tree_leaves((args, kwargs)))
        self.bytes += [size for place, size in storages(tree_leaves(out)).items() if place not in given]
        return out


def mapped_scores(path, rows, dim, seed):
    scores = torch.from_file(str(path), shared=True, size=rows * dim, dtype=torch.float32).view(rows, dim)
    return LowRankFisher(scores.normal_(generator=torch.Generator().manual_seed(seed)), rows)


def test_halves_of_mapped_scores_are_not_copied(tmp_path, monkeypatch):
    monkeypatch.setattr("src.fisher.score_tables.WIDE_ENTRIES", 2**13)
    rows, dim = 64, 2**13
    fishers = [mapped_scores(tmp_path / name, rows, dim, i) for i, name in enumerate(("safety", "utility"))]
    patch = torch.randn(dim, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with Allocations() as seen:
        folds = split_rows(*fishers, patch, lambda *two: make_pencil(*two, rho=0.1, rho_s=1.0), seed=0)
        mean_kept(folds, [fold.expansion.at(soft(1.0)) for fold in folds])
    # The largest are Gram matrices (N, N), vectors (D,) and blocks of columns, in float64.
    assert max(seen.bytes) == 8 * max(rows**2, dim, 2**13) < rows // 2 * dim * 4 / 8
    halves = fishers[0].halves(0)
    assert all(half.stored is fishers[0].stored for half in halves)
    copied = [LowRankFisher(half.scores.clone(), half.count) for half in halves]
    for half, copy in zip(halves, copied, strict=True):
        torch.testing.assert_close(half.matvec(patch), copy.matvec(patch))
        assert half.energy(patch) == pytest.approx(copy.energy(patch), rel=1e-12)
        assert half.trace() == pytest.approx(copy.trace(), rel=1e-12)
        again = half.halves(1)[0]
        torch.testing.assert_close(again.scores, copy.halves(1)[0].scores)
    torch.testing.assert_close(sum(half.matvec(patch) for half in halves) / 2, fishers[0].matvec(patch))


def test_the_mean_over_directories_copies_no_scores(tmp_path, monkeypatch):
    monkeypatch.setattr("src.fisher.score_tables.WIDE_ENTRIES", 2**14)
    rows, dim = 64, 2**13
    parts = [mapped_scores(tmp_path / str(i), rows, dim, i) for i in range(3)]
    vector = torch.randn(dim, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with Allocations() as seen:
        mean = weighted_mean([parts[0], parts[1].halves(0)[0], parts[2]], [1.0, 2.0, 0.5])
        product, half = mean.matvec(vector), mean.halves(1)[0]
        half.energy(vector)
    # The largest are blocks of columns in float64, of all rows where half are chosen.
    assert max(seen.bytes) <= 2 * 8 * 2**14 < rows * dim * 4 / 4
    held = [LowRankFisher(part.scores.clone(), part.count) for part in (parts[0], parts[1].halves(0)[0], parts[2])]
    expected = sum(w * part.dense() for w, part in zip((1.0, 2.0, 0.5), held, strict=True)) / 3.5
    torch.testing.assert_close(product, expected @ vector, rtol=1e-6, atol=1e-9)
    again = LowRankFisher(mean.scores, mean.count, mean.groups).halves(1)[0]
    torch.testing.assert_close(half.scores, again.scores, rtol=0, atol=0)


def resident(path):
    """Bytes of a mapped file that this process holds."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    return sum(
        1024 * int(next(line for line in lines if line.startswith("Rss:")).split()[1])
        for line in lines
        if line.endswith(str(path))
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pages_of_a_scores_file_are_given_back(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr("src.fisher.score_tables.WIDE_ENTRIES", 2**13)
    rows, side = 64, 64
    scores = torch.randn(rows, 4 * side**2, generator=torch.Generator().manual_seed(0), dtype=dtype)
    u, v = ({f"m{i}": torch.eye(side) for i in range(4)} for _ in range(2))
    path = tmp_path / "f.safetensors"
    FisherFile(LowRankFisher(scores, rows), u, v, {"rows": []}).save(path)
    fisher = load_fisher(path).fisher
    assert resident(path) < path.stat().st_size / 4
    trace, size = fisher.trace(), path.stat().st_size
    assert resident(path) < size / 4
    assert trace == LowRankFisher(scores, rows).trace()
    whole = fisher.columns(slice(None)).sum()  # the check can fail: reading it whole holds it whole
    assert resident(path) > size / 2
    fisher.release()
    assert resident(path) < size / 4
    assert torch.equal(fisher.scores, scores)
    assert whole == scores.sum()


class Mallinfo2(ctypes.Structure):
    """``struct mallinfo2`` of glibc: what ``mallinfo2(3)`` counts, over all arenas."""

    NAMES = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_: ClassVar = [(name, ctypes.c_size_t) for name in NAMES]


class Peak:
    """Most bytes that the process has allocated, mapped files aside, over those at the start of the block.

    Counted by the allocator: resident memory also has what it keeps of earlier tests, in holes between live pieces.
    """

    def __enter__(self):
        gc.collect()
        self._info = ctypes.CDLL(None).mallinfo2
        self._info.restype = Mallinfo2
        self.before, self.most, self.over = self._now(), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self._thread.join()

    def _now(self):
        info = self._info()
        return info.uordblks + info.hblkhd

    def _watch(self):
        while not self.over.wait(0.0005):
            self.most = max(self.most, self._now() - self.before)


MODULES, SIDE = 16, 320
MODULE = 2 * 8 * SIDE * SIDE
"""Bytes of one module's sums: two halves, float64."""


def measure(folder, representation, allocate):
    """A pass of two parts over four rows in weight coordinates, written and read again."""
    shapes = {f"m{i}": (SIDE, SIDE) for i in range(MODULES)}
    running = FisherPass(
        name="utility",
        rows=4,
        weights={},
        make=lambda: make_accumulators(representation, shapes, mean=False, halves=True, allocate=allocate),
        shards=Shards(folder, "key"),
        rank=0,
        steps_per_shard=2,
        finished=frozenset(),
    )
    draw = torch.Generator().manual_seed(0)
    for step in range(4):
        running.fisher.begin(examples(torch.tensor([step]), [f"r{step}"]))
        for name in shapes:
            running.fisher.update(name, *(torch.randn(1, 3, SIDE, generator=draw) for _ in range(2)))
        running.end_step(step, 1)
    fisher, _ = running.join(torch.device("cpu"))
    FisherFile(fisher, {}, {}, {"trace": fisher.trace()}).save(folder / "f.safetensors")
    return load_fisher(folder / "f.safetensors")


@pytest.mark.parametrize("representation", ["diagonal", "kronecker"])
def test_weight_coordinates_take_the_memory_of_a_few_modules_and_not_of_the_model(tmp_path, representation):
    measure(tmp_path, representation, zeros)  # Libraries take buffers at their first use, and keep them.
    found = {}
    for name, allocate in (("mapped", mapped(tmp_path)), ("memory", zeros)):
        with Peak() as peak:
            file = measure(tmp_path, representation, allocate)
        assert file.fisher.trace() == pytest.approx(file.record["trace"], rel=1e-12)
        found[name] = peak.most
    # A module's scores in float32 and float64, or its mean over both halves.
    assert found["mapped"] < 3 * MODULE
    # What it is told from: the sums of all modules at once.
    assert found["memory"] > 0.8 * MODULES * MODULE


def payload(path):
    """Bytes of a file without its description in front."""
    if path.suffix != ".safetensors":
        return path.stat().st_size
    with path.open("rb") as handle:
        return path.stat().st_size - 8 - int.from_bytes(handle.read(8), "little")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_estimate_of_the_disk_is_the_peak_of_a_real_run(base, adapters, rows, tmp_path, monkeypatch, dtype):
    out, sizes, estimates = tmp_path / "out", [], []

    def measured(function, found=sizes):
        def call(*args, **kwargs):
            result = function(*args, **kwargs)
            found.append(sum(payload(p) for p in out.rglob("*") if p.is_file() and "run" not in p.parts[-2:-1]))
            return result

        return call

    # The disk's use grows in these alone.
    monkeypatch.setattr(Shards, "write", measured(Shards.write))
    monkeypatch.setattr("src.models.fisher_pass.join_scores", measured(join_scores))
    monkeypatch.setattr("src.models.fisher.write_pass", measured(write_pass))
    estimate = FisherModule.estimate
    monkeypatch.setattr(FisherModule, "estimate", lambda *args: (estimates.append(estimate(*args)), estimates[-1])[1])
    flags = ["--model.basis", "union", "--model.granularity", "token", "--model.shard_rows", "4"]
    assert main(fisher_flags(base, adapters, rows, out, *flags, "--model.base.dtype", dtype)) == 0
    [expected] = estimates
    # Parts name the rows of their scores, in 16 bytes beside D numbers.
    assert expected.peak_disk <= max(sizes) <= 1.02 * expected.peak_disk
    assert expected.joined > 0.1 * expected.peak_disk
    assert sum(payload(path) for path in out.glob("*.safetensors")) == pytest.approx(expected.disk, rel=0.02)
