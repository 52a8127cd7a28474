"""Trainings that end early and go on: every batch once, and the same weights bit for bit."""

import copy
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning import Callback
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

from src.cli import main
from src.errors import InputError
from src.models.checkpoints import (
    GOING_ON,
    can_go_on,
    check_checkpoint,
    check_processes,
    goes_on_with,
    keeps_schedule,
    lies_with,
    rewind_to_step,
)
from src.models.recent_checkpoint import RecentCheckpoint
from tests.commands import fit_flags, run_processes

BATCHES = 5
"""Of an epoch of 13 rows, three in a batch."""
RECENT = Path("run", "checkpoints", "recent.ckpt")
OVERSHOOTING = ("--model.optimizer.lr", "2.0", "--trainer.max_epochs", "4")
"""A training whose first validation is its best."""


class Watch(Callback):
    """Notes the rows of each batch in a file of its process, and ends the run at the start of a batch.

    Args:
        notes: Folder of the files.
        stop: Batches of the run before its end; -1 lets it come to its end.
        number: Signal to send to the process at that batch; 0 ends the run there, with no checkpoint.
        times: How often it is sent.
        every: Seconds from one recent checkpoint to the next; 0 saves after every batch.
    """

    def __init__(self, notes: str, stop: int = -1, number: int = 0, every: float = 600.0, times: int = 1) -> None:
        self.notes, self.stop, self.number, self.every, self.times = Path(notes), stop, number, every, times

    def setup(self, trainer, pl_module, stage):
        for callback in trainer.callbacks:
            if isinstance(callback, RecentCheckpoint):
                callback.EVERY, callback.TOGETHER = self.every, 1

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.stop:
            for _ in range(self.times if self.number else 0):
                signal.raise_signal(self.number)  # to this thread, so that it is handled before the batch
            if self.number not in (signal.SIGTERM, signal.SIGINT):
                raise KeyboardInterrupt
        self.note(trainer, [trainer.current_epoch, batch_idx, batch.index.tolist()])

    def on_train_start(self, trainer, pl_module):
        self.note(trainer, "start")

    def note(self, trainer, what):
        with (self.notes / f"rows-{trainer.global_rank}.txt").open("a") as file:
            file.write(json.dumps(what) + "\n")


@pytest.fixture(autouse=True)
def interruptible():
    """Lightning switches Ctrl-C off for good once it has come."""
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)


def flags(base, rows, folder, *more, stop=-1, number=0, every=600.0, times=1, hardware="cpu.yaml"):
    folder.mkdir(exist_ok=True)
    watch = {"notes": str(folder), "stop": stop, "number": int(number), "every": every, "times": times}
    given = [part for key, value in watch.items() for part in (f"--trainer.callbacks.{key}", str(value))]
    watched = ["--trainer.callbacks+", "tests.test_fit_resume.Watch", *given]
    output = folder / "expert"
    return fit_flags(base, rows, output, "--trainer.max_epochs", "2", *watched, *more, hardware=hardware)


@pytest.fixture(scope="module")
def whole(base, rows, tmp_path_factory):
    """A function that gives the folder of a run without an interruption, each made once."""
    root, made = tmp_path_factory.mktemp("whole"), {}

    def run(*more):
        if more not in made:
            made[more] = root / str(len(made))
            assert main(flags(base, rows, made[more], *more)) == 0
        return made[more]

    return run


def seen(folder, rank=0):
    """Epoch, number and rows of each batch, for each run."""
    runs = []
    for line in (folder / f"rows-{rank}.txt").read_text().splitlines():
        if json.loads(line) == "start":
            runs.append([])
        else:
            runs[-1].append(json.loads(line))
    return runs


def result(folder):
    manifest = json.loads((folder / "expert" / "manifest.json").read_text())
    return (folder / "expert" / "adapter_model.safetensors").read_bytes(), manifest["steps"], manifest["val_loss"]


