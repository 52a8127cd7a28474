"""Parts of a pass on the disk, with every bit of their headers changed; a process without rows; progress."""

from pathlib import Path

import pytest
import torch

from src.errors import InputError
from src.files import is_begun
from src.fisher.accumulate import examples
from src.fisher.block import BlockAccumulator
from src.fisher.diagonal import DiagonalAccumulator
from src.fisher.kronecker import KroneckerAccumulator
from src.fisher.lowrank_accumulator import LowRankAccumulator
from src.fisher.shards import Shards
from src.models.fisher_output import PARTS, PASSES, publish, ready_file
from src.models.fisher_pass import FisherPass
from src.models.fisher_weights import example_weights
from src.models.progress import Progress
from src.models.stopping import stop_together


def test_a_part_with_any_changed_bit_is_not_read(tmp_path, caplog):
    shards = Shards(tmp_path, "key")
    shards.write(0, 0, {"scores": torch.randn(2, 3), "rows": torch.tensor([2])})
    [path] = tmp_path.iterdir()
    whole = path.read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        assert shards.read(0, 0) is None
    assert "its rows are measured again" in caplog.text
    path.write_bytes(whole)
    assert shards.numbers(0) == {0}


def one_pass(folder, kind, rank, rows):
    """A pass of which this process has two rows, or none."""
    running = FisherPass(
        name="safety",
        rows=2,
        weights={},
        make=lambda: (kind({"m": (1, 2)}), None),
        shards=Shards(folder, "key"),
        rank=rank,
        steps_per_shard=1,
        finished=frozenset(),
    )
    if rows:
        running.fisher.begin(examples(torch.arange(rows), ["a", "b"][:rows]))
        running.fisher.update("m", torch.ones(rows, 1, 1), torch.ones(rows, 1, 2))
    running.end_step(0, rows)
    return running


@pytest.mark.parametrize("kind", [LowRankAccumulator, BlockAccumulator])
def test_a_process_without_rows_leaves_parts_too(tmp_path, kind):
    one_pass(tmp_path, kind, 1, 0)
    running = one_pass(tmp_path, kind, 0, 2)
    assert running.shards.numbers(1) == {0}
    fisher, _ = running.join(torch.device("cpu"))
    torch.testing.assert_close(fisher.dense(), torch.ones(2, 2, dtype=torch.float64))


@pytest.mark.parametrize("kind", [LowRankAccumulator, BlockAccumulator])
def test_parts_that_lack_a_row_are_refused(tmp_path, kind):
    with pytest.raises(InputError, match=r"hold 1 of 2 rows.*run the same command again"):
        one_pass(tmp_path, kind, 0, 1).join(torch.device("cpu"))


def test_a_rows_weight_is_that_of_its_examples():
    # Two sources of 2 and 3 rows: 4 and 6 tokens.
    assert example_weights([1, 3, 2, 0, 4], [2, 3], None).tolist() == [1.0] * 5
    found = example_weights([1, 3, 2, 0, 4], [2, 3], [3.0, 1.0])
    torch.testing.assert_close(found[[0, 2]], torch.tensor([0.75 * 10 / 4, 0.25 * 10 / 6], dtype=torch.float64))
    assert found[0] == found[1]
    assert found[2] == found[4]
    # Rows of the second source count twice: as its 6 tokens times 2 beside 4 do.
    twice = example_weights([1, 3, 2, 0, 4], [2, 3], None, [1.0, 2.0])
    torch.testing.assert_close(twice, example_weights([1, 3, 2, 0, 4], [2, 3], [4.0, 12.0]))
    torch.testing.assert_close(twice[2] / twice[0], torch.tensor(2.0, dtype=torch.float64))
    with pytest.raises(InputError, match="no row of source 2 has an answer token"):
        example_weights([1, 0], [1, 1], None)


def test_weighted_rows_give_the_weighted_mean_of_the_sources_means():
    values, counts, weights = torch.arange(7.0).double(), [2, 5], [3.0, 1.0]
    found = (example_weights([1] * 7, counts, weights) * values).mean()
    parts = values.split(counts)
    assert found.item() == pytest.approx((3 * parts[0].mean() + parts[1].mean()).item() / 4)
    assert example_weights([1] * 7, counts, None).tolist() == [1.0] * 7


def test_progress_without_rows_and_after_rows_that_are_known():
    progress = Progress(10)
    assert progress.line(1.0) == "0 of 10 rows"
    progress.skip(6)
    assert progress.line(1.0) == "6 of 10 rows"
    progress.advance(2, "F_safety")
    assert progress.line(4.0) == "8 of 10 rows, 0.5 rows/s, 4 s left"


@pytest.mark.parametrize("kind", [LowRankAccumulator, BlockAccumulator, KroneckerAccumulator, DiagonalAccumulator])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["input", "gradient"])
def test_scores_that_are_not_finite_end_a_pass_and_name_the_module(tmp_path, kind, bad, side):
    shapes = {"a": (1, 2), "b": (1, 2), "c": (1, 2)}
    running = FisherPass(
        name="safety",
        rows=2,
        weights={},
        make=lambda: (kind(shapes), None),
        shards=Shards(tmp_path, "key"),
        rank=0,
        steps_per_shard=1,
        finished=frozenset(),
    )
    running.fisher.begin(examples(torch.arange(2), ["x", "y"]))
    for name in shapes:
        delta, x = torch.ones(2, 1, 1), torch.ones(2, 1, 2)
        if name == "b":
            (x if side == "input" else delta)[1] = bad
        running.fisher.update(name, delta, x)
    running.end_step(0, 2)
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="F_safety: the scores of b are NaN or infinite"):
        stop_together(["", running.problem])
    stop_together(["", ""])


def test_files_of_two_runs_never_lie_together(tmp_path, monkeypatch):
    for name in PASSES:
        (tmp_path / f"{name}.safetensors").write_text("old")
    (tmp_path / PARTS).mkdir()
    for name in ("safety", "utility"):
        ready_file(tmp_path, name).write_text("new")
    original, calls = Path.replace, []

    def replace(self, target):
        calls.append(target)
        if len(calls) > 2:  # the mark, and the first file
            raise KeyboardInterrupt
        return original(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        publish(tmp_path, ["safety", "utility"], {"a": 1})
    assert {path.read_text() for path in tmp_path.glob("*.safetensors")} == {"new"}
    assert is_begun(tmp_path, {"a": 1})
    monkeypatch.undo()
    for name in ("safety", "utility"):
        ready_file(tmp_path, name).write_text("new")
    publish(tmp_path, ["safety", "utility"], {"a": 1})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["safety.safetensors", "utility.safetensors"]


def test_rounding_of_a_zero_gradient_is_no_token():
    draw = torch.Generator().manual_seed(0)
    delta, x = torch.randn(3, 5, 2, generator=draw), torch.randn(3, 5, 4, generator=draw)
    found = []
    for rounding in (0.0, 1e-9, -3e-8):
        delta[:, 0] = rounding
        accumulator = KroneckerAccumulator({"m": (2, 4)})
        accumulator.begin(examples(torch.arange(3), ["a", "b", "c"]))
        accumulator.update("m", delta, x)
        found.append(accumulator.finish())
    for fisher in found:
        assert fisher.tokens["m"].sum() == 12
        assert torch.equal(fisher.right["m"], found[0].right["m"])
