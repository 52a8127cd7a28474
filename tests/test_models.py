import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from src.adapters.attach import attached, check_fits
from src.adapters.pairs import LowRankPair
from src.data.batches import Batch, EncodedRows
from src.data.chat import Encoder
from src.data.rows import Row
from src.errors import InputError
from src.models import packing
from src.models.base import BaseSpec, fingerprint, load_model, load_tokenizer
from src.models.fused_lora import fuse
from src.models.generation import greedy, left_padded_prompts
from src.models.kv_cache import ReservedLayer, reserve
from src.models.logits import answer_logits, answer_loss, answer_nll, answer_rows, answer_targets, can_pack
from src.models.products import fast_products
from src.models.speed import _best, _fastest_round, choose_matmul
from tests.tiny import make_model, random_pairs

PROMPTS = ["hi", "a longer prompt than that", "how?", "mid length one"]
ANSWERS = ["yes", "no, and here is why", "x", "well"]


@pytest.fixture
def batch(tokenizer):
    encoder = Encoder(tokenizer, max_length=256)
    rows = [encoder.encode(Row(str(i), p, a)) for i, (p, a) in enumerate(zip(PROMPTS, ANSWERS, strict=True))]
    return EncodedRows(rows, tokenizer.pad_token_id)[([0, 1, 2, 3], 1.0)]


def unpadded_logits(model, batch):
    parts = []
    for row in range(len(batch.index)):
        length, start = int(batch.lengths[row]), int(batch.answer_starts[row])
        parts.append(model(input_ids=batch.ids[row : row + 1, :length]).logits[0, start - 1 : length - 1])
    return torch.cat(parts)


@pytest.mark.parametrize("pack", [False, True])
def test_answer_logits_equal_those_of_single_rows(model, batch, pack):
    assert batch.common_prefix > 8
    torch.testing.assert_close(answer_logits(model, batch, pack=pack), unpadded_logits(model, batch))


def test_packing_is_recognised_as_exact(model, batch):
    assert can_pack(model, batch)


def test_dropout_of_the_adapter_does_not_keep_from_packing(model, batch):
    """As in a training that goes on: B is no longer zero. Dropout within attention does."""
    config = LoraConfig(r=3, target_modules="all-linear", lora_dropout=0.5, init_lora_weights=False)
    peft = get_peft_model(model, config).double().train()
    assert can_pack(peft, batch)
    assert all(module.training for module in peft.modules())
    for layer in peft.get_base_model().model.layers:
        layer.self_attn.attention_dropout = 0.1
    assert not can_pack(peft, batch)
    assert all(module.training for module in peft.modules())


@pytest.mark.parametrize("ignored", ["packed", "position_ids"])
def test_packing_is_not_used_where_the_model_ignores_its_inputs(model, batch, ignored):
    original = model.forward
    model.forward = lambda **given: original(**{k: v for k, v in given.items() if k != ignored})
    assert not can_pack(model, batch)


def test_packed_rows_are_padded_to_rows_of_like_length_only(model):
    lengths = torch.tensor([5, 40, 6, 38, 1, 39, 5])  # behind a prefix of ten tokens
    ids = torch.randint(1, 250, (7, 50), generator=torch.Generator().manual_seed(0))
    ids[:, :10] = ids[0, :10]
    whole = Batch(torch.arange(7), ids, lengths + 10, lengths + 9, 1.0)
    assert whole.common_prefix == 9
    given, _ = packing.pack(whole)
    groups = given["packed"].groups
    assert [(group.rows, len(group.mask)) for group in groups] == [(3, 41), (3, 7), (1, 2)]
    assert sum(group.rows * len(group.mask) for group in groups) < 1.05 * len(given["packed"].tokens)
    torch.testing.assert_close(answer_logits(model, whole, pack=True), unpadded_logits(model, whole))


def test_packing_leaves_the_models_own_attention_in_place(model, batch):
    before = model.config._attn_implementation
    answer_logits(model, batch, pack=True)
    assert model.config._attn_implementation == before


def test_packed_gradients_equal_padded_ones(model, batch):
    grads = []
    for pack in (False, True):
        weight = model.model.layers[0].mlp.up_proj.weight.requires_grad_()
        loss = answer_loss(answer_logits(model, batch, pack=pack), answer_targets(batch))
        grads.append(torch.autograd.grad(loss, weight)[0])
    torch.testing.assert_close(grads[0], grads[1])