def check_equal(whole, parts, kept, ranks=(0,)):
    """The run in two parts saw each batch, those after the ``kept`` first in its second part, and ended the same."""
    for rank in ranks:
        (batches,), (first, second) = seen(whole, rank), seen(parts, rank)
        assert first[:kept] == batches[:kept]
        assert second == batches[kept:]
    assert result(parts) == result(whole)
    assert not (parts / "expert" / RECENT).exists()


@pytest.mark.parametrize(
    ("accumulated", "stop", "kept"), [(1, 2, 2), (1, BATCHES + 2, BATCHES + 2), (2, 3, 2), (3, BATCHES + 2, BATCHES)]
)
def test_a_killed_training_goes_on_within_its_epoch(base, rows, whole, tmp_path, accumulated, stop, kept):
    more = ["--trainer.accumulate_grad_batches", str(accumulated)]
    assert main(flags(base, rows, tmp_path / "parts", *more, stop=stop, every=0.0)) == 2
    assert main(flags(base, rows, tmp_path / "parts", *more, "--resume", "true")) == 0
    check_equal(whole(*more), tmp_path / "parts", kept)


@pytest.mark.parametrize(("accumulated", "stop", "kept"), [(1, 3, 2), (3, 4, 3)])
def test_a_training_goes_on_from_a_validation_within_its_epoch(base, rows, whole, tmp_path, accumulated, stop, kept):
    more = ["--trainer.accumulate_grad_batches", str(accumulated), "--trainer.val_check_interval", "2"]
    assert main(flags(base, rows, tmp_path / "parts", *more, stop=stop)) == 2
    assert main(flags(base, rows, tmp_path / "parts", *more, "--resume", "true")) == 0
    check_equal(whole(*more), tmp_path / "parts", kept)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_stopped_training_leaves_a_checkpoint_of_its_last_batch(
    base, rows, whole, tmp_path, capsys, accumulated, number
):
    more = ["--trainer.accumulate_grad_batches", str(accumulated)]
    assert main(flags(base, rows, tmp_path / "parts", *more, stop=2, number=number)) == 2
    assert "error: interrupted" in capsys.readouterr().err
    assert len(seen(tmp_path / "parts")[0]) == 3
    assert main(flags(base, rows, tmp_path / "parts", *more, "--resume", "true")) == 0
    check_equal(whole(*more), tmp_path / "parts", 3 if accumulated == 1 else 2)


def test_a_second_ctrl_c_stops_at_once(base, rows, tmp_path, capfd):
    assert main(flags(base, rows, tmp_path / "parts", stop=2, number=signal.SIGINT, times=2)) == 2
    said = capfd.readouterr().err
    assert said.count("the training stops after this batch, with a checkpoint") == 1
    assert "error: interrupted" in said
    assert len(seen(tmp_path / "parts")[0]) == 2
    assert not (tmp_path / "parts" / "expert" / RECENT).exists()


def test_ctrl_c_before_a_validation_stops_behind_it(base, rows, whole, tmp_path):
    """A checkpoint of the batch before would leave it out."""
    assert main(flags(base, rows, tmp_path / "parts", stop=BATCHES - 1, number=signal.SIGINT)) == 2
    assert len(seen(tmp_path / "parts")[0]) == BATCHES + 1
    assert main(flags(base, rows, tmp_path / "parts", "--resume", "true")) == 0
    check_equal(whole(), tmp_path / "parts", BATCHES + 1)


def test_ctrl_c_in_the_last_batch_comes_too_late(base, rows, whole, tmp_path):
    before = signal.getsignal(signal.SIGINT)
    assert main(flags(base, rows, tmp_path / "parts", stop=2 * BATCHES - 1, number=signal.SIGINT)) == 0
    assert result(tmp_path / "parts") == result(whole())
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.filterwarnings("ignore:.*could not find the monitored key")  # at the end of the epoch that is over
def test_a_training_with_a_limit_of_steps_loses_no_epoch(base, rows, whole, tmp_path):
    """It ends in the middle of the second epoch."""
    more = ["--trainer.max_steps", str(2 * BATCHES - 1)]
    assert main(flags(base, rows, tmp_path / "parts", *more, stop=BATCHES + 2)) == 2
    assert main(flags(base, rows, tmp_path / "parts", *more, "--resume", "true")) == 0
    check_equal(whole(*more), tmp_path / "parts", BATCHES)
    assert result(tmp_path / "parts")[1] == 2 * BATCHES - 1


