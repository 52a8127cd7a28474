"""Every command on a base in another number format than float32, and under the Trainer's own precisions."""

import json

import pytest

from src.adapters.peft_files import read_adapter
from src.cli import main
from src.fisher.files import load_fisher
from tests.commands import fisher_flags, fit_flags
from tests.test_pipeline import losses, test_flags

FORMATS = [("bfloat16", "32-true"), ("float16", "32-true"), ("float32", "bf16-mixed"), ("bfloat16", "bf16-true")]
"""Of the base and of the Trainer; the first is that of a large base on ``gpu.yaml`` and ``ddp.yaml``."""


@pytest.mark.parametrize(("dtype", "precision"), FORMATS)
def test_an_expert_is_trained_and_evaluated(base, rows, tmp_path, dtype, precision):
    formats = ["--model.base.dtype", dtype, "--trainer.precision", precision]
    assert main(fit_flags(base, rows, tmp_path / "expert", *formats)) == 0
    found = losses(tmp_path / "expert")
    assert found[-1] < found[0] - 0.02
    assert all(pair.squared_norm() > 0 for pair in read_adapter(tmp_path / "expert").pairs.values())
    flags = test_flags(base, rows, tmp_path, tmp_path / "out", "--model.adapters", str(tmp_path / "expert"), *formats)
    assert main(flags) == 0
    plain, tuned = json.loads((tmp_path / "out" / "metrics.json").read_text())["models"]
    assert tuned["suites"]["task"]["perplexity"]["value"] < plain["suites"]["task"]["perplexity"]["value"]


@pytest.mark.parametrize(("dtype", "precision"), FORMATS)
def test_fisher_information_is_near_that_of_float32(base, adapters, rows, tmp_path, dtype, precision):
    traces = []
    for name, formats in (("exact", ["float32", "32-true"]), ("narrow", [dtype, precision])):
        flags = ["--model.base.dtype", formats[0], "--trainer.precision", formats[1], "--model.labels", "data"]
        assert main(fisher_flags(base, adapters, rows, tmp_path / name, *flags)) == 0
        traces.append(load_fisher(tmp_path / name / "utility.safetensors").fisher.trace())
    assert traces[1] == pytest.approx(traces[0], rel=0.05)
    assert traces[1] != traces[0]