def test_answer_loss_and_gradient_equal_cross_entropy(model, batch):
    logits = unpadded_logits(model, batch).detach().requires_grad_()
    expected = cross_entropy(logits, answer_targets(batch))
    (gradient,) = torch.autograd.grad(expected, logits)
    found = answer_loss(logits, answer_targets(batch))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(3 * found, logits)[0], 3 * gradient)


@pytest.mark.parametrize("pack", [False, True])
def test_answer_nll_is_per_row(model, batch, pack):
    nll, tokens = answer_nll(model, batch, pack=pack)
    log_p = unpadded_logits(model, batch).log_softmax(-1)
    each = -log_p.gather(1, answer_targets(batch)[:, None])[:, 0]
    for row in range(4):
        torch.testing.assert_close(nll[row], each[answer_rows(batch) == row].sum())
    assert tokens.tolist() == (batch.lengths - batch.answer_starts).tolist()


@pytest.mark.parametrize("rslora", [False, True])
def test_fused_lora_equals_peft(batch, rslora):
    results = []
    for fused in (False, True):
        torch.manual_seed(3)
        config = LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", use_rslora=rslora, init_lora_weights=False)
        peft = get_peft_model(make_model(), config).double()
        assert fuse(peft) == (14 if fused else 0) if fused else True
        loss = cross_entropy(answer_logits(peft, batch), answer_targets(batch))
        trained = [p for p in peft.parameters() if p.requires_grad]
        results.append([loss, *torch.autograd.grad(loss, trained)])
    for plain, quick in zip(*results, strict=True):
        torch.testing.assert_close(plain, quick)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_fused_lora_keeps_no_wide_copy_of_what_a_narrow_base_gives(dtype):
    """On a base in 16 bits the numbers are PEFT's, whose update is float32; kept for the backward pass is the input."""
    results, kept = [], []
    for fused in (False, True):
        torch.manual_seed(3)
        base = torch.nn.Sequential(torch.nn.Linear(64, 48)).to(dtype)
        config = LoraConfig(r=3, lora_alpha=5, target_modules=["0"], init_lora_weights=False)
        peft = get_peft_model(base, config)
        assert fuse(peft) == 1 if fused else True
        x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
        held = {}

        def pack(tensor, held=held):
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = peft(x)
        trained = [p for p in peft.parameters() if p.requires_grad]
        assert {p.dtype for p in trained} == {torch.float32}
        results.append([out, *torch.autograd.grad(out.float().square().sum(), [x, *trained])])
        kept.append(sum(held.values()))
    exact = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 5e-2}
    for plain, quick in zip(*results, strict=True):
        assert plain.dtype == quick.dtype
        torch.testing.assert_close(quick, plain, **exact)
    if dtype != torch.float32:
        assert kept[0] - kept[1] >= 2 * 5 * 64 * (4 - 2)


def test_narrow_products_round_to_bfloat16_and_no_further(batch):
    results = []
    for narrow in (False, True):
        torch.manual_seed(3)
        config = LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", init_lora_weights=False)
        peft = get_peft_model(make_model(dtype=torch.float32), config)
        fuse(peft, narrow=narrow)
        assert can_pack(peft, batch, narrow=narrow)
        loss = cross_entropy(answer_logits(peft, batch, pack=True, narrow=narrow), answer_targets(batch))
        trained = [p for p in peft.parameters() if p.requires_grad]
        results.append(torch.cat([g.flatten() for g in (loss, *torch.autograd.grad(loss, trained))]))
        assert not any(p.dtype == torch.bfloat16 for p in peft.state_dict().values())
    wide, rounded = results
    assert rounded.dtype == torch.float32
    assert 0 < (wide - rounded).norm() / wide.norm() < 0.02


def test_layers_with_dropout_keep_pefts_forward():
    peft = get_peft_model(make_model(), LoraConfig(r=3, target_modules="all-linear", lora_dropout=0.1))
    assert fuse(peft) == 0


def test_greedy_equals_transformers_generate(model, batch, tokenizer):
    stops = [256]
    prompts, mask = left_padded_prompts(batch, 256)
    for adapter in ({}, random_pairs(model, 2, 5)):
        with torch.inference_mode(), attached(model, adapter):
            expected = model.generate(
                prompts, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=stops, pad_token_id=256
            )[:, prompts.shape[1] :].tolist()
            found = greedy(model, batch, max_new_tokens=12, stop_ids=stops, pad_id=256)
        cut = [row[: row.index(256)] if 256 in row else row for row in expected]
        assert found == cut


