"""The engine: what is cached, killed, failed, claimed and planned, on cells that only sleep."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from src.errors import InputError
from src.experiments import claim_files as claims_module
from src.experiments import engine as engine_module
from src.experiments.cell import Cell, closure
from src.experiments.claim_files import Claims, process_start
from src.experiments.command import Cost, _computed_on, alone, peak_mb, processor, run_command
from src.experiments.content import count_rows, redrawn, sources
from src.experiments.costs import totals
from src.experiments.engine import CellError, to_compute
from src.experiments.launch import tell_peak
from src.experiments.store import Store
from src.experiments.timing import hours, listing, time_left
from tests.tiny import write_rows
from tests.toy_grid import toy_engine, toy_grid

ROOT = Path(__file__).resolve().parents[1]
LABELS = ["root 0", "root 1", "leaf 0", "leaf 1", "leaf 2", "leaf 3"]


@pytest.fixture(autouse=True)
def _look_often(monkeypatch):
    monkeypatch.setattr(engine_module, "POLL", 0.05)


def start(folder, seconds):
    return subprocess.Popen([sys.executable, "-m", "tests.toy_grid", str(folder), str(seconds)], cwd=ROOT)


def wait_for(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def test_every_cell_is_computed_once_and_what_it_needs_first(tmp_path):
    engine, work, store = toy_engine(tmp_path)
    assert engine.run().computed == 6
    assert work.noted("end") == LABELS
    assert not list(store.claims.glob("*.claim"))
    again, work, _ = toy_engine(tmp_path)
    assert again.run().computed == 0
    assert work.noted("start") == LABELS


def test_a_result_without_weights_is_enough_unless_a_new_cell_needs_them(tmp_path):
    engine, _, store = toy_engine(tmp_path)
    engine.run()
    for cell in toy_grid()[0].parents:
        (store.weights(cell) / "cell.json").unlink()
    assert to_compute(toy_grid(), store) == []
    needed = [cell.label for cell in to_compute(toy_grid(5), store)]
    assert needed == ["root 0", "root 1", "leaf 4"]
    assert "weights missing" in listing(closure(toy_grid(5)), to_compute(toy_grid(5), store), store)


@pytest.mark.parametrize("error", [CellError, InputError])
def test_a_failing_cell_hides_no_other_and_is_named(tmp_path, error):
    # InputError: a command that ended well and left no result.
    engine, work, store = toy_engine(tmp_path, bad=("leaf 1",))
    work.error = error
    outcome = engine.run()
    assert list(outcome.failed.values()) == ["leaf 1 is bad"]
    assert sorted(work.noted("end")) == sorted(set(LABELS) - {"leaf 1"})
    assert outcome.blocked == []
    (failure,) = (store.work / "failures").glob("*.json")
    assert json.loads(failure.read_text())["label"] == "leaf 1"
    engine, _, _ = toy_engine(tmp_path)
    assert engine.run().computed == 1
    assert not failure.exists()


@pytest.mark.parametrize("error", [OSError, KeyError, ValueError])
def test_a_cell_that_breaks_otherwise_hides_no_other_and_its_error_is_named(tmp_path, error):
    """A file that a command left broken or not at all."""
    engine, work, _ = toy_engine(tmp_path, bad=("leaf 1",))
    work.error = error
    assert list(engine.run().failed.values()) == [f"{error.__name__}: {error('leaf 1 is bad')}"]
    assert sorted(work.noted("end")) == sorted(set(LABELS) - {"leaf 1"})


def test_what_failed_since_the_start_is_tried_by_no_other_process_and_what_failed_before_is(tmp_path):
    (one, work, store), (two, _, _) = (toy_engine(tmp_path, bad=("leaf 1",)) for _ in range(2))
    one.run()
    (failure,) = (store.work / "failures").glob("*.json")
    os.utime(failure, (two.started + 1, two.started + 1))  # files of one moment may have one time
    assert list(two.run().failed.values()) == ["leaf 1 is bad"]
    assert two.outcome.blocked == []
    assert work.noted("start").count("leaf 1") == 1
    later, _, _ = toy_engine(tmp_path)
    os.utime(failure, (later.started - 1, later.started - 1))
    assert later.run().computed == 1


def test_a_cell_that_fails_elsewhere_between_a_look_and_a_claim_is_not_tried_again(tmp_path):
    engine, work, store = toy_engine(tmp_path)
    engine.started, take = 0.0, engine.claims.take
    cells = {cell.key: cell for cell in engine.grid}

    def fails_first(key):
        if cells[key].label == "leaf 1":
            store.fail(cells[key], "no memory")
        return take(key)

    engine.claims.take = fails_first
    assert list(engine.run().failed.values()) == ["no memory"]
    assert sorted(work.noted("start")) == sorted(set(LABELS) - {"leaf 1"})
    assert not list(store.claims.glob("*.claim"))


def test_cells_that_need_a_failed_one_are_counted_as_blocked(tmp_path):
    engine, _, _ = toy_engine(tmp_path, bad=("root 1",))
    outcome = engine.run()
    assert list(outcome.failed.values()) == ["root 1 is bad"]
    assert [cell.label for cell in outcome.blocked] == LABELS[2:]


def test_a_batch_that_fails_is_tried_cell_by_cell(tmp_path):
    engine, work, _ = toy_engine(tmp_path, bad=("b",))
    engine.grid = [Cell("inspect", label, {"label": label}, batch="one") for label in "abc"]
    outcome = engine.run()
    assert outcome.computed == 2
    assert list(outcome.failed.values()) == ["b is bad"]
    assert work.noted("start")[:2] == ["a", "b"]
    assert work.noted("end")[-2:] == ["a", "c"]


@pytest.mark.processes
def test_a_killed_process_leaves_a_claim_that_the_next_one_takes_over(tmp_path):
    process = start(tmp_path, 3600)
    store = Store(tmp_path / "results", tmp_path / "work")
    wait_for(lambda: list(store.claims.glob("*.claim")) and (tmp_path / "diary.txt").exists())
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len(list(store.claims.glob("*.claim"))) == 1
    engine, work, _ = toy_engine(tmp_path)
    assert engine.run().computed == 6
    assert sorted(work.noted("end")) == sorted(LABELS)


@pytest.mark.processes
def test_a_kill_between_cells_loses_no_finished_one(tmp_path):
    process = start(tmp_path, 0.3)
    store = Store(tmp_path / "results", tmp_path / "work")
    wait_for(lambda: len(list(store.results.glob("*.json"))) >= 2)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = len(list(store.results.glob("*.json")))
    engine, _, _ = toy_engine(tmp_path)
    assert engine.run().computed == 6 - kept


@pytest.mark.processes
def test_two_processes_share_a_grid_and_compute_each_cell_once(tmp_path):
    both = [start(tmp_path, 0.3) for _ in range(2)]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    lines = [line.split(" ", 2) for line in (tmp_path / "diary.txt").read_text().splitlines()]
    assert sorted(label for kind, _, label in lines if kind == "start") == sorted(LABELS)
    assert len(list((tmp_path / "results").glob("*.json"))) == 6


def test_merged_weights_go_once_nobody_waits_for_them(tmp_path):
    engine, _, store = toy_engine(tmp_path)
    merges = [Cell("merge", f"merge {i}", {"i": i}, batch="m") for i in range(3)]
    tests = [Cell("test", f"test {i}", {}, {"adapter": (merge,)}, batch="t") for i, merge in enumerate(merges)]
    engine.grid, engine.batch_size = closure(tests), 2
    order = []
    engine.compute = lambda batch: (
        order.append([c.label for c in batch]) or {c.key: {"cost": {"seconds": 1.0}} for c in batch}
    )
    assert engine.run().computed == 6
    # Evaluations start as soon as they fill a command.
    assert order == [["merge 0", "merge 1"], ["test 0", "test 1"], ["merge 2"], ["test 2"]]
    assert not any(store.has_weights(merge) for merge in merges)
    assert to_compute(tests, store) == []


def test_merged_weights_that_another_study_removed_meanwhile_are_made_again(tmp_path):
    engine, _, store = toy_engine(tmp_path)
    merged = Cell("merge", "merge", {})
    engine.grid, order = closure([Cell("test", "test", {}, {"adapter": (merged,)})]), []

    def compute(batch):
        order.append(batch[0].label)
        if order == ["merge", "test"]:
            store.drop_weights(merged)
            raise CellError("no such adapter")
        return {cell.key: {"cost": {"seconds": 1.0}} for cell in batch}

    engine.compute = compute
    outcome = engine.run()
    assert order == ["merge", "test", "merge", "test"]
    assert not outcome.failed
    assert not list((store.work / "failures").glob("*"))


def test_a_pass_is_merged_and_evaluated_before_the_next_pass_where_that_fills_a_command(tmp_path):
    engine, _, _ = toy_engine(tmp_path)
    passes = [Cell("fisher", f"pass {i}", {"i": i}) for i in range(2)]
    merges = [
        Cell("merge", f"merge {i}{j}", {"j": j}, {"fisher": (one,)}, batch=f"m{i}")
        for i, one in enumerate(passes)
        for j in range(2)
    ]
    tests = [Cell("test", f"test {merge.label[-2:]}", {}, {"adapter": (merge,)}, batch="t") for merge in merges]
    engine.grid, engine.batch_size, order = closure(tests), 2, []
    engine.compute = lambda batch: order.append(batch[0].label) or {c.key: {"cost": {"seconds": 1.0}} for c in batch}
    engine.run()
    assert order == ["pass 0", "merge 00", "test 00", "pass 1", "merge 10", "test 10"]


def test_a_training_that_one_evaluation_needs_waits_for_those_of_shared_experts(tmp_path):
    engine, _, _ = toy_engine(tmp_path)
    alone, shared = Cell("fit", "alone", {"n": 1}), Cell("fit", "shared", {"n": 2})
    parents = ((alone,), (shared,), (shared,))
    tests = [Cell("test", f"test {i}", {"i": i}, {"adapter": of}) for i, of in enumerate(parents)]
    engine.grid, order = closure(tests), []
    engine.compute = lambda batch: (
        order.extend(c.label for c in batch) or {c.key: {"cost": {"seconds": 1.0}} for c in batch}
    )
    engine.run()
    assert order == ["shared", "test 1", "test 2", "alone", "test 0"]


def test_a_living_claim_is_respected_and_a_dead_or_reused_number_is_not(tmp_path):
    one, two = Claims(tmp_path), Claims(tmp_path)
    assert one.take("k")
    assert not two.take("k")
    path = tmp_path / "k.claim"
    owner = json.loads(path.read_text())
    path.write_text(json.dumps(owner | {"started": "1"}))  # the number belongs to another process by now
    assert two.take("k")
    one.release("k")  # it is no longer ours to give back
    assert path.exists()
    two.close()
    assert not path.exists()


def test_a_process_that_is_through_leaves_nothing_in_the_folder_of_claims(tmp_path):
    claims = Claims(tmp_path)
    assert claims.take("k")
    assert claims.now() > 0
    claims.close()
    assert [path.name for path in tmp_path.iterdir() if path.name != ".lock"] == []


def test_a_claim_of_another_host_is_stale_once_nobody_touches_it(tmp_path):
    claims = Claims(tmp_path, stale_after=60)
    path = tmp_path / "k.claim"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": "1", "token": "x"}))
    assert not claims.take("k")
    os.utime(path, (time.time() - 61, time.time() - 61))
    assert claims.take("k")
    path.write_text("")  # cut by a crash: stale by age only
    assert not claims.is_stale("k")
    os.utime(path, (time.time() - 61, time.time() - 61))
    assert claims.is_stale("k")
    claims.close()


def test_a_claim_that_a_kill_left_empty_does_not_hold_the_grid(tmp_path):
    """Killed between creating and writing: nobody can say whose it was, and a long wait helps nobody."""
    engine, _, store = toy_engine(tmp_path)
    path = store.claims / f"{engine.grid[0].key}.claim"
    path.write_text("")
    assert not Claims(store.claims).is_stale(engine.grid[0].key)
    os.utime(path, (time.time() - 6, time.time() - 6))
    assert engine.run().computed == 6
    assert not path.exists()


def test_a_held_claim_is_touched(tmp_path, monkeypatch):
    monkeypatch.setattr(claims_module, "HEARTBEAT", 0.02)
    claims = Claims(tmp_path)
    claims.take("k")
    os.utime(tmp_path / "k.claim", (0, 0))
    wait_for(lambda: (tmp_path / "k.claim").stat().st_mtime > 0)
    claims.close()


def test_claims_are_touched_again_after_the_folder_did_not_answer(tmp_path, monkeypatch):
    monkeypatch.setattr(claims_module, "HEARTBEAT", 0.02)
    asked, utime = [], os.utime

    def failing(*args):
        asked.append(args)
        if len(asked) == 1:
            raise OSError(errno.ESTALE, "Stale file handle")
        utime(*args)

    monkeypatch.setattr(claims_module.os, "utime", failing)
    claims = Claims(tmp_path)
    claims.take("k")
    utime(tmp_path / "k.claim", (0, 0))
    wait_for(lambda: (tmp_path / "k.claim").stat().st_mtime > 0)
    claims.close()


def test_a_process_has_a_start_and_one_that_ended_has_none():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert process_start(os.getpid()) is not None
    assert process_start(process.pid) is None


def test_time_left_follows_measured_rates(tmp_path):
    engine, _, store = toy_engine(tmp_path)
    assert time_left(closure(toy_grid()), store) is None
    engine.run()
    todo = to_compute(toy_grid(10), store)
    assert time_left(todo, store) == pytest.approx(6 * 0.5)
    text = listing(closure(toy_grid(10)), todo, store)
    assert text.splitlines()[-1] == "12 cells, 6 cached, 6 to do, 1 min expected"
    assert hours(7500) == "2 h 05 min"


def test_time_left_follows_cells_that_asked_the_same_where_there_are_any(tmp_path):
    store = Store(tmp_path / "results", tmp_path / "work")

    def asks(suite, model, units):
        merged = Cell("merge", model, {"model": {"name": model}}, {})
        settings = {"data": {"suites": [{"name": suite}]}}
        return Cell("test", f"{model}, {suite}", settings, {"adapter": (merged,)}, units=units)

    for suite, units, seconds in (("long", 10.0, 100.0), ("short", 90.0, 100.0)):
        store.finish(asks(suite, "known", units), {"found": {}, "cost": {"seconds": seconds}})
    assert time_left([asks("long", "new", 10.0)], store) == pytest.approx(100)
    assert time_left([asks("long", "new", 20.0), asks("short", "new", 9.0)], store) == pytest.approx(200 + 10)
    assert time_left([asks("other", "new", 10.0)], store) == pytest.approx(10 * 200 / 100)
    # Seconds of a cell of unknown units say nothing of those per unit.
    store.finish(asks("hub", "known", None), {"found": {}, "cost": {"seconds": 700.0}})
    assert time_left([asks("other", "new", 10.0)], store) == pytest.approx(10 * 200 / 100)
    assert time_left([asks("other", "new", None)], store) == pytest.approx(900 / 3)


def fit_cell(rows, **data):
    return Cell("fit", "x", {"model": {"base": {"name": "hub/x"}}, "data": {"train": [{"path": str(rows)} | data]}})


def test_a_key_follows_rows_and_settings_and_not_where_files_lie(tmp_path):
    one = write_rows(tmp_path / "a.jsonl", 5, what="task")
    (tmp_path / "sub").mkdir()
    two = write_rows(tmp_path / "sub" / "b.jsonl", 5, what="task")
    assert fit_cell(one).key == fit_cell(two).key
    assert fit_cell(one).key != fit_cell(one, limit=3).key
    write_rows(two, 6, what="task")
    assert fit_cell(one).key != fit_cell(two).key
    with pytest.raises(InputError, match="no such file; expected rows"):
        _ = fit_cell(tmp_path / "missing.jsonl").key


def test_a_key_follows_the_keys_of_what_it_needs():
    roots = [Cell("merge", "same label", {"a": value}) for value in (1, 2)]
    one, two = (Cell("inspect", "x", {}, {"adapters": (root,)}) for root in roots)
    assert one.key != two.key
    assert one.key == Cell("inspect", "another label", {}, {"adapters": (roots[0],)}).key


def test_rows_are_counted_and_only_whole_draws_are_drawn_anew(tmp_path):
    path = str(write_rows(tmp_path / "a.jsonl", 9, what="task"))
    assert count_rows([{"path": path}, {"path": path, "skip": 4, "limit": 20}]) == 14
    given = [{"path": path, "seed": 3, "limit": 4}, {"path": path, "seed": 3, "limit": 4, "skip": 1}, {"path": path}]
    assert [source.get("seed") for source in redrawn(given, 10, set())] == [13, 3, None]
    assert [source.get("seed") for source in redrawn(given, 10, {path})] == [3, 3, None]
    with pytest.raises(InputError, match="unknown key 'pth'"):
        sources({"pth": path})


@pytest.mark.processes
def test_a_command_is_measured_and_its_error_is_the_reason(tmp_path):
    # In a process as small as an engine: the peak of the one that starts a command counts in, and tests before this one
    # may have taken gigabytes.
    code = "import pathlib, sys; from src.experiments.command import run_command as run; "
    code += "cost = run(['--help'], pathlib.Path(sys.argv[1])); print(cost.seconds, cost.peak_mb)"
    given = [sys.executable, "-c", code, str(tmp_path / "log.txt")]
    said = subprocess.run(given, cwd=ROOT, capture_output=True, text=True, check=True)
    seconds, peak_mb = map(float, said.stdout.split())
    assert seconds > 0
    assert 5 < peak_mb < 2000
    assert "usage: python -m src" in (tmp_path / "log.txt").read_text()
    with pytest.raises(CellError, match="unknown command 'fitt'"):
        run_command(["fitt"], tmp_path / "log.txt")


@pytest.mark.processes
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a child's peak is its own")
def test_the_peak_of_a_command_is_not_that_of_the_process_that_starts_it(tmp_path):
    code = "import pathlib, sys; from src.experiments.command import run_command as run; held = b'x' * 2_500_000_000; "
    code += "print(run(['--help'], pathlib.Path(sys.argv[1])).peak_mb)"
    given = [sys.executable, "-c", code, str(tmp_path / "log.txt")]
    said = subprocess.run(given, cwd=ROOT, capture_output=True, text=True, check=True)
    assert 5 < float(said.stdout) < 2000


def test_commands_do_not_see_the_launcher_of_their_engine():
    launcher = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "1", "SLURM_PROCID": "1"}
    kept = {"PATH": "/bin", "CUDA_VISIBLE_DEVICES": "1", "OMP_NUM_THREADS": "1"}
    assert alone(launcher | kept) == kept
    torchrun = launcher | {"TORCHELASTIC_RUN_ID": "x", "CUDA_VISIBLE_DEVICES": "4,6"}
    assert alone(torchrun) == {"CUDA_VISIBLE_DEVICES": "6"}


@pytest.mark.parametrize(
    ("visible", "rank", "own"),
    [("0,1", "2", "0"), ("0,1", "3", "1"), ("5", "1", "5"), ("", "1", ""), ("-1", "1", "-1"), (None, "1", "1")],
)
def test_engines_share_the_gpus_that_there_are_and_turn_none_on(monkeypatch, visible, rank, own):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    given = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert alone(given | {"TORCHELASTIC_RUN_ID": "x", "LOCAL_RANK": rank}) == {"CUDA_VISIBLE_DEVICES": own}


@pytest.mark.parametrize(("rank", "own"), [("1", "1"), ("2", "0"), ("5", "1")])
def test_engines_beyond_the_last_gpu_begin_again_at_the_first(monkeypatch, rank, own):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert alone({"TORCHELASTIC_RUN_ID": "x", "LOCAL_RANK": rank}) == {"CUDA_VISIBLE_DEVICES": own}


def test_a_command_that_computed_on_gpus_names_them_and_their_memory(monkeypatch, tmp_path):
    gpu = {"is_initialized": lambda: True, "max_memory_allocated": lambda: 3_000_000, "get_device_name": lambda: "A 1"}
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=SimpleNamespace(**gpu)))
    monkeypatch.setenv("SST_PEAKS", str(tmp_path / "peaks"))
    tell_peak()
    usage = SimpleNamespace(ru_maxrss=7)
    told = (tmp_path / "peaks").read_text().splitlines()
    assert _computed_on(told) == ("A 1", 3.0)
    assert peak_mb(told, usage) == peak_mb(told[:-1], usage)
    assert _computed_on(["12", "gpu 1000000 2 A 1", "13", "gpu 2000000 2 A 1"]) == ("2 x A 1", 2.0)
    assert _computed_on(["12"]) == (processor(), None)
    assert Cost(1.0, 2.0, "A 1", 3.0).shared(2)["gpu_peak_mb"] == 3.0
    assert "gpu_peak_mb" not in Cost(1.0, 2.0, "x").shared(2)


def test_the_memory_of_gpus_is_a_column_where_one_was_used(tmp_path):
    store, cells = Store(tmp_path / "results", tmp_path / "work"), [Cell("fit", "a", {}), Cell("inspect", "b", {})]
    costs = [{"seconds": 1.0, "peak_mb": 2.0, "gpu_peak_mb": 3.0}, {"seconds": 1.0, "peak_mb": 4.0}]
    for cell, cost in zip(cells, costs, strict=True):
        store.finish(cell, {"cost": cost})
    both, one = totals(cells, store), totals(cells[1:], store)
    assert [column["key"] for column in both["columns"]] == ["stage", "cells", "minutes", "peak_mb", "gpu_peak_mb"]
    assert [row["gpu_peak_mb"] for row in both["rows"]] == [3.0, ""]
    assert one["columns"] == both["columns"][:-1]
    assert "gpu_peak_mb" not in one["rows"][0]


@pytest.mark.processes
@pytest.mark.skipif(sys.platform != "linux", reason="the death signal is Linux's")
def test_a_command_ends_with_the_engine_that_started_it(tmp_path):
    child = "from src.experiments.launch import end_with_parent as e; import time, os; e(); "
    child += f"open({str(tmp_path / 'pid')!r} + '.tmp', 'w').write(str(os.getpid())); "
    child += f"os.rename({str(tmp_path / 'pid')!r} + '.tmp', {str(tmp_path / 'pid')!r}); time.sleep(600)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT)
    wait_for((tmp_path / "pid").exists)
    pid = int((tmp_path / "pid").read_text())
    assert process_start(pid) is not None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    wait_for(lambda: process_start(pid) is None)