@pytest.mark.parametrize("completed", [1, 2])
def test_an_epoch_that_is_over_is_counted_once(completed):
    """Whether its checkpoint was saved before the epoch was completed or after."""
    batches = {"is_last_batch": True, "current": {"processed": BATCHES}}
    counts = {"ready": 2, "started": 2, "processed": 2, "completed": completed}
    loop = {"epoch_progress": {"current": counts, "total": dict(counts)}, "epoch_loop.batch_progress": batches}
    checkpoint = {"loops": {"fit_loop": loop}}
    before = copy.deepcopy(checkpoint)
    rewind_to_step(checkpoint, 1)
    assert checkpoint == before
    rewind_to_step(checkpoint, 1, limited=True)
    within = {"ready": 2, "started": 2, "processed": 1, "completed": 1}
    assert loop["epoch_progress"] == {"current": within, "total": within}


def test_a_training_goes_on_with_as_many_processes_within_its_epoch(base, rows, tmp_path, capsys):
    assert main(flags(base, rows, tmp_path / "parts", stop=2, every=0.0)) == 2
    path = tmp_path / "parts" / "expert" / RECENT
    found = torch.load(path, weights_only=False)
    assert found["world_size"] == 1
    torch.save(found | {"world_size": 2}, path)
    capsys.readouterr()
    assert main(flags(base, rows, tmp_path / "parts", "--resume", "true")) == 2
    assert f"error: {path}: processes of its training: 2, here: 1; expected 2" in capsys.readouterr().err
    assert len(seen(tmp_path / "parts")) == 1


@pytest.mark.parametrize(
    ("within", "same_steps", "refused"), [(True, True, "dealt out"), (False, False, "learning rate"), (False, True, "")]
)
def test_other_processes_may_begin_an_epoch_where_steps_stay_the_same(within, same_steps, refused):
    batches = {"is_last_batch": not within, "current": {"processed": 3}}
    checkpoint = {"world_size": 2, "loops": {"fit_loop": {"epoch_loop.batch_progress": batches}}}
    check_processes("last.ckpt", checkpoint, 2, same_steps=same_steps)
    with pytest.raises(InputError, match=refused) if refused else nullcontext():
        check_processes("last.ckpt", checkpoint, 4, same_steps=same_steps)
    del checkpoint["world_size"]  # an older one
    check_processes("last.ckpt", checkpoint, 4, same_steps=same_steps)


