"""Gradient checkpointing by option: the same numbers, with each layer computed twice."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from src.adapters.peft_files import read_adapter
from src.cli import main
from src.errors import InputError
from src.fisher.files import load_fisher
from src.models.checkpointing import checkpoint_layers
from src.models.checkpoints import ADAPTER, check_adapter
from tests.commands import fisher_flags, fit_flags

CHECKPOINT = ["--model.gradient_checkpointing", "true"]


@pytest.fixture
def forwards(monkeypatch):
    """Counts forward passes of the MLP blocks."""
    count = [0]
    original = LlamaMLP.forward

    def counted(self, x):
        count[0] += 1
        return original(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", counted)
    return count


def test_a_pass_gives_the_same_scores(base, adapters, rows, tmp_path, forwards):
    computed = []
    for name, more in (("plain", []), ("again", CHECKPOINT)):
        forwards[0] = 0
        assert main(fisher_flags(base, adapters, rows, tmp_path / name, *more)) == 0
        computed.append(forwards[0])
    assert computed[1] == 2 * computed[0] > 0
    for name in ("safety", "utility"):
        one, two = (load_fisher(tmp_path / folder / f"{name}.safetensors").fisher for folder in ("plain", "again"))
        torch.testing.assert_close(one.scores, two.scores)


def test_training_gives_the_same_adapter(base, rows, tmp_path, forwards):
    computed = []
    for name, more in (("plain", []), ("again", CHECKPOINT)):
        forwards[0] = 0
        assert main([*fit_flags(base, rows, tmp_path / name), *more]) == 0
        computed.append(forwards[0])
    assert computed[1] > 1.3 * computed[0]
    one, two = (read_adapter(tmp_path / name).pairs for name in ("plain", "again"))
    for module, pair in one.items():
        torch.testing.assert_close(two[module].dense(), pair.dense(), rtol=1e-4, atol=1e-6)


def test_a_checkpoint_that_does_not_tell_is_judged_by_its_weights():
    """An earlier version kept no scaling, and a quantised base has no fingerprint."""
    weight = "model.layer.lora_A.default.weight"
    facts = {weight: [2, 3], "lora_alpha": 8, "use_rslora": False, "core": None, "fingerprint of the base": "a"}
    check_adapter("a.ckpt", {"state_dict": {weight: torch.zeros(2, 3)}}, facts)
    check_adapter("a.ckpt", {ADAPTER: facts | {"fingerprint of the base": ""}}, facts)
    check_adapter("a.ckpt", {}, facts)  # a sharded one
    with pytest.raises(InputError, match=r"weight is \[4, 3\] there, \[2, 3\] in the model"):
        check_adapter("a.ckpt", {"state_dict": {weight: torch.zeros(4, 3)}}, facts)
    with pytest.raises(InputError, match=r"a.ckpt: use_rslora is True there, False in the model"):
        check_adapter("a.ckpt", {ADAPTER: facts | {"use_rslora": True}}, facts)


def test_a_model_that_cannot_is_named():
    model = LlamaForCausalLM(LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9))
    model.supports_gradient_checkpointing = False
    with pytest.raises(InputError, match="LlamaForCausalLM does not support it"):
        checkpoint_layers(model)
