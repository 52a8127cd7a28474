"""Outputs of the commands that run a Trainer: one folder, one run at a time, no training lost to another command."""

import errno
import fcntl
import json
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from types import SimpleNamespace

import pytest
import yaml
from lightning import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException

from src.adapters.peft_files import read_adapter
from src.cli import main
from src.errors import InputError
from src.files import held_output
from src.models.stopping import StopAtSigterm
from tests.commands import ROOT, clean_environment, fisher_flags, fit_flags
from tests.test_pipeline import test_flags


class Hold(Callback):
    """Says that training has begun, and waits there."""

    def on_train_start(self, trainer, pl_module):
        sys.stdout.write("begun\n")
        sys.stdout.flush()
        time.sleep(120)


class Interrupt(Callback):
    """Presses Ctrl-C in the second epoch."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch == 1:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def unfinished(base, rows, tmp_path_factory):
    """The folder of a training that was interrupted in its second epoch."""
    folder = tmp_path_factory.mktemp("unfinished") / "expert"
    assert main(fit_flags(base, rows, folder, "--trainer.callbacks+", "tests.test_outputs.Interrupt")) == 2
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return folder


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def one_error(capsys):
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    return errors[0]


@pytest.mark.parametrize("command", ["validate", "test", "predict", "fisher"])
def test_only_fit_touches_a_training(base, adapters, rows, unfinished, tmp_path, capsys, command):
    folder = shutil.copytree(unfinished, tmp_path / "expert")
    before = tree(folder)
    flags = {
        "validate": [*fit_flags(base, rows, folder), "--ckpt_path", str(folder / "run" / "checkpoints" / "last.ckpt")],
        "fisher": fisher_flags(base, adapters, rows, folder),
    }.get(command) or test_flags(base, rows, tmp_path, folder)
    flags[0] = command
    assert main([*flags, "--overwrite", "true"]) == 2
    assert f"--output {folder}: checkpoints of fit" in one_error(capsys)
    assert tree(folder) == before


def test_validate_asks_for_a_checkpoint_before_it_clears_anything(base, rows, tmp_path, capsys):
    (tmp_path / "out" / "run").mkdir(parents=True)
    (tmp_path / "out" / "run" / "metrics.csv").write_text("kept")
    flags = fit_flags(base, rows, tmp_path / "out", "--overwrite", "true")
    flags[0] = "validate"
    assert main(flags) == 2
    assert "needs --ckpt_path" in one_error(capsys)
    assert (tmp_path / "out" / "run" / "metrics.csv").read_text() == "kept"


@pytest.mark.processes
def test_processes_without_an_output_share_one(base, adapters, rows, tmp_path):
    flags = fisher_flags(base, adapters, rows, "null", hardware="ddp_sim.yaml")
    names = {"--config": "configs", "--trainer": "trainers"}
    for i, (key, value) in enumerate(pairwise(flags)):
        if key in names and (ROOT / names[key] / value).is_file():
            flags[i + 1] = str(ROOT / names[key] / value)
    found = in_process(flags, tmp_path)
    said = found.communicate(timeout=240)[1]
    assert found.returncode == 0, said
    assert len(list((tmp_path / "logs" / "fisher").iterdir())) == 1


def in_process(flags, folder):
    """A command in an interpreter and a working directory of its own."""
    environment = clean_environment() | {"PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-m", "src", *flags], cwd=folder, env=environment, **pipes)


@pytest.mark.parametrize(
    "launched",
    [
        {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
        {"SLURM_NTASKS": "2", "SLURM_JOB_NAME": "fisher", "SLURM_PROCID": "0"},
    ],
)
def test_processes_of_another_launcher_are_given_an_output(
    base, adapters, rows, tmp_path, monkeypatch, capsys, launched
):
    for key, value in launched.items():
        monkeypatch.setenv(key, value)
    assert main(fisher_flags(base, adapters, rows, "null")) == 2
    assert "--output: name a directory" in one_error(capsys)


def test_the_first_setting_that_runs_do_not_share_is_named():
    from src.run_folder import difference

    before = {"model": {"rank": 2, "seed": 0}, "data": {"train": ["a"]}}
    assert difference(before, before | {"data": {"train": ["b"]}}) == "data.train is ['a'] there, ['b'] here"
    assert difference(before, before | {"model": {"rank": 2}}) == "model.seed is 0 there, 'unset' here"
    more = before | {"data": {"train": ["a"], "new": None}}
    assert difference(before, more) == "data.new is 'unset' there, None here"
    assert difference(before, before | {"data": None}) == "data is {'train': ['a']} there, None here"


def test_one_command_after_another_takes_a_time_of_its_own(base, rows, tmp_path, monkeypatch):
    import src.trainer_command as command

    class Later:
        @staticmethod
        def now():
            return command_times.pop(0)

    command_times = [command.datetime(2026, 1, 1), command.datetime(2026, 1, 2)]
    monkeypatch.setattr(command, "datetime", Later)
    configuration = command.Namespace(num_nodes=1)
    assert command._timestamp(configuration) == "2026-01-01T00-00-00"
    assert command._timestamp(configuration) == "2026-01-02T00-00-00"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert command._timestamp(configuration) == "2026-01-02T00-00-00"


@pytest.mark.parametrize("command", ["fit", "fisher", "test"])
def test_a_second_run_leaves_the_output_of_the_first(base, adapters, rows, tmp_path, capsys, command):
    folder = tmp_path / "out"
    parts = folder / ".parts" / ".safety.safetensors.x.tmp"
    parts.parent.mkdir(parents=True)
    parts.write_text("being written")
    (folder / "run").mkdir()
    (folder / "run" / "metrics.csv").write_text("being written")
    before = tree(folder)
    flags = {"fit": fit_flags(base, rows, folder), "fisher": fisher_flags(base, adapters, rows, folder)}
    again = flags.get(command) or test_flags(base, rows, tmp_path, folder)
    with held_output(folder):
        assert main([*again, "--overwrite", "true"]) == 2
    assert f"--output {folder}: another run writes to it" in one_error(capsys)
    assert tree(folder) == before


def test_a_held_output_is_free_once_its_run_is_dead(base, rows, tmp_path, capsys):
    folder = tmp_path / "out"
    first = in_process(fit_flags(base, rows, folder, "--trainer.callbacks+", "tests.test_outputs.Hold"), ROOT)
    try:
        assert first.stdout.readline() == "begun\n", first.stderr.read()
        assert main(fit_flags(base, rows, folder)) == 2
        assert "another run writes to it" in one_error(capsys)
        assert (folder / "run" / "config.yaml").is_file()
    finally:
        first.kill()
        first.communicate()
    assert main(fit_flags(base, rows, folder)) == 0
    assert sorted(entry.name for entry in folder.iterdir() if entry.name.startswith(".")) == []
    with held_output(folder):  # a finished command holds nothing in this process either
        pass


def test_an_output_is_held_by_one(tmp_path):
    with (
        held_output(tmp_path / "out"),
        pytest.raises(InputError, match="another run writes to it"),
        held_output(tmp_path / "out"),
    ):
        pass
    with held_output(tmp_path / "out"):
        assert list((tmp_path / "out").iterdir()) == []


def test_an_output_on_a_disk_without_locks_is_written(tmp_path, monkeypatch):
    def refuse(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with held_output(tmp_path / "out"):
        assert (tmp_path / "out").is_dir()


def test_a_training_that_diverged_is_one_line_and_writes_no_adapter(base, rows, tmp_path, capsys):
    folder = tmp_path / "expert"
    assert main(fit_flags(base, rows, folder)) == 0
    before = read_adapter(folder).sha256
    ruin = ["--model.optimizer.lr", "1e300", "--model.schedule", "constant", "--model.warmup", "0"]
    capsys.readouterr()
    assert main(fit_flags(base, rows, folder, *ruin, "--overwrite", "true")) == 2
    assert "training diverged" in one_error(capsys)
    assert read_adapter(folder).sha256 == before
    assert main(fit_flags(base, rows, tmp_path / "new", *ruin)) == 2
    assert not (tmp_path / "new" / "adapter_config.json").exists()
    assert not (tmp_path / "new" / "manifest.json").exists()


@pytest.mark.parametrize(
    "length", [["--trainer.max_epochs", "-1"], ["--trainer.max_epochs", "null", "--trainer.max_time", "00:00:01:00"]]
)
def test_a_training_without_a_number_of_steps_is_one_line(base, rows, tmp_path, capsys, length):
    assert main(fit_flags(base, rows, tmp_path / "out", *length)) == 2
    assert "neither max_epochs nor max_steps" in one_error(capsys)
    assert not (tmp_path / "out").exists()


def test_a_validation_after_every_0_batches_is_one_line(base, rows, tmp_path, capsys):
    assert main(fit_flags(base, rows, tmp_path / "out", "--trainer.val_check_interval", "0")) == 2
    assert "trainer.val_check_interval is 0; expected at least 1 batch (limit_val_batches 0" in one_error(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("callback", "said"),
    [
        ("EarlyStopping", "trainer.callbacks: Early stopping conditioned on metric `vall_loss` which is not available"),
        ("ModelCheckpoint", "trainer: `ModelCheckpoint(monitor='vall_loss')` could not find the monitored key"),
    ],
)
def test_a_callback_that_watches_what_is_not_logged_is_one_line(base, rows, tmp_path, capsys, callback, said):
    watched = [f"--trainer.callbacks+={callback}", "--trainer.callbacks.monitor", "vall_loss"]
    assert main(fit_flags(base, rows, tmp_path / "out", *watched)) == 2
    assert said in one_error(capsys)
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_callbacks_that_average_weights_are_one_line(base, rows, tmp_path, capsys):
    assert main(fit_flags(base, rows, tmp_path / "out", "--trainer.callbacks+=EMAWeightAveraging")) == 2
    assert "trainer.callbacks: EMAWeightAveraging copies the base model" in one_error(capsys)


def with_the_experts_config(flags):
    return [flags[0], "--config", "expert.yaml", *flags[1:]]


def test_a_list_of_callbacks_without_a_choice_of_checkpoint_is_said(base, rows, tmp_path, capsys):
    hardware = tmp_path / "callbacks.yaml"
    hardware.write_text("callbacks: [{class_path: LearningRateMonitor}]\n")
    assert main(with_the_experts_config(fit_flags(base, rows, tmp_path / "a"))) == 0
    assert "no callback chooses" not in capsys.readouterr().err
    replaced = fit_flags(base, rows, tmp_path / "b", "--trainer", str(hardware))
    assert main(with_the_experts_config(replaced)) == 0
    assert "no callback chooses a checkpoint by val_loss" in capsys.readouterr().err


def test_a_training_that_ends_before_its_steps_is_said(base, rows, tmp_path, capsys):
    assert main(fit_flags(base, rows, tmp_path / "a")) == 0
    assert "the training ended after" not in capsys.readouterr().err
    assert main(fit_flags(base, rows, tmp_path / "b", "--trainer.max_time", "00:00:00:00")) == 0
    assert "the training ended after 0 of 15 steps" in capsys.readouterr().err
    assert main(fit_flags(base, rows, tmp_path / "c", "--trainer.fast_dev_run", "true")) == 0
    assert "fast_dev_run: trained on one batch" in capsys.readouterr().err


def test_names_of_layers_may_stand_in_a_text(base, rows, tmp_path):
    assert main(fit_flags(base, rows, tmp_path / "out", "--model.lora.targets", "q_proj,v_proj")) == 0
    assert {name.rsplit(".", 1)[1] for name in read_adapter(tmp_path / "out").pairs} == {"q_proj", "v_proj"}


def test_the_manifest_says_of_which_step_the_weights_are(base, rows, tmp_path):
    ruin = ["--model.optimizer.lr", "0.1", "--model.schedule", "constant", "--trainer.max_epochs", "3"]
    assert main(with_the_experts_config(fit_flags(base, rows, tmp_path / "out", *ruin))) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    (best,) = (tmp_path / "out" / "run" / "checkpoints").glob("epoch*.ckpt")
    assert f"step={manifest['step']}.ckpt" in best.name
    assert manifest["step"] <= manifest["steps"]


def test_a_number_of_steps_is_enough(base, rows, tmp_path):
    steps = ["--trainer.max_epochs", "-1", "--trainer.max_steps", "10"]
    assert main(fit_flags(base, rows, tmp_path / "out", *steps)) == 0
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["steps"] == 10
    assert yaml.safe_load((tmp_path / "out" / "run" / "config.yaml").read_text())["trainer"]["max_steps"] == 10


def test_an_output_is_made_where_a_link_leads(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "there" / "out")
    with held_output(tmp_path / "link"), pytest.raises(InputError, match="another run"), held_output(tmp_path / "link"):
        pass
    assert (tmp_path / "there" / "out").is_dir()


def test_sigterm_while_an_adapter_is_written_is_one_line(base, rows, tmp_path, monkeypatch, capsys):
    def killed(*_arguments, **_options):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("src.training.write_provenance", killed)
    before = signal.getsignal(signal.SIGTERM)
    assert main(fit_flags(base, rows, tmp_path / "out")) == 2
    assert "error: interrupted" in one_error(capsys)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("hook", ["on_test_epoch_end", "on_predict_epoch_end"])
def test_sigterm_while_answers_are_graded_is_no_loops(hook):
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # as Lightning's, which waits for the end of a batch
    try:
        getattr(StopAtSigterm(), hook)(SimpleNamespace(received_sigterm=False), None)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(SIGTERMException):
            getattr(StopAtSigterm(), hook)(SimpleNamespace(received_sigterm=True), None)
    finally:
        signal.signal(signal.SIGTERM, before)
