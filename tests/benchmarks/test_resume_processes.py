"""A training of two processes that ends early and goes on: three runs of two processes, too long for `make test`."""

import pytest

from tests.commands import run_processes
from tests.test_fit_resume import check_equal, flags


@pytest.mark.processes
def test_two_processes_go_on_within_their_epoch(base, rows, tmp_path):
    """Three batches in each; the last of the second process is a repeated one."""
    more = ["--trainer.accumulate_grad_batches", "2"]
    hardware = {"hardware": "ddp_sim.yaml"}
    run_processes(flags(base, rows, tmp_path / "whole", *more, **hardware))
    run_processes(flags(base, rows, tmp_path / "parts", *more, stop=4, every=0.0, **hardware), code=2)
    run_processes(flags(base, rows, tmp_path / "parts", *more, "--resume", "true", **hardware))
    check_equal(tmp_path / "whole", tmp_path / "parts", 3, ranks=(0, 1))
