"""Trainings that end early and go on: every batch once, and the same weights bit for bit."""

import json
import os
import signal
from pathlib import Path

import pytest
from lightning import Callback

from src.cli import main
from src.models.checkpoints import RecentCheckpoint
from tests.commands import fit_flags, run_processes

BATCHES = 5
"""Of an epoch of 13 rows, three in a batch."""
RECENT = Path("run", "checkpoints", "recent.ckpt")


class Watch(Callback):
    """Notes the rows of each batch in a file of its process, and ends the run at the start of a batch.

    Args:
        notes: Folder of the files.
        stop: Batches of the run before its end; -1 lets it come to its end.
        number: Signal to send to the process at that batch; 0 is Ctrl-C, which Python raises itself.
        every: Seconds from one recent checkpoint to the next; 0 saves after every batch.
    """

    def __init__(self, notes: str, stop: int = -1, number: int = 0, every: float = 600.0) -> None:
        self.notes, self.stop, self.number, self.every = Path(notes), stop, number, every

    def setup(self, trainer, pl_module, stage):
        for callback in trainer.callbacks:
            if isinstance(callback, RecentCheckpoint):
                callback.every, callback.TOGETHER = self.every, 1

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.stop:
            if self.number:
                signal.raise_signal(self.number)  # to this thread, so that it is handled before the batch
            if self.number != signal.SIGTERM:
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


def flags(base, rows, folder, *more, stop=-1, number=0, every=600.0, hardware="cpu.yaml"):
    folder.mkdir(exist_ok=True)
    watch = {"notes": str(folder), "stop": stop, "number": int(number), "every": every}
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


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_terminated_training_leaves_a_checkpoint_of_its_last_batch(base, rows, whole, tmp_path, capsys, accumulated):
    more = ["--trainer.accumulate_grad_batches", str(accumulated)]
    assert main(flags(base, rows, tmp_path / "parts", *more, stop=2, number=signal.SIGTERM)) == 2
    assert "error: interrupted" in capsys.readouterr().err
    assert len(seen(tmp_path / "parts")[0]) == 3
    assert main(flags(base, rows, tmp_path / "parts", *more, "--resume", "true")) == 0
    check_equal(whole(*more), tmp_path / "parts", 3 if accumulated == 1 else 2)


def test_resume_says_that_there_is_no_checkpoint(base, rows, tmp_path, capsys):
    assert main(flags(base, rows, tmp_path / "parts", stop=3)) == 2
    assert main(flags(base, rows, tmp_path / "parts", "--resume", "true")) == 0
    assert f"no checkpoint in {tmp_path / 'parts' / 'expert'}" in capsys.readouterr().err


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
