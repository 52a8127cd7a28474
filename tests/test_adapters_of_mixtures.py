"""Adapters of mixtures of experts with one pair an expert, which PEFT stacks where transformers holds them in one."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from src.adapters.pairs import LowRankPair
from src.adapters.peft_files import read_adapter, write_adapter
from src.merge.combinations.task_arithmetic import TaskArithmetic
from src.merge.stage import merge

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 1, "num_experts_per_tok": 2, "head_dim": 8, "tie_word_embeddings": False}
IDS = torch.arange(12).reshape(2, 6)


@pytest.fixture(params=["mixtral", "qwen3_moe"])
def base(request, tmp_path):
    torch.manual_seed(0)
    if request.param == "mixtral":
        model = MixtralForCausalLM(MixtralConfig(num_local_experts=3, **SIZES))
    else:
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(num_experts=3, moe_intermediate_size=24, **SIZES))
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def pairs_of(base, rank, what, seed):
    """A pair for every stored weight whose name holds one of some words."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, weight in sorted(load_file(base / "model.safetensors").items()):
        if weight.ndim == 2 and any(word in name for word in what):
            rows, columns = weight.shape
            a, b = (0.2 * torch.randn(s, generator=generator) for s in ((rank, columns), (rows, rank)))
            found[name.removesuffix(".weight")] = LowRankPair(a.double(), b.double())
    return found


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.filterwarnings("ignore:The following")  # patterns of PEFT's own for what it stacks
def test_a_merge_of_experts_of_other_ranks_than_attention_loads_in_peft(base, tmp_path):
    adapters = {"utility": pairs_of(base, 5, ["self_attn.q_proj"], 1), "safety": pairs_of(base, 2, [".experts."], 2)}
    assert adapters["safety"]
    for name, pairs in adapters.items():
        write_adapter(tmp_path / name, pairs, base=str(base), manifest={}, seen=frozenset(), card="c")
    paths = {name: str(tmp_path / name) for name in adapters}
    merge(**paths, method=TaskArithmetic(), alpha=0.5, output=str(tmp_path / "merged"))
    plain = AutoModelForCausalLM.from_pretrained(base)
    before = logits(plain)
    found = logits(PeftModel.from_pretrained(plain, str(tmp_path / "merged")))
    weights = load_file(base / "model.safetensors")
    for strength, pairs in zip((1.0, 0.5), adapters.values(), strict=True):
        for name, pair in pairs.items():
            weights[f"{name}.weight"] = weights[f"{name}.weight"] + (strength * pair.b @ pair.a).float()
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    wanted = logits(AutoModelForCausalLM.from_pretrained(base))
    assert (wanted - before).abs().max() > 0.01
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_factors_that_were_filled_up_are_the_same_updates(base, tmp_path):
    pairs = pairs_of(base, 5, ["self_attn.q_proj"], 1) | pairs_of(base, 2, [".experts."], 2)
    write_adapter(tmp_path / "a", pairs, base=str(base), manifest={}, seen=frozenset(), card="c")
    read = read_adapter(tmp_path / "a").pairs
    assert {pair.rank for pair in read.values()} == {5}
    for name, pair in pairs.items():
        torch.testing.assert_close(read[name].dense(), pair.dense(), rtol=1e-6, atol=1e-7, check_dtype=False)