def test_greedy_of_a_batch_equals_single_rows_when_rows_end_apart(model, batch):
    with torch.inference_mode():
        one = [greedy(model, b, max_new_tokens=15, stop_ids=[], pad_id=256)[0] for b in batch.split(1)]
        # Stop tokens chosen so that rows end at different steps and the batch is compacted.
        stops = [one[0][2], one[1][9]]
        together = greedy(model, batch, max_new_tokens=15, stop_ids=stops, pad_id=256)
        alone = [greedy(model, b, max_new_tokens=15, stop_ids=stops, pad_id=256)[0] for b in batch.split(1)]
    assert len({len(answer) for answer in together}) > 1
    assert together == alone


WINDOWED = {
    "mistral": (MistralConfig, MistralForCausalLM, {}),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM, {"query_pre_attn_scalar": 4}),
}


@pytest.mark.parametrize("window", [16, 400])
@pytest.mark.parametrize("kind", WINDOWED)
def test_greedy_of_a_batch_equals_single_rows_where_attention_has_a_window(batch, kind, window):
    """Prompts with a common beginning, longer than the window and shorter."""
    config, make, more = WINDOWED[kind]
    torch.manual_seed(0)
    sizes = make_model().config.to_dict()
    kept = {
        key: sizes[key] for key in config().to_dict() if key in sizes and key not in ("model_type", "rope_parameters")
    }
    model = make(config(**kept | more | {"sliding_window": window, "tie_word_embeddings": False, "layer_types": None}))
    model = model.double().eval().requires_grad_(False)
    assert batch.common_prefix > 8
    with torch.inference_mode():
        together = greedy(model, batch, max_new_tokens=12, stop_ids=[], pad_id=256)
        alone = [greedy(model, b, max_new_tokens=12, stop_ids=[], pad_id=256)[0] for b in batch.split(1)]
    assert together == alone


def test_a_model_without_a_cache_of_tokens_is_named(batch):
    model = MambaForCausalLM(MambaConfig(vocab_size=258, hidden_size=16, num_hidden_layers=1))
    with pytest.raises(InputError, match="MambaForCausalLM keeps no keys and values"):
        greedy(model, batch, max_new_tokens=2, stop_ids=[256], pad_id=256)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_fused_attention_equals_the_one_with_gradients(dtype):
    draw = torch.Generator().manual_seed(0)
    lengths = torch.tensor([5, 40, 6, 38, 1, 39, 5])
    groups, tokens = packing._groups(lengths, 7)
    assert len(groups) > 1
    layout = packing.PackedLayout(7, groups, tokens, packing._ahead(7, torch.device("cpu")))
    query, key, value = (torch.randn(1, h, 7 + int(lengths.sum()), 8, generator=draw, dtype=dtype) for h in (4, 2, 2))
    plain, _ = packing.attend(None, query, key, value, None, packed=layout, scaling=0.35)
    with torch.no_grad():
        fused, _ = packing.attend(None, query, key, value, None, packed=layout, scaling=0.35)
    torch.testing.assert_close(fused, plain)
    assert packing.FUSED is not None


def test_a_reserved_layer_holds_what_a_growing_one_holds():
    growing, draw = DynamicLayer(), torch.Generator().manual_seed(0)
    growing.update(*torch.randn(2, 3, 2, 5, 4, generator=draw))
    reserved = ReservedLayer(growing, 2)
    room = reserved.keys.data_ptr()
    for kept in (torch.tensor([0, 1, 2]), torch.tensor([2, 0])):
        growing.reorder_cache(kept)
        reserved.reorder_cache(kept)
        new = torch.randn(2, len(kept), 2, 1, 4, generator=draw)
        for found, expected in zip(reserved.update(*new), growing.update(*new), strict=True):
            assert torch.equal(found, expected)
        assert reserved.get_seq_length() == growing.get_seq_length()
    assert reserved.keys.data_ptr() != room
    with pytest.raises(RuntimeError, match="exceeds"):
        reserved.update(*new)


