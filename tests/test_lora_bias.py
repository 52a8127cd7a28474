"""LoRA biases (``lora_bias``): read, merged, measured, applied and written as PEFT does."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from src.adapters.attach import attached
from src.adapters.base_weights import WEIGHTS, open_base
from src.adapters.basis import CoreBasis, core_basis
from src.adapters.constant_input import split, with_bias, without_bias
from src.adapters.convert import trained
from src.adapters.deltas import DenseDelta
from src.adapters.pairs import LowRankPair, weighted_sum
from src.adapters.peft_config import Layout
from src.adapters.peft_files import read_adapter, write_adapter
from src.adapters.read_together import in_common_terms, read_adapters
from src.cli import main, start_logging
from src.errors import InputError
from src.fisher.files import load_fisher
from src.fisher.lowrank_accumulator import LowRankAccumulator
from src.merge.closest_safe_update import ClosestSafeUpdate
from src.merge.combinations.dare import Dare
from src.merge.combinations.fisher_average import FisherAverage
from src.merge.combinations.knots import Knots
from src.merge.combinations.regmean import RegMean
from src.merge.combinations.ties import Ties
from src.merge.led import Led
from src.merge.resta import Resta
from src.merge.safe_lora import SafeLora
from src.merge.sst_diagonal import SstDiagonal
from src.merge.stage import merge
from tests.commands import fisher_flags, fit_flags
from tests.fisher_pass import make_batch, run_pass, uneven_rows
from tests.tiny import make_model

IDS = torch.arange(12)[None]
pytestmark = pytest.mark.filterwarnings("ignore:.*lora_bias.*:UserWarning")


def train_peft(folder, model, seed, *, biased=True, **options):
    """A PEFT adapter with random weights, and the model that has it."""
    torch.manual_seed(seed)
    plain = {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    peft = get_peft_model(model, LoraConfig(**plain | {"lora_bias": biased} | options))
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    peft.save_pretrained(folder)
    return peft.eval()


def logits_of(model, folder):
    return PeftModel.from_pretrained(model, str(folder)).to(torch.float64).eval()(IDS).logits


@pytest.fixture(scope="module")
def pair_of(base, tmp_path_factory):
    """A biased and a plain adapter of the tiny base."""
    root = tmp_path_factory.mktemp("biased")
    for name, seed, biased in (("biased", 1, True), ("plain", 2, False)):
        train_peft(root / name, make_model(), seed, biased=biased)
        config = json.loads((root / name / "adapter_config.json").read_text())
        (root / name / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    return {"biased": root / "biased", "plain": root / "plain"}


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 7}}])
def test_an_adapter_acts_as_in_peft(tmp_path, options):
    peft = train_peft(tmp_path, make_model(), 3, **options).double()
    adapter = read_adapter(tmp_path)
    assert adapter.layout.constant == set(adapter.pairs)
    model = make_model()
    with attached(model, adapter.pairs):
        torch.testing.assert_close(model(IDS).logits, peft(IDS).logits, rtol=1e-6, atol=1e-6)
    assert (model(IDS).logits - peft(IDS).logits).abs().max() > 1e-2


def test_conv1d_layers_too(tmp_path):
    config = GPT2Config(vocab_size=40, n_embd=12, n_layer=1, n_head=2, n_positions=32)
    model = GPT2LMHeadModel(config).double().eval()
    plain = model(IDS).logits
    peft = train_peft(tmp_path, model, 4, target_modules=["c_attn"], fan_in_fan_out=True).double()
    expected = peft(IDS).logits
    model = peft.unload()
    torch.testing.assert_close(model(IDS).logits, plain)
    with attached(model, read_adapter(tmp_path).pairs):
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-6, atol=1e-6)


def test_split_undoes_with_bias():
    draw = torch.Generator().manual_seed(0)
    a, b, bias = (torch.randn(*s, generator=draw, dtype=torch.float64) for s in ((3, 7), (5, 3), (5,)))
    pair, found = split(with_bias(LowRankPair(a, b), bias))
    assert torch.equal(pair.a, a)
    assert torch.equal(pair.b, b)
    torch.testing.assert_close(found, bias)
    alone, found = split(with_bias(LowRankPair(a * 0, b), bias))
    assert alone.rank == 1
    assert not alone.dense().any()
    torch.testing.assert_close(found, bias)
    padded = without_bias(DenseDelta(b @ a))
    assert torch.equal(padded.dense(), without_bias(LowRankPair(a, b)).dense())
    assert not padded.dense()[:, -1].any()


def test_modules_without_a_bias_are_warned_of(tmp_path, capfd):
    pairs = {"x": LowRankPair(torch.ones(1, 4), torch.ones(2, 1)), "y": LowRankPair(torch.ones(1, 3), torch.ones(2, 1))}
    start_logging()
    for constant, warned in (({"x", "y"}, False), ({"x"}, True)):
        folder = tmp_path / "-".join(sorted(constant))
        layout = Layout(constant=frozenset(constant))
        write_adapter(folder, pairs, base="x/y", manifest={}, seen=frozenset(), card="c", layout=layout)
        assert ("(no bias in y)" in capfd.readouterr().err) == warned


def test_task_arithmetic_adds_biases_as_peft_would(pair_of, tmp_path):
    out = tmp_path / "out"
    flags = ["--utility", str(pair_of["plain"]), "--safety", str(pair_of["biased"]), "--alpha", "0.5"]
    assert main(["merge", *flags, "--method", "TaskArithmetic", "--output", str(out)]) == 0
    plain, biased = read_adapters([pair_of["plain"], pair_of["biased"]])
    model = make_model()
    with attached(model, weighted_sum([plain.pairs, biased.pairs], [1.0, 0.5])):
        expected = model(IDS).logits
    torch.testing.assert_close(logits_of(make_model(), out), expected, rtol=1e-5, atol=1e-5)
    manifest = json.loads((out / "manifest.json").read_text())
    assert set(manifest["output"]["ranks"].values()) == {4}
    # The biased part alone, from PEFT: half of every bias at the layers' outputs.
    tensors, written = (load_file(folder / "adapter_model.safetensors") for folder in (pair_of["biased"], out))
    for key, bias in tensors.items():
        if key.endswith("lora_B.bias"):
            torch.testing.assert_close(written[key], (0.5 * 1.5 * bias).float())


@pytest.mark.parametrize("method", [Ties(density=0.5), Dare(density=0.5), Knots(), Resta()])
def test_methods_of_every_rank_take_them(pair_of, tmp_path, method):
    out = tmp_path / "out"
    experts = {"utility": str(pair_of["plain"]), "safety": str(pair_of["biased"])}
    merge(**experts, method=method, rank=6, output=str(out))
    written, biased = read_adapter(out), read_adapter(pair_of["biased"])
    assert written.layout.constant == biased.layout.constant
    assert any(pair.dense()[:, -1].any() for pair in written.pairs.values())
    model = make_model()
    with attached(model, written.pairs):
        torch.testing.assert_close(logits_of(make_model(), out), model(IDS).logits, rtol=1e-5, atol=1e-5)


def test_scores_equal_autograd(tokenizer):
    model, encoded = make_model(), uneven_rows(tokenizer, 3)
    draw = torch.Generator().manual_seed(1)
    pairs = {}
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        layer = model.get_submodule(name)
        a, b = torch.randn(2, layer.in_features, generator=draw), torch.randn(layer.out_features, 2, generator=draw)
        pairs[name] = with_bias(LowRankPair(a, b), torch.randn(layer.out_features, generator=draw))
    core = core_basis([pairs])
    total = LowRankAccumulator(core.shapes)
    run_pass(model, [make_batch(encoded, range(3))], [total], core.u, core.v)
    scores = total.finish().scores
    for i in range(3):
        cores = {n: torch.zeros(*shape, dtype=torch.float64, requires_grad=True) for n, shape in core.shapes.items()}
        batch = make_batch(encoded, [i])
        patch = {n: LowRankPair(core.v[n].T.contiguous(), core.u[n] @ cores[n]) for n in cores}
        with attached(model, patch):
            log_p = model(batch.ids).logits[0, :-1].log_softmax(-1)
            chosen = log_p.gather(1, batch.ids[0, 1:, None])[int(batch.answer_starts[0]) - 1 :]
            gradients = torch.autograd.grad(chosen.sum(), list(cores.values()))
        expected = torch.cat([gradient.reshape(-1) for gradient in gradients])
        torch.testing.assert_close(scores[i].double(), expected, rtol=1e-8, atol=1e-10)


def test_sst_from_fisher_pass_to_adapter(pair_of, base, rows, tmp_path):
    adapters = {"utility": pair_of["plain"], "safety": pair_of["biased"]}
    fisher, out = tmp_path / "fisher", tmp_path / "out"
    assert main(fisher_flags(base, adapters, rows, fisher)) == 0
    shapes = {name: v.shape[0] for name, v in load_fisher(fisher / "safety.safetensors").v.items()}
    assert shapes["model.layers.0.self_attn.q_proj"] == 17
    experts = ["--utility", str(pair_of["plain"]), "--safety", str(pair_of["biased"]), "--fisher", str(fisher)]
    assert main(["merge", *experts, "--method", "Sst", "--alpha", "[0.0,1.0]", "--output", str(out)]) == 0
    nothing = logits_of(make_model(), pair_of["plain"])
    torch.testing.assert_close(logits_of(make_model(), out / "alpha-0"), nothing, rtol=1e-6, atol=1e-6)
    assert (logits_of(make_model(), out / "alpha-1") - nothing).abs().max() > 1e-3


def test_a_point_may_name_an_adapter_that_lacks_biases_or_has_more_of_them(pair_of, base, rows, tmp_path):
    """Named adapters are read together with the experts: a constant input more or less is no other architecture."""
    adapters = {"utility": pair_of["plain"], "safety": pair_of["biased"]}
    for place, point in enumerate(
        (f"{{{pair_of['plain']}: 1.0, safety: 1.0}}", f"{{{pair_of['biased']}: 0.5, utility: 1.0}}", "patched")
    ):
        flags = ["--model.relearn", "true", "--model.reference_safety", point]
        assert main(fisher_flags(base, adapters, rows, tmp_path / str(place), *flags)) == 0
    same, half, patched = (load_fisher(tmp_path / str(i) / "safety.safetensors") for i in range(3))
    torch.testing.assert_close(same.fisher.dense(), patched.fisher.dense(), rtol=1e-5, atol=1e-7)
    whole = CoreBasis(half.u, half.v).coordinates(in_common_terms(read_adapters([pair_of["biased"]]))[0].pairs)
    torch.testing.assert_close(half.start, 0.5 * whole, rtol=1e-5, atol=1e-7)
    turned = {"utility": pair_of["plain"], "safety": pair_of["plain"]}
    flags = ["--model.relearn", "true", "--model.reference_safety", f"{{utility: 1.0, {pair_of['biased']}: 0.5}}"]
    assert main(fisher_flags(base, turned, rows, tmp_path / "beyond", *flags)) == 0
    assert load_fisher(tmp_path / "beyond" / "safety.safetensors").start is None


def test_alignguard_in_training_takes_their_fisher_file(pair_of, base, rows, tmp_path, capsys):
    fisher = tmp_path / "fisher"
    adapters = {"utility": pair_of["plain"], "safety": pair_of["biased"]}
    assert main(fisher_flags(base, adapters, rows, fisher)) == 0
    guard = ["--model.regularizer", "AlignGuard", "--model.regularizer.fisher", str(fisher)]
    assert main(fit_flags(base, rows, tmp_path / "out", *guard)) == 2
    assert "model.regularizer.k is 32; expected 1 to 7" in capsys.readouterr().err
    assert main(fit_flags(base, rows, tmp_path / "out", *guard, "--model.regularizer.k", "4")) == 0
    assert read_adapter(tmp_path / "out").pairs


def test_weight_coordinates_have_no_place_for_them(pair_of, base, rows, tmp_path, capsys):
    adapters = {"utility": pair_of["plain"], "safety": pair_of["biased"]}
    flags = fisher_flags(base, adapters, rows, tmp_path / "f", "--model.representation", "diagonal")
    assert main([*flags, "--model.coordinates", "weight"]) == 2
    assert "model.coordinates weight: a LoRA bias" in capsys.readouterr().err


@pytest.mark.parametrize(
    "stage",
    [{"method": Led(base_fisher="b")}, {"method": SstDiagonal()}, {"combine": RegMean()}, {"combine": FisherAverage()}],
)
def test_methods_on_weights_say_that_they_take_no_biases(pair_of, tmp_path, stage):
    experts = {"utility": str(pair_of["biased"]), "fisher": "a", "rank": 2, "output": str(tmp_path / "m")}
    safety = {"safety": str(pair_of["plain"])} if "method" in stage else {}
    name = type(next(iter(stage.values()))).__name__
    with pytest.raises(InputError, match=rf"{name} works on weights and takes no adapters with biases \(lora_bias"):
        merge(**experts, **safety, **stage)


def make_biased_model():
    model = make_model(attention_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def test_a_full_model_takes_the_bias_up(tmp_path):
    make_biased_model().save_pretrained(tmp_path / "base")
    peft = train_peft(tmp_path / "a", make_biased_model(), 5, target_modules=["q_proj"]).double()
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "base")
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    merge(utility=str(tmp_path / "a"), full_model=True, output=str(tmp_path / "m"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float64)
    torch.testing.assert_close(loaded(IDS).logits, peft.merge_and_unload()(IDS).logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("method", "options"), [(SafeLora, {"tau": 1.0}), (ClosestSafeUpdate, {"rank": 2})])
def test_an_aligned_model_has_their_direction_too(tmp_path, method, options):
    """An aligned model whose difference to the base is an adapter with biases, and that adapter itself."""
    make_biased_model().save_pretrained(tmp_path / "base")
    for name, seed in (("aligned", 5), ("utility", 6)):
        train_peft(tmp_path / name, make_biased_model(), seed, target_modules=["q_proj"])
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = str(tmp_path / "base")
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config))
    merge(utility=str(tmp_path / "aligned"), full_model=True, output=str(tmp_path / "model"))
    utility, safety = read_adapters([tmp_path / "utility", tmp_path / "aligned"])
    model = method(aligned=str(tmp_path / "model"), base=str(tmp_path / "base"), **options)
    found = model.patch(utility.pairs, {}, None).pairs
    expected = method(**options).patch(utility.pairs, safety.pairs, None).pairs
    assert any(delta.dense()[:, -1].any() for delta in expected.values())
    for name, delta in expected.items():
        torch.testing.assert_close(found[name].dense(), delta.dense(), rtol=1e-4, atol=1e-5)


def test_a_head_with_the_embeddings_weight_may_have_a_bias(tmp_path):
    save_file({"model.embed_tokens.weight": torch.zeros(4, 3), "lm_head.bias": torch.ones(4)}, tmp_path / WEIGHTS)
    with open_base(str(tmp_path)) as base:
        found = trained(tmp_path, "lm_head", torch.ones(4, 3), torch.full((4,), 3.0), base).dense()
    assert torch.equal(found, torch.tensor([[1.0, 1.0, 1.0, 2.0]] * 4).double())


def test_a_full_model_without_bias_cannot(pair_of, tmp_path):
    with pytest.raises(InputError, match="has no bias that could take up the adapter's LoRA bias"):
        merge(utility=str(pair_of["biased"]), full_model=True, output=str(tmp_path / "m"))
    assert not (tmp_path / "m").exists()


def test_contradictions_are_named(pair_of, tmp_path):
    folder = shutil.copytree(pair_of["biased"], tmp_path / "a")
    path = folder / "adapter_model.safetensors"
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_bias": False}))
    with pytest.raises(InputError, match="LoRA biases are in it, and lora_bias is False"):
        read_adapter(folder)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith("lora_B.bias"))
    save_file(tensors | {key: torch.ones(3)}, path)
    with pytest.raises(InputError, match="no LoRA factors of a linear layer that it fits"):
        read_adapter(folder)
    adapter = read_adapter(pair_of["biased"])
    table = {"model.embed_tokens": LowRankPair(torch.ones(1, 16), torch.ones(258, 1))}
    layout = type(adapter.layout)(frozenset(table), constant=adapter.layout.constant)
    with pytest.raises(InputError, match="PEFT knows no adapter with both"):
        write_adapter(
            tmp_path / "b",
            adapter.pairs | table,
            base="b",
            manifest={},
            seen=frozenset(),
            card="c",
            layout=layout,
        )
