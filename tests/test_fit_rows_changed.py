"""Trainings that are to go on after something has changed: rows under the same name, times of files, leftovers."""

import json
import os
import shutil

import pytest
import torch
import yaml
from lightning import Callback

from src.adapters.peft_files import CONFIG, MANIFEST, SEEN
from src.cli import main
from src.data.rows import Row
from src.files import UNFINISHED, begin_output
from src.models.checkpoint_rows import ROWS, other_rows
from src.run_folder import CHECKPOINTS, FINISHED, RECENT, RUN, clear_run, other_run
from tests.commands import fit_flags

SETTINGS = {"model": {"rate": 1e-05}, "data": {"train": "t.jsonl"}, "seed_everything": 0}


class Leave(Callback):
    """Ends the run within its second epoch, as a kill does: its first validation has left a checkpoint."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch == 1:
            raise MemoryError


@pytest.fixture
def killed(base, rows, tmp_path):
    """Flags of a training that has ended early, the file of its rows and its checkpoint."""
    path = shutil.copy(rows["task"], tmp_path / "t.jsonl")
    flags = fit_flags(base, rows | {"task": path}, tmp_path / "out", "--trainer.max_epochs", "2")
    with pytest.raises(MemoryError):
        main([*flags, "--trainer.callbacks+", "tests.test_fit_rows_changed.Leave"])
    return flags, path, tmp_path / "out" / CHECKPOINTS / "last.ckpt"


def test_a_training_goes_on_with_its_own_rows_only(killed, tmp_path, capsys):
    flags, path, last = killed
    folder, before, had = last.parents[2], last.read_bytes(), path.read_bytes()
    for number, line in enumerate(lines := had.decode().splitlines()):
        lines[number] = json.dumps(json.loads(line) | {"prompt": f"another prompt {number}"})
    path.write_text("\n".join(lines) + "\n")
    elsewhere = [*flags[: flags.index("--output")], "--trainer.max_epochs", "2", "--output", str(tmp_path / "new")]
    for again in ([*flags, "--resume", "true"], [*elsewhere, "--ckpt_path", str(last)]):
        capsys.readouterr()
        assert main(again) == 2
        (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert error.startswith(f"error: {last}: data.train has other rows than the run that is to go on; expected the")
        assert "--overwrite true" in error
    assert last.read_bytes() == before
    assert not (folder / MANIFEST).exists()
    assert main([*flags, "--resume", "true", "--overwrite", "true"]) == 0
    assert "is of a run with other rows (data.train): starting over" in capsys.readouterr().err
    assert Row("", "another prompt 0").prompt_hash in (folder / SEEN).read_text()


def test_rows_that_lie_elsewhere_are_the_same(killed, base, rows, tmp_path):
    _, path, last = killed
    moved = shutil.move(path, tmp_path / "moved.jsonl")
    flags = fit_flags(base, rows | {"task": moved}, tmp_path / "new", "--trainer.max_epochs", "2")
    assert main([*flags, "--ckpt_path", str(last)]) == 0


def test_only_rows_that_a_checkpoint_tells_of_are_compared(tmp_path):
    rows, path = {"train": "a", "val": "b"}, tmp_path / "last.ckpt"
    assert other_rows(tmp_path / "absent.ckpt", rows) == other_rows(tmp_path, rows) == ""
    path.write_bytes(b"PK")
    assert other_rows(path, rows) == ""
    for before, name in (
        ({}, ""),  # an earlier version's
        ({ROWS: rows}, ""),
        ({ROWS: rows | {"train": "c"}}, "data.train"),
        ({ROWS: rows | {"val": "c"}}, "data.val"),
    ):
        torch.save({"state_dict": {}} | before, path)
        assert other_rows(path, rows) == name


@pytest.fixture
def finished(tmp_path):
    """The output of a training that has written its adapter, whose files have times that tell of the contrary."""
    (tmp_path / CHECKPOINTS).mkdir(parents=True)
    (tmp_path / RUN / "config.yaml").write_text(yaml.safe_dump(SETTINGS))
    (tmp_path / MANIFEST).write_text(json.dumps({"settings": SETTINGS | {"lora": {}, "trainer": {"max_epochs": 1}}}))
    (tmp_path / CONFIG).write_text("{}")
    os.utime(tmp_path / CONFIG, (0, 0))
    return tmp_path


def test_a_finished_training_is_known_whatever_the_times_of_its_files(finished):
    assert other_run(finished, SETTINGS) == other_run(finished, SETTINGS | {"seed_everything": 1}) == FINISHED


@pytest.mark.parametrize("settings", [{"command": "fit"}, None])
@pytest.mark.parametrize("left", [UNFINISHED, f"{CHECKPOINTS}/{RECENT}", "hpc_ckpt_1.ckpt", "another", "no manifest"])
def test_a_training_is_unfinished_whatever_the_times_of_its_files(finished, left, settings):
    """Also where an adapter is there: of a run before, or written just before a kill."""
    if left == UNFINISHED:
        begin_output(finished, settings)
    elif left == "another":
        (finished / MANIFEST).write_text(json.dumps({"settings": SETTINGS | {"model": {}}}))
    elif left == "no manifest":
        (finished / MANIFEST).unlink()
    else:
        (finished / left).touch()
    (finished / CONFIG).touch()
    os.utime(finished / RUN / "config.yaml", (0, 0))
    assert other_run(finished, SETTINGS) == ""
    assert "seed_everything is 0 there, 1 here" in other_run(finished, SETTINGS | {"seed_everything": 1})


def test_what_a_kill_has_left_half_written_goes_when_a_run_begins(tmp_path):
    half = [".adapter_model.safetensors.ab_12xyz.tmp", f"{CHECKPOINTS}/.recent.ckpt.ab_12xyz.tmp"]
    half += ["answers/a/.suite.jsonl.ab_12xyz.tmp"]
    kept = [f"{CHECKPOINTS}/recent.ckpt", ".other.tmp", ".parts/.part.ab_12xyz.tmp", "answers/a/suite.jsonl"]
    for name in (*half, *kept):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / ".sub.ab_12xyz.tmp").mkdir()  # another run's, beside an output that lies in this one
    clear_run(tmp_path, stays=True)
    assert all((tmp_path / name).exists() for name in (*kept, ".sub.ab_12xyz.tmp"))
    assert not any((tmp_path / name).exists() for name in half)