def test_layers_that_forget_keep_their_own_cache():
    cache = DynamicCache()
    cache.layers = [DynamicLayer(), DynamicSlidingWindowLayer(sliding_window=3)]
    for layer in cache.layers:
        layer.update(*torch.randn(2, 1, 1, 5, 4, generator=torch.Generator().manual_seed(0)))
    reserve(cache, 4)
    assert [type(layer) for layer in cache.layers] == [ReservedLayer, DynamicSlidingWindowLayer]


@pytest.mark.parametrize("bias", [False, True])
def test_fast_products_are_the_layers_own_with_updates_added(bias):
    layer = torch.nn.Linear(6, 5, bias=bias)
    x, pair = (
        torch.randn(3, 2, 6, generator=torch.Generator().manual_seed(0)),
        LowRankPair(torch.ones(2, 6), torch.ones(5, 2)),
    )
    model = torch.nn.Sequential(layer)
    with attached(model, {"0": pair}):
        expected = model(x)
        with fast_products(model, "medium"):
            found = model(x)
            assert torch.get_float32_matmul_precision() == "highest"
            assert "forward" in vars(layer)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert found.is_contiguous()
        assert "forward" not in vars(layer)


def test_on_a_gpu_a_mode_holds_for_every_product():
    class OnGpu(torch.nn.Linear):
        def parameters(self, recurse=True):
            return iter([SimpleNamespace(is_cuda=True)])

    with fast_products(OnGpu(2, 2), "high"):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == "highest"


def test_fast_products_leave_other_formats_alone():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4).double(), torch.nn.Linear(4, 4))
    with fast_products(model, "medium"):
        assert ["forward" in vars(layer) for layer in model] == [False, True]
    with fast_products(model, "highest"):
        assert not any("forward" in vars(layer) for layer in model)


def test_attached_equals_merged_weights_and_leaves_no_trace(model, batch):
    before = answer_logits(model, batch)
    pairs = random_pairs(model, 2, 7)
    with attached(model, pairs):
        attached_logits = answer_logits(model, batch)
    other = make_model()
    for name, pair in pairs.items():
        other.get_submodule(name).weight += pair.dense()
    torch.testing.assert_close(attached_logits, answer_logits(other, batch))
    assert torch.equal(answer_logits(model, batch), before)


def test_an_update_for_another_architecture_is_refused(model):
    with pytest.raises(InputError, match="does not have"):
        check_fits(model, {"model.nowhere": LowRankPair(torch.zeros(1, 2), torch.zeros(2, 1))}, "x")
    name = "model.layers.0.mlp.up_proj"
    with pytest.raises(InputError, match=r"up_proj has an update of shape \(2, 2\)"):
        check_fits(model, {name: LowRankPair(torch.zeros(1, 2), torch.zeros(2, 1))}, "x")


def test_base_loads_and_fingerprints_tell_bases_apart(base):
    one = load_model(BaseSpec(name=str(base), dtype="float64"))
    two = load_model(BaseSpec(name=str(base), dtype="float32"))
    assert fingerprint(one) == fingerprint(two) != fingerprint(make_model(seed=1))
    assert load_tokenizer(BaseSpec(name=str(base))).chat_template


@pytest.mark.parametrize("name", ["no/such-dir/at-all", "pkg://no_such_package/x.gguf", "missing.gguf"])
def test_a_missing_base_is_one_error(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match=r"base\.name"):
        load_model(BaseSpec(name=name))


def test_a_broken_gguf_file_is_one_error(tmp_path, monkeypatch):
    monkeypatch.setenv("SST_CACHE", str(tmp_path / "cache"))
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(InputError, match=r"empty\.gguf: not a readable GGUF model"):
        load_model(BaseSpec(name=str(tmp_path / "empty.gguf")))
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_dir() and path.name.startswith("empty")]


def test_a_mode_less_accurate_than_asked_is_not_chosen(model):
    narrow = make_model(dtype=torch.float32)
    assert choose_matmul("auto", narrow, max_error=-1.0, rows=8) == "highest"
    assert choose_matmul("auto", model, max_error=1.0, rows=8) == "highest"
    assert choose_matmul("high", narrow, max_error=0.0) == "high"
    assert choose_matmul("bfloat16", narrow, max_error=0.0) == "bfloat16"
    assert torch.get_float32_matmul_precision() == "highest"
    assert choose_matmul("auto", narrow, max_error=1e-6, rows=8, copies=True) in ("highest", "medium")