@pytest.mark.parametrize("within", [True, False])
def test_a_run_that_may_start_over_leaves_out_what_other_processes_have_begun(tmp_path, within):
    """As a study's training does that another machine takes over, with ``--overwrite true``."""
    batches = {"is_last_batch": not within, "current": {"processed": 3}}
    given = {"world_size": 2, "optimizer_states": [], "loops": {"fit_loop": {"epoch_loop.batch_progress": batches}}}
    torch.save(given, tmp_path / "last.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "weights.ckpt")
    (tmp_path / "broken.ckpt").write_bytes(b"PK")
    assert goes_on_with(tmp_path / "last.ckpt", 2, same_steps=True)
    assert goes_on_with(tmp_path / "last.ckpt", 4, same_steps=True) is not within
    assert not goes_on_with(tmp_path / "last.ckpt", 4, same_steps=False)
    for other in ("weights.ckpt", "broken.ckpt", "absent.ckpt"):
        assert goes_on_with(tmp_path / other, 4, same_steps=False)


def test_an_archive_of_something_else_is_no_checkpoint(tmp_path):
    path = tmp_path / "last.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "a")
    assert can_go_on(path)
    assert goes_on_with(path, 4, same_steps=False)
    with pytest.raises(InputError, match=r"--ckpt_path .*last\.ckpt: not a readable checkpoint \(torch\.load"):
        check_checkpoint(str(path), goes_on=True)


@pytest.mark.parametrize(
    ("schedule", "warmup", "shared", "kept"),
    [
        ("constant", 0.0, False, True),
        ("constant", 0.1, False, False),
        ("cosine", 0.0, False, False),
        ("cosine", 0.1, True, True),
    ],
)
def test_a_rate_hangs_on_the_processes_by_warm_up_and_by_fall(schedule, warmup, shared, kept):
    module, data = SimpleNamespace(schedule=schedule, warmup=warmup), SimpleNamespace(shared_batch=shared)
    assert keeps_schedule(module, data) is kept


def test_a_checkpoint_lies_with_a_run_in_its_output_and_where_its_callbacks_write(tmp_path):
    trainer = SimpleNamespace(checkpoint_callbacks=[SimpleNamespace(dirpath=str(tmp_path / "scratch"))])
    for place, own in (("out/run/checkpoints", True), ("out", True), ("scratch", True), ("other", False)):
        assert lies_with(tmp_path / place / "last.ckpt", tmp_path / "out", trainer) is own
    assert not lies_with(tmp_path / "out" / "another" / "run" / "checkpoints" / "last.ckpt", tmp_path / "out", trainer)


@pytest.mark.filterwarnings("ignore:.*could not find the monitored key")
def test_a_run_from_the_checkpoint_of_another_goes_on_from_its_own_and_writes_its_own(base, rows, whole, tmp_path):
    """Without a validation there is no best checkpoint but that of the other run."""
    other = whole()
    last = other / "expert" / "run" / "checkpoints" / "last.ckpt"
    more = ["--ckpt_path", str(last), "--resume", "true", "--trainer.max_epochs", "3"]
    more += ["--trainer.limit_val_batches", "0"]
    assert main(flags(base, rows, tmp_path / "parts", *more, stop=2 * BATCHES + 3, every=0.0)) == 2
    assert main(flags(base, rows, tmp_path / "parts", *more)) == 0
    first, second = seen(tmp_path / "parts")
    assert [batch[:2] for batch in first] == [[2, 0], [2, 1], [2, 2]]
    assert [batch[:2] for batch in second] == [[2, 3], [2, 4]]
    weights, steps, loss = result(tmp_path / "parts")
    assert weights != result(other)[0]
    assert (steps, loss) == (3 * BATCHES, None)


def test_resume_says_that_there_is_no_checkpoint(base, rows, tmp_path, capsys):
    assert main(flags(base, rows, tmp_path / "parts", stop=3)) == 2
    assert main(flags(base, rows, tmp_path / "parts", "--resume", "true")) == 0
    assert f"no checkpoint in {tmp_path / 'parts' / 'expert'}" in capsys.readouterr().err


def worse_at_the_end(folder):
    """Whether the best validation of a run was not its last one."""
    lines = csv.DictReader((folder / "expert" / "run" / "metrics.csv").read_text().splitlines())
    losses = [float(line["val_loss"]) for line in lines if line["val_loss"]]
    return min(losses) < losses[-1]


@pytest.mark.parametrize("how", ["moved", "relative"])
def test_the_best_checkpoint_is_remembered_where_the_output_has_another_name(
    base, rows, whole, tmp_path, monkeypatch, how
):
    assert worse_at_the_end(whole(*OVERSHOOTING))
    parts = tmp_path / "parts"
    assert main(flags(base, rows, parts, *OVERSHOOTING, stop=2 * BATCHES + 1)) == 2
    if how == "moved":
        parts = parts.rename(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    given = flags(base, rows, parts, *OVERSHOOTING, "--resume", "true")
    relative = [part.replace(f"{tmp_path}/", "") if part == str(parts / "expert") else part for part in given]
    assert main(given if how == "moved" else relative) == 0
    assert result(parts) == result(whole(*OVERSHOOTING))
    assert not list(parts.rglob("last-v*.ckpt"))


def test_a_best_checkpoint_that_has_not_come_along_is_forgotten(base, rows, whole, tmp_path):
    """Nothing that is written has its loss."""
    assert main(flags(base, rows, tmp_path / "parts", *OVERSHOOTING, stop=2 * BATCHES + 1)) == 2
    run = Path("expert", "run")
    (tmp_path / "copied" / run / "checkpoints").mkdir(parents=True)
    for name in ("config.yaml", "checkpoints/last.ckpt"):
        shutil.copy(tmp_path / "parts" / run / name, tmp_path / "copied" / run / name)
    assert main(flags(base, rows, tmp_path / "copied", *OVERSHOOTING, "--resume", "true")) == 0
    assert not worse_at_the_end(tmp_path / "copied")
    assert result(tmp_path / "copied")[2] > result(whole(*OVERSHOOTING))[2]


def test_a_newer_checkpoint_of_weights_alone_does_not_hide_an_older_whole_one(base, rows, whole, tmp_path):
    assert main(flags(base, rows, tmp_path / "parts", stop=BATCHES + 2, every=0.0)) == 2
    folder = tmp_path / "parts" / "expert" / "run" / "checkpoints"
    found = torch.load(folder / "recent.ckpt", weights_only=False)
    torch.save({key: value for key, value in found.items() if key not in GOING_ON}, folder / "last.ckpt")
    assert main(flags(base, rows, tmp_path / "parts", "--resume", "true")) == 0
    check_equal(whole(), tmp_path / "parts", BATCHES + 2)


def test_a_run_without_the_usual_logger_goes_on(base, rows, whole, tmp_path):
    more = ["--trainer.logger", "false"]
    assert main(flags(base, rows, tmp_path / "parts", *more, stop=BATCHES + 2)) == 2
    assert main(flags(base, rows, tmp_path / "parts", *more, "--resume", "true")) == 0
    check_equal(whole(), tmp_path / "parts", BATCHES)
    assert (tmp_path / "parts" / "expert" / "run" / "config.yaml").is_file()


def test_a_killed_run_that_was_to_replace_another_goes_on(base, rows, whole, tmp_path, capsys):
    more = ["--model.lora.rank", "3"]
    assert main(flags(base, rows, tmp_path / "parts")) == 0
    (tmp_path / "parts" / "rows-0.txt").unlink()
    assert main(flags(base, rows, tmp_path / "parts", *more, "--overwrite", "true", stop=BATCHES + 2)) == 2
    assert (tmp_path / "parts" / "expert" / "adapter_config.json").is_file()
    assert main(flags(base, rows, tmp_path / "parts", *more, "--resume", "true")) == 0
    check_equal(whole(*more), tmp_path / "parts", BATCHES)
    assert main(flags(base, rows, tmp_path / "parts", *more, "--resume", "true")) == 0
    assert "is of a run that was finished: starting over" in capsys.readouterr().err


def test_a_checkpoint_of_weights_alone_is_nothing_to_go_on_from(base, rows, tmp_path, capsys):
    saving = ["--trainer.callbacks+", "lightning.pytorch.callbacks.ModelCheckpoint", "--trainer.callbacks.save_last"]
    saving += ["true", "--trainer.callbacks.save_weights_only", "true", "--trainer.callbacks.monitor", "val_loss"]
    config = tmp_path / "expert.yaml"
    config.write_text("{}\n")
    given = flags(base, rows, tmp_path / "parts", stop=BATCHES + 2)
    given[given.index("expert.yaml")] = str(config)
    assert main([*given, *saving]) == 2
    again = flags(base, rows, tmp_path / "parts", "--resume", "true")
    again[again.index("expert.yaml")] = str(config)
    assert main([*again, *saving]) == 2
    assert "holds weights alone (save_weights_only)" in capsys.readouterr().err


@pytest.mark.parametrize("monitor", ["step", "train_loss"])
def test_a_validation_loss_is_none_where_checkpoints_are_chosen_by_something_else(base, rows, tmp_path, monitor):
    config = tmp_path / "expert.yaml"
    chosen = {"monitor": monitor, "mode": "max", "every_n_train_steps": 1}
    callback = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": chosen}
    config.write_text(json.dumps({"trainer": {"callbacks": [callback]}}))
    given = fit_flags(base, rows, tmp_path / "expert")
    given[given.index("expert.yaml")] = str(config)
    assert main(given) == 0
    assert json.loads((tmp_path / "expert" / "manifest.json").read_text())["val_loss"] is None


@pytest.mark.parametrize(("steps", "measured"), [(2 * BATCHES - 1, False), (2 * BATCHES, True)])
def test_a_validation_loss_is_that_of_the_step_that_is_written(base, rows, tmp_path, steps, measured):
    """Lightning's own checkpoints, of the last step."""
    config = tmp_path / "expert.yaml"
    config.write_text("{}\n")
    given = fit_flags(base, rows, tmp_path / "expert", "--trainer.max_steps", str(steps))
    given[given.index("expert.yaml")] = str(config)
    assert main(given) == 0
    manifest = json.loads((tmp_path / "expert" / "manifest.json").read_text())
    lines = csv.DictReader((tmp_path / "expert" / "run" / "metrics.csv").read_text().splitlines())
    last = [float(line["val_loss"]) for line in lines if line["val_loss"]][-1]
    assert manifest["steps"] == steps
    assert manifest["val_loss"] == (pytest.approx(last, rel=1e-6) if measured else None)


def of_two(strategy, validates, **more):
    """A Trainer of two processes in the middle of an epoch."""
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(_should_check_val_fx=validates), _data_fetcher=None)
    shared = {"world_size": 2, "fit_loop": loop, "is_last_batch": False, "received_sigterm": False}
    return SimpleNamespace(strategy=strategy, **shared, **more)


def test_several_processes_ask_about_once_a_minute_however_long_batches_take(monkeypatch):
    """The first process says after how many batches; all count alike."""
    clock, asked, saved = [0.0], [], []
    monkeypatch.setattr("src.models.recent_checkpoint.time.monotonic", lambda: clock[0])
    strategy = SimpleNamespace(broadcast=lambda value: asked.append(clock[0]) or value)
    trainer = of_two(strategy, lambda _: False, save_checkpoint=lambda _: saved.append(clock[0]))
    callback = RecentCheckpoint(Path("recent.ckpt"))
    callback.on_train_start(trainer)
    for _ in range(60):
        clock[0] += 30.0
        callback.on_train_batch_end(trainer)
    gaps = [later - earlier for earlier, later in pairwise([0.0, *asked])]
    assert gaps == [30.0, *[60.0] * (len(gaps) - 1)]
    assert [later - earlier for earlier, later in pairwise([0.0, *saved])] == pytest.approx(
        [600.0] * len(saved), abs=60
    )
    asked.clear()
    for _ in range(1000):
        clock[0] += 0.01
        callback.on_train_batch_end(trainer)
    assert len(asked) == pytest.approx(1000 / 64, abs=3)


def test_several_processes_answer_slurms_signal_at_a_common_step(monkeypatch):
    """Its handler writes a checkpoint of all: within the signal every process would be at a step of its own."""
    answered = []
    environment = SLURMEnvironment(auto_requeue=True, requeue_signal=signal.SIGUSR2)
    strategy = SimpleNamespace(broadcast=lambda value: value, cluster_environment=environment)
    connector = SimpleNamespace(_slurm_sigusr_handler_fn=lambda number, _: answered.append(number))
    trainer = of_two(strategy, lambda _: validates, _signal_connector=connector)
    callback, before = RecentCheckpoint(Path("recent.ckpt")), signal.getsignal(signal.SIGUSR2)
    try:
        callback.on_train_start(trainer)
        signal.raise_signal(signal.SIGUSR2)
        assert answered == []
        for validates in (True, False, False):  # what goes on from before a validation would leave it out
            callback._left = 1
            callback.on_train_batch_end(trainer)
            assert answered == ([] if validates else [signal.SIGUSR2])
    finally:
        signal.signal(signal.SIGUSR2, before)


@pytest.mark.parametrize("slower", [0, 1])
def test_sigterm_ends_several_processes_whatever_step_each_is_in(tmp_path, slower):
    """Lightning's own handler broadcasts: one process would wait in it, the other one in its step, for ever."""
    script = Path(__file__).with_name("slow_ranks.py")
    command = [sys.executable, str(script), str(tmp_path), str(slower)]
    environment = os.environ | {"PYTHONPATH": str(script.parents[1]), "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as run:
        try:
            marks = [tmp_path / f"rank{rank}" for rank in range(2)]
            for _ in range(600):
                if all(mark.exists() for mark in marks) or run.poll() is not None:
                    break
                time.sleep(0.1)
            assert run.poll() is None, run.stderr.read()
            run.send_signal(signal.SIGTERM)
            run.communicate(timeout=60)
        finally:
            run.kill()
    for mark in marks:
        for _ in range(100):
            if not Path(f"/proc/{mark.read_text()}").exists():
                break
            time.sleep(0.1)
        else:
            raise AssertionError(f"{mark.name} is still there")


@pytest.fixture
def slurm(monkeypatch, tmp_path):
    """The environment of a SLURM job of one process, which is queued again."""
    (tmp_path / "bin").mkdir()
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.write_text("#!/bin/sh\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    job = {"NTASKS": "1", "JOB_ID": "7", "JOB_NAME": "fit", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    for key, value in job.items():
        monkeypatch.setenv(f"SLURM_{key}", value)
    before = signal.getsignal(signal.SIGUSR1)
    yield monkeypatch
    signal.signal(signal.SIGUSR1, before)


def test_a_requeued_slurm_job_goes_on(base, rows, whole, tmp_path, slurm):
    stopped = {"stop": BATCHES + 2, "number": signal.SIGUSR1}  # after the last checkpoint of the first epoch
    assert main(flags(base, rows, tmp_path / "parts", **stopped)) == 2
    assert (tmp_path / "parts" / "expert" / "hpc_ckpt_1.ckpt").is_file()
    assert main(flags(base, rows, tmp_path / "parts")) == 2  # started by hand
    slurm.setenv("SLURM_RESTART_COUNT", "1")
    assert main(flags(base, rows, tmp_path / "parts")) == 0
    check_equal(whole(), tmp_path / "parts", BATCHES + 2)
    assert not list((tmp_path / "parts" / "expert").glob("hpc*"))
    assert main(flags(base, rows, tmp_path / "parts")) == 2  # a finished one is no other run's to replace


def test_resume_takes_the_newest_checkpoint(base, rows, whole, tmp_path, slurm):
    assert main(flags(base, rows, tmp_path / "parts", stop=BATCHES + 2, number=signal.SIGUSR1)) == 2
    assert main(flags(base, rows, tmp_path / "parts", "--resume", "true")) == 0
    check_equal(whole(), tmp_path / "parts", BATCHES + 2)


def test_a_stale_checkpoint_of_slurm_is_no_part_of_another_run(base, rows, whole, tmp_path, slurm):
    other = ["--data.seed", "3"]
    assert main(flags(base, rows, tmp_path / "parts", *other, stop=2, number=signal.SIGUSR1)) == 2
    assert main(flags(base, rows, tmp_path / "parts", "--overwrite", "true")) == 0
    assert seen(tmp_path / "parts")[1] == seen(whole())[0]
    assert result(tmp_path / "parts") == result(whole())


@pytest.mark.processes
def test_two_processes_go_on_within_their_epoch(base, rows, tmp_path):
    """Three batches in each; the last of the second process is a repeated one."""
    more = ["--trainer.accumulate_grad_batches", "2"]
    hardware = {"hardware": "ddp_sim.yaml"}
    run_processes(flags(base, rows, tmp_path / "whole", *more, **hardware))
    run_processes(flags(base, rows, tmp_path / "parts", *more, stop=4, every=0.0, **hardware), code=2)
    run_processes(flags(base, rows, tmp_path / "parts", *more, "--resume", "true", **hardware))
    check_equal(tmp_path / "whole", tmp_path / "parts", 3, ranks=(0, 1))
