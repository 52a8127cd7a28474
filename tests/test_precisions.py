"""Every command on a base in another number format than float32, and under the Trainer's own precisions."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

from src.adapters.peft_files import read_adapter
from src.cli import main
from src.data.batches import Batch
from src.fisher.files import load_fisher
from src.models.logits import can_pack
from tests.commands import ROOT, fisher_flags, fit_flags, run_processes
from tests.test_pipeline import losses, test_flags
from tests.tiny import make_model

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


def test_rotary_frequencies_are_those_of_float32_in_any_format(base, rows, tmp_path):
    from src.models.evaluation import EvaluationModule
    from src.models.expert import ExpertModule
    from src.models.fisher import FisherModule
    from src.models.kept_buffers import KeptBuffers

    assert all(issubclass(one, KeptBuffers) for one in (EvaluationModule, ExpertModule, FisherModule))
    module = KeptBuffers()
    module.model = make_model(dtype=torch.float32)
    module.model.register_buffer("table", torch.randn(3), persistent=False)
    before = module.model.model.rotary_emb.inv_freq.clone()
    module.to(dtype=torch.bfloat16)
    assert module.model.lm_head.weight.dtype == module.model.table.dtype == torch.bfloat16
    assert torch.equal(module.model.model.rotary_emb.inv_freq, before)
    module.to("meta")
    assert module.model.model.rotary_emb.inv_freq.device.type == "meta"
    assert KeptBuffers().to(torch.float64) is not None
    module = KeptBuffers()
    module.model = make_model(dtype=torch.float32)
    assert module.double().model.model.rotary_emb.inv_freq.dtype == torch.float64


@pytest.mark.processes
def test_sharded_training_of_a_narrow_base_keeps_its_adapter_in_float32(base, rows, tmp_path):
    """Files for GPUs leave the format to the base: an adapter in bfloat16 would lose its small steps."""
    files = {path.name: yaml.safe_load(path.read_text()) for path in (ROOT / "trainers").glob("*.yaml")}
    assert {name for name, one in files.items() if one["precision"] != "32-true"} == set()
    narrow = ["--model.base.dtype", "bfloat16"]
    assert main(fit_flags(base, rows, tmp_path / "one", *narrow, "--data.batch_size", "4")) == 0
    shared = ["--data.batch_size", "4", "--data.shared_batch", "true"]
    run_processes(fit_flags(base, rows, tmp_path / "two", *narrow, *shared, hardware="fsdp_sim.yaml"))
    written = load_file(tmp_path / "two" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.float32}
    # bfloat16 holds 8 bits: an adapter that was trained in it would be all rounded numbers.
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in written.values())
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == len(two)
    assert two[-1] == pytest.approx(one[-1], rel=0.02)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_a_core_alone_is_trained_in_a_narrow_format(base, adapters, rows, tmp_path, precision):
    formats = ["--model.base.dtype", "float32", "--trainer.precision", precision]
    flags = fit_flags(base, rows, tmp_path / "core", "--model.core", str(adapters["safety"]), *formats)
    assert main(flags) == 0
    found = losses(tmp_path / "core")
    assert found[-1] < found[0]


def test_a_trial_of_packing_knows_that_products_are_narrow(base):
    model = make_model(dtype=torch.float32)
    row = torch.arange(16)
    batch = Batch(torch.arange(2), torch.stack([row, row + (row > 12)]), torch.tensor([16, 16]), torch.tensor([14, 14]))
    with torch.autocast("cpu", torch.bfloat16):
        assert can_pack(model, batch)