def test_on_a_gpu_no_cpu_product_is_measured(monkeypatch):
    monkeypatch.setattr("src.models.speed._measure", None)
    narrow = make_model(dtype=torch.float32)
    assert choose_matmul("auto", narrow, max_error=5e-3, device="cuda") == "high"
    assert choose_matmul("auto", narrow, max_error=1e-5, device="cuda") == "highest"


def test_a_hopeless_mode_is_not_measured_to_the_end(monkeypatch):
    products = []
    monkeypatch.setattr("src.models.speed.linear", lambda x, weight: products.append(weight) or x @ weight.T)
    weights = [torch.randn(4, 4) for _ in range(3)]
    inputs = [torch.randn(2, 4) for _ in weights]
    assert _fastest_round(inputs, weights, limit=0.0) > 0
    assert len(products) == 1
    assert _fastest_round(inputs, weights, limit=float("inf")) < float("inf")
    assert len(products) == 1 + 3 * 3


def test_of_the_admitted_modes_the_fastest_is_chosen():
    results = {"highest": (1.0, 0.0), "medium": (0.9, 4e-7), "bfloat16": (0.5, 3e-3)}
    assert _best(results, 5e-3) == "bfloat16"
    assert _best(results, 1e-5) == "medium"
    assert _best(results | {"bfloat16": (0.8, 3e-3)}, 5e-3) == "medium"
    assert _best(results | {"medium": (0.5, 1e-3)}, 1e-5) == "highest"


def test_where_the_processor_multiplies_bfloat16_no_clock_decides_whether_to_round(monkeypatch):
    narrow = make_model(dtype=torch.float32)
    disturbed = {"highest": (1.0, 0.0), "medium": (0.4, 4e-7), "bfloat16": (0.5, 3e-3)}
    monkeypatch.setattr("src.models.speed._measure", lambda *given: {mode: disturbed[mode] for mode in given[-1]})
    monkeypatch.setattr("src.models.speed._multiplies_bfloat16", lambda: True)
    assert choose_matmul("auto", narrow, max_error=5e-3, copies=True) == "bfloat16"
    assert torch.get_float32_matmul_precision() == "medium"
    assert choose_matmul("auto", narrow, max_error=1e-5, copies=True) == "medium"
    assert choose_matmul("auto", narrow, max_error=5e-3) == "medium"
    monkeypatch.setattr("src.models.speed._multiplies_bfloat16", lambda: False)
    assert choose_matmul("auto", narrow, max_error=5e-3, copies=True) == "medium"
    torch.set_float32_matmul_precision("highest")


def test_an_adapter_of_all_linear_layers_keeps_to_the_decoder():
    from src.models.lora import LoraSpec, add_lora

    model = make_model()
    model.vision_tower = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 16))
    adapted = add_lora(model, LoraSpec(), 0)
    names = {name for name, _ in adapted.named_parameters() if "lora_A" in name}
    assert len(names) == 14
    assert not any("vision_tower" in name for name in names)


class Clipped(torch.nn.Module):
    """A layer of a tower of Gemma 4: it holds a linear layer and is none."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)


def test_a_named_layer_of_a_tower_that_is_no_linear_layer_is_no_target():
    from src.models.lora import LoraSpec, add_lora, beside_the_decoder

    model = make_model()
    model.dropout = torch.nn.Dropout()
    assert beside_the_decoder(model) == []
    model.vision_tower = torch.nn.ModuleDict({"q_proj": Clipped()})
    adapted = add_lora(model, LoraSpec(targets=["q_proj"]), 0)
    names = [name for name, _ in adapted.named_parameters() if "lora_A" in name]
    assert len(names) == 2
    assert not any("vision_tower" in name for name in names)


@pytest.mark.parametrize("error", [-1.0, 0.0, math.nan])
def test_modules_refuse_an_error_of_products_that_none_has(error):
    from src.models.evaluation import EvaluationModule
    from src.models.expert import ExpertModule
    from src.models.lora import LoraSpec

    for make in (partial(ExpertModule, BaseSpec(), LoraSpec()), partial(EvaluationModule, BaseSpec())):
        with pytest.raises(InputError, match=f"model.max_matmul_error is {error}; expected a number above 0"):
            make(max_matmul_error=error)


def test_quantised_weights_are_not_sharded():
    from src.models.sharding import shard

    model = make_model()
    model.is_quantized = True
    with pytest.raises(InputError, match="cannot be sharded"):
        shard(model, object())
