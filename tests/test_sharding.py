"""Strategies of several processes: how long they wait for one another, what a checkpoint gathers, how they end."""

import os
import selectors
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from jsonargparse import Namespace
from lightning import Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import DDPStrategy

from src import processes
from src.models.sharding import PATIENCE, DataParallelStrategy, FullyShardedStrategy, make_patient
from src.trainer_command import TrainerCommand

ROOT = Path(__file__).resolve().parents[1]


def test_lightnings_own_ddp_waits_as_long_as_ours_unless_it_was_told_how_long():
    plain, told = DDPStrategy(), DDPStrategy(timeout=timedelta(minutes=5))
    for strategy in (plain, told):
        make_patient(strategy)
    assert plain._timeout == DataParallelStrategy()._timeout == PATIENCE
    assert told._timeout == timedelta(minutes=5)


def test_a_run_on_several_devices_is_patient_and_tells_the_others_of_their_first_process(monkeypatch, tmp_path):
    for name in (processes.FIRST, processes.PROCESSES):
        monkeypatch.setenv(name, "")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    made = Trainer(accelerator="cpu", devices=2, logger=False, enable_checkpointing=False)
    monkeypatch.setattr(LightningCLI, "instantiate_trainer", lambda _self, **_: made)
    command = TrainerCommand.__new__(TrainerCommand)
    command.command, command.output = "test", tmp_path
    command.config = Namespace(trainer=Namespace(logger=False))
    assert command.instantiate_trainer().strategy._timeout == PATIENCE
    assert os.environ[processes.FIRST] == str(os.getpid())
    assert os.environ[processes.PROCESSES] == "2"


@pytest.mark.parametrize(
    ("environment", "ends"),
    [
        ({"LOCAL_RANK": "1", processes.FIRST: "12"}, True),
        ({"LOCAL_RANK": "0", processes.FIRST: "12"}, False),
        ({"LOCAL_RANK": "1"}, False),
        ({}, False),
    ],
)
def test_processes_that_lightning_started_end_with_the_first_and_others_do_not(monkeypatch, environment, ends):
    asked = []
    monkeypatch.setattr(processes, "end_with_parent", asked.append)
    monkeypatch.setattr(os, "environ", environment)
    processes.end_with_first()
    assert asked == ([processes.FIRST] if ends else [])


@pytest.mark.skipif(sys.platform != "linux", reason="the death signal is Linux's")
def test_a_process_whose_first_one_has_failed_is_killed(tmp_path):
    """The first one ends while the other waits for it, as in a collective of NCCL."""
    second = "import time; from src.processes import end_with_first as e; e(); print(1, flush=True); time.sleep(600)"
    first = "import os, subprocess, sys; from src.processes import tell_of_first as t; t(2); "
    first += f"other = subprocess.Popen([sys.executable, '-c', {second!r}], env=os.environ | {{'LOCAL_RANK': '1'}}, "
    first += "stdout=subprocess.PIPE); other.stdout.readline(); print(other.pid, flush=True); sys.stdin.readline()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", first], cwd=ROOT, **pipes) as process:
        other = os.pidfd_open(int(process.stdout.readline()))
    try:
        with selectors.DefaultSelector() as waiting:
            waiting.register(other, selectors.EVENT_READ)
            assert waiting.select(timeout=60)
    finally:
        os.close(other)


def test_a_checkpoint_of_sharded_weights_gathers_none_that_are_frozen():
    module = torch.nn.Sequential(*(torch.nn.Linear(3, 3, bias=False) for _ in range(3)))
    module[0].requires_grad_(False)
    module[2].weight = module[0].weight  # as output layers are tied to embeddings
    strategy = FullyShardedStrategy()
    strategy.model = module
    found = strategy.lightning_module_state_dict()
    assert list(found) == ["1.weight"]
    assert torch.equal(found["1.weight"], module[1].weight)
