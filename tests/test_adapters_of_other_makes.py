"""Adapters and bases that are not the usual ones: trained embeddings, initialisations that change the base, other
architectures, broken configurations, modules that only some adapters have."""

import json
import re
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from src.adapters.attach import attached, check_fits
from src.adapters.base_weights import open_base
from src.adapters.checks import check_compatible
from src.adapters.pairs import LowRankPair
from src.adapters.peft_files import read_adapter, write_adapter
from src.adapters.read_together import read_adapters
from src.cli import main
from src.errors import InputError
from src.merge.combinations.compress_then_merge import CompressThenMerge
from src.merge.combinations.core_space import CoreSpace
from src.merge.combinations.dare import Dare
from src.merge.combinations.task_arithmetic import TaskArithmetic
from src.merge.combinations.ties import Ties
from src.merge.combinations.tsv_m import TsvM
from src.merge.inputs import Calibrated, read_inputs
from src.merge.resta import Resta
from src.merge.safe_lora import SafeLora
from src.merge.settings import with_option
from src.merge.sst import Sst
from src.merge.stage import merge
from src.merge.sweep import point_name, variants
from tests.commands import fisher_flags
from tests.tiny import make_model, random_pairs

IDS = torch.arange(12)[None]


def trained(folder, model, base, **options):
    """An adapter by PEFT with random weights; the model that has it."""
    torch.manual_seed(4)
    plain = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    peft = get_peft_model(model, LoraConfig(**plain | options))
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
        if "modules_to_save" in name:
            parameter.data += torch.randn_like(parameter) * 0.2
    peft.save_pretrained(folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(base)}))
    return peft.eval()


def saved(folder, model):
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def check_merges(folder, expected):
    """A full model and an adapter of full rank, from the adapter ``a`` of the base ``base``, give these logits."""
    given = {"utility": str(folder / "a"), "base": str(folder / "base")}
    merge(**given, full_model=True, output=str(folder / "m"))
    whole = AutoModelForCausalLM.from_pretrained(folder / "m", dtype=torch.float64)
    torch.testing.assert_close(whole(IDS).logits, expected, rtol=1e-5, atol=1e-5)
    merge(**given, rank=16, output=str(folder / "r"))
    bare = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float64)
    loaded = PeftModel.from_pretrained(bare, str(folder / "r")).double().eval()
    torch.testing.assert_close(loaded(IDS).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("module", "tied"), [("embed_tokens", False), ("embed_tokens", True), ("lm_head", True)])
def test_a_fully_trained_embedding_or_head_is_merged(tmp_path, module, tied):
    base = saved(tmp_path / "base", make_model(tie_word_embeddings=tied))
    peft = trained(tmp_path / "a", base, tmp_path / "base", modules_to_save=[module])
    check_merges(tmp_path, peft(IDS).logits)


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_of_tied_weights_that_are_trained_together_one_need_be_listed(tmp_path, module):
    base = saved(tmp_path / "base", make_model())
    peft = trained(tmp_path / "a", base, tmp_path / "base", modules_to_save=[module], ensure_weight_tying=True)
    assert torch.equal(peft.base_model.model.lm_head.weight, peft.base_model.model.model.embed_tokens.weight)
    check_merges(tmp_path, peft(IDS).logits)


@pytest.mark.parametrize("module", ["c_proj", "c_attn"])
@pytest.mark.filterwarnings("ignore:.*(lora_bias|fan_in_fan_out).*:UserWarning")
def test_fully_trained_transposed_layers_with_biases_are_merged(tmp_path, module):
    """Square and other Conv1D layers of GPT-2; their biases move as LoRA biases do."""
    config = GPT2Config(vocab_size=40, n_embd=12, n_layer=1, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(0)
    base = saved(tmp_path / "base", GPT2LMHeadModel(config))
    peft = trained(tmp_path / "a", base, tmp_path / "base", target_modules=["c_fc"], modules_to_save=[module])
    check_merges(tmp_path, peft(IDS).logits)


@pytest.mark.parametrize("module", ["q_proj", "down_proj"])
def test_a_layer_is_as_its_architecture_stores_it_whatever_an_adapter_says(tmp_path, module):
    """PEFT's layers on quantised bases disregard ``fan_in_fan_out`` and keep it in the configuration."""
    base = saved(tmp_path / "base", make_model())
    peft = trained(tmp_path / "a", base, tmp_path / "base", target_modules=[module])
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fan_in_fan_out": True}))
    merge(utility=str(tmp_path / "a"), base=str(tmp_path / "base"), full_model=True, output=str(tmp_path / "m"))
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float64)
    torch.testing.assert_close(whole(IDS).logits, peft(IDS).logits, rtol=1e-5, atol=1e-5)


def test_a_grown_vocabulary_is_refused_with_its_base_and_warned_of_without(tmp_path, caplog):
    small = saved(tmp_path / "base", make_model())
    grown = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64)
    grown.resize_token_embeddings(small.config.vocab_size + 4)
    trained(tmp_path / "a", grown, tmp_path / "base", target_modules=["q_proj", "embed_tokens"])
    read_adapter(tmp_path / "a")
    assert "rows of a vocabulary that was grown are lost" in caplog.text
    with (
        open_base(str(tmp_path / "base")) as weights,
        pytest.raises(InputError, match=r"embed_tokens has the shape \(262, 16\) in place of \(258, 16\)"),
    ):
        read_adapter(tmp_path / "a", weights)


def test_a_copy_of_the_base_is_compared_but_for_rounding(tmp_path, caplog):
    base = saved(tmp_path / "base", make_model())
    trained(tmp_path / "a", base, tmp_path / "base", target_modules=["embed_tokens"])
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    (key,) = (key for key in tensors if key.endswith("base_layer.weight"))
    with open_base(str(tmp_path / "base")) as weights:
        for rounded in (torch.float32, torch.bfloat16):
            save_file(tensors | {key: tensors[key].to(rounded)}, file)
            assert read_adapter(tmp_path / "a", weights).pairs
        save_file(tensors | {key: tensors[key] + 0.1 * tensors[key].std()}, file)
        with pytest.raises(InputError, match="embed_tokens has other values"):
            read_adapter(tmp_path / "a", weights)
    assert "copy" not in caplog.text


def test_dora_without_its_magnitudes_is_refused(tmp_path):
    base = saved(tmp_path / "base", make_model())
    trained(tmp_path / "a", base, tmp_path / "base", use_dora=True)
    file = tmp_path / "a" / "adapter_model.safetensors"
    save_file({key: t for key, t in load_file(file).items() if "magnitude" not in key}, file)
    with (
        open_base(str(tmp_path / "base")) as weights,
        pytest.raises(InputError, match=r"q_proj has no DoRA magnitude, and use_dora is true"),
    ):
        read_adapter(tmp_path / "a", weights)


def test_of_fully_trained_modules_a_norm_is_refused(tmp_path):
    base = saved(tmp_path / "base", make_model())
    trained(tmp_path / "a", base, tmp_path / "base", modules_to_save=["norm"])
    with pytest.raises(InputError, match=r"norm\.weight: of modules_to_save only linear layers and embeddings"):
        merge(utility=str(tmp_path / "a"), base=str(tmp_path / "base"), rank=4, output=str(tmp_path / "m"))


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_adapter_whose_start_is_subtracted_from_the_base_is_refused(tmp_path, start):
    trained(tmp_path, make_model(dtype=torch.float32), "tiny", init_lora_weights=start)
    with pytest.raises(InputError, match=f"init_lora_weights is '{start}'"):
        read_adapter(tmp_path)


def test_the_embedding_of_any_architecture_is_untied(tmp_path):
    config = OPTConfig(
        vocab_size=40, hidden_size=12, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=12
    )
    torch.manual_seed(0)
    base = saved(tmp_path / "base", OPTForCausalLM(config))
    peft = trained(tmp_path / "a", base, tmp_path / "base", target_modules=["q_proj", "embed_tokens"])
    expected = peft(IDS).logits
    merge(utility=str(tmp_path / "a"), full_model=True, output=str(tmp_path / "m"))
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float64).eval()
    torch.testing.assert_close(whole(IDS).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["attn.c_proj", "attn.c_attn"])
def test_an_aligned_model_of_transposed_layers_is_read_the_right_way_round(tmp_path, name):
    config = GPT2Config(vocab_size=40, n_embd=12, n_layer=1, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(0)
    base, aligned = GPT2LMHeadModel(config), GPT2LMHeadModel(config)
    base.save_pretrained(tmp_path / "base")
    aligned.save_pretrained(tmp_path / "aligned")
    module = f"transformer.h.0.{name}"
    out, into = base.get_submodule(module).weight.shape[::-1]
    pair = LowRankPair(torch.randn(2, into), torch.randn(out, 2))
    direction = (aligned.get_submodule(module).weight - base.get_submodule(module).weight).T.double()
    projected = direction @ direction.T @ pair.dense() / direction.norm()
    cosine = (projected * pair.dense()).sum() / projected.norm() / pair.dense().norm()
    method = SafeLora(aligned=str(tmp_path / "aligned"), base=str(tmp_path / "base"))
    found = method.patch({module: pair}, {}, None).findings["cosines"][module]
    assert found == pytest.approx(cosine.item(), rel=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"alpha_pattern": {"q": "x"}}, "alpha of q is 'x'"),
        ([], "a list"),
    ],
)
def test_a_broken_configuration_is_one_line(adapters, tmp_path, change, message):
    folder = tmp_path / "a"
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_bytes((adapters["safety"] / name).read_bytes())
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | change if change else change))
    with pytest.raises(InputError, match=message):
        read_adapter(folder)


@pytest.mark.parametrize("weights", [[float("nan"), 1.0], [float("inf"), 1.0]])
def test_weights_that_are_no_numbers_are_refused(adapters, tmp_path, weights):
    both = [str(adapters["utility"]), str(adapters["safety"])]
    with pytest.raises(InputError, match=r"utility_weights are .*; expected finite numbers"):
        merge(utility=both, utility_weights=weights, output=str(tmp_path / "o"))
    with pytest.raises(InputError, match="nothing to write: every weight is 0"):
        merge(utility=both, utility_weights=[0.0, 0.0], output=str(tmp_path / "o"))


def test_adapters_of_no_named_base_must_share_a_module_with_another_in_any_order(tmp_path):
    pairs = random_pairs(make_model(), 2, 1)
    first, second, *_ = pairs
    parts = {"one": [first], "other": [second], "both": [first, second]}
    for name, modules in parts.items():
        kept = {module: pairs[module] for module in modules}
        write_adapter(tmp_path / name, kept, base="", manifest={}, seen=frozenset(), card="c")
    one, other, both = (read_adapter(tmp_path / name) for name in parts)
    for order in ([both, one, other], [one, other, both], [other, both, one]):
        check_compatible(order)
    for order in ([one, other], [other, one]):
        with pytest.raises(InputError, match="no module in common"):
            check_compatible(order)
    wrong = {second: LowRankPair(torch.ones(1, 3), torch.ones(3, 1)), first: pairs[first]}
    write_adapter(tmp_path / "wrong", wrong, base="", manifest={}, seen=frozenset(), card="c")
    with pytest.raises(InputError, match="has shapes"):
        check_compatible([one, both, read_adapter(tmp_path / "wrong")])


def test_adapters_of_other_modules_of_one_base_are_merged(tmp_path, capsys):
    """What only one of them updates the other leaves as it is."""
    pairs = random_pairs(make_model(), 2, 1)
    parts = {part: {n: pair for n, pair in pairs.items() if part in n} for part in ("self_attn", "mlp")}
    for name, kept in parts.items():
        write_adapter(tmp_path / name, kept, base="tiny", manifest={}, seen=frozenset(), card="c")
    folders = [str(tmp_path / name) for name in parts]
    for number, combine in enumerate((TaskArithmetic(), CoreSpace(TaskArithmetic()))):
        merge(utility=folders, combine=combine, output=str(tmp_path / f"m{number}"))
        merged = read_adapter(tmp_path / f"m{number}").pairs
        assert set(merged) == set(pairs)
        for name, pair in pairs.items():
            torch.testing.assert_close(merged[name].dense(), pair.dense(), rtol=1e-5, atol=1e-6)
    assert main(["inspect", *folders, "--output", str(tmp_path / "i")]) == 0
    table = capsys.readouterr().out
    assert "| 1 | 1.000 | 0.000 |" in table
    assert "| 1 | 1.000 | — |" in table
    assert "nan" not in table


def of_multimodal(folder, renamed=str):
    """An adapter of a model that also sees, with the ranks of its modules in patterns; some names written otherwise."""
    names = [f"model.language_model.layers.{i}.{part}" for i in range(2) for part in ("q_proj", "up_proj")]
    draw, pairs = torch.Generator().manual_seed(0), {}
    for rank, name in enumerate([*names, "lm_head"], 1):
        pairs[name] = LowRankPair(torch.randn(rank, 6, generator=draw), torch.randn(8, rank, generator=draw))
    write_adapter(folder, pairs, base="tiny", manifest={}, seen=frozenset(), card="c")
    file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    root = "base_model.model."
    save_file({root + renamed(key.removeprefix(root)): value for key, value in load_file(file).items()}, file)
    found = json.loads(config.read_text())
    for key in ("rank_pattern", "alpha_pattern"):
        plain = {name.replace("\\", ""): value for name, value in found[key].items()}
        found[key] = {re.escape(renamed(name)): value for name, value in plain.items()}
    config.write_text(json.dumps(found))
    return pairs


def of_before(name):
    """The name that transformers gave a module before 4.52."""
    head = name.replace("lm_head", "language_model.lm_head") if name.startswith("lm_head") else name
    return head.replace("model.language_model.", "language_model.model.")


def test_a_module_under_its_name_of_before_is_the_same_module(tmp_path):
    pairs = of_multimodal(tmp_path / "later")
    of_multimodal(tmp_path / "before", of_before)
    assert read_adapter(tmp_path / "before").sha256 != read_adapter(tmp_path / "later").sha256
    # Alone it keeps its names, which are those of today in some models (Llama 4, BLIP-2).
    assert sorted(read_adapter(tmp_path / "before").pairs) == sorted(map(of_before, pairs))
    merge(utility=[str(tmp_path / "before")] * 2, output=str(tmp_path / "alone"))
    assert sorted(read_adapter(tmp_path / "alone").pairs) == sorted(map(of_before, pairs))
    merge(utility=[str(tmp_path / "before"), str(tmp_path / "later")], output=str(tmp_path / "m"))
    merged = read_adapter(tmp_path / "m").pairs
    assert sorted(merged) == sorted(pairs)
    for name, pair in pairs.items():
        torch.testing.assert_close(merged[name].dense(), 2 * pair.dense(), rtol=1e-4, atol=1e-4)
    assert "language_model.model." not in (tmp_path / "m" / "adapter_config.json").read_text()
    assert not any("language_model.model." in key for key in load_file(tmp_path / "m" / "adapter_model.safetensors"))


def test_a_direction_under_names_of_before_is_of_the_same_modules(tmp_path):
    of_multimodal(tmp_path / "later")
    of_multimodal(tmp_path / "before", of_before)
    found = []
    for name in ("later", "before"):
        merge(
            utility=str(tmp_path / "later"),
            method=SafeLora(aligned=str(tmp_path / name)),
            output=str(tmp_path / name[0]),
        )
        found.append(read_adapter(tmp_path / name[0]).pairs)
    for name, pair in found[0].items():
        torch.testing.assert_close(found[1][name].dense(), pair.dense())


def test_a_module_under_both_of_its_names_is_one_line(tmp_path):
    of_multimodal(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    stored = load_file(path)
    root = "base_model.model."
    both = {root + of_before(key.removeprefix(root)): value.clone() for key, value in stored.items()}
    save_file(stored | both, path)
    with pytest.raises(InputError, match=r"updates \S+ under two names.*expected one$"):
        read_adapters([tmp_path])


def test_two_names_of_one_weight_of_the_base_are_one_line(tmp_path):
    """One adapter of the text model, one of the model that also sees, whose files have one weight for both."""
    (tmp_path / "base").mkdir()
    save_file({"model.language_model.layers.0.up.weight": torch.zeros(8, 6)}, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text("{}")
    for name, module in (("text", "model.layers.0.up"), ("sees", "model.language_model.layers.0.up")):
        pair = LowRankPair(torch.randn(2, 6), torch.randn(8, 2))
        write_adapter(
            tmp_path / name, {module: pair}, base=str(tmp_path / "base"), manifest={}, seen=frozenset(), card="c"
        )
    both = [str(tmp_path / "text"), str(tmp_path / "sees")]
    with pytest.raises(InputError, match=r"two modules of these adapters are model\.language_model\.layers\.0\.up"):
        merge(utility=both, full_model=True, output=str(tmp_path / "m"))
    merge(utility=both[:1], full_model=True, output=str(tmp_path / "one"))


def test_a_model_that_has_a_module_by_its_later_name_says_so():
    model = torch.nn.Module()
    model.model = torch.nn.Module()
    model.model.language_model = torch.nn.ModuleDict({"q": torch.nn.Linear(6, 8)})
    pair = LowRankPair(torch.randn(2, 6), torch.randn(8, 2))
    with pytest.raises(InputError, match=r"does not have \(it has model\.language_model\.q: load"):
        check_fits(model, {"language_model.model.q": pair}, "a")


def test_points_of_a_sweep_never_share_a_directory(adapters, tmp_path):
    assert point_name("alpha", 0.5) == "alpha-0.5"
    experts = {"utility": str(adapters["utility"]), "safety": str(adapters["safety"])}
    merge(**experts, method=TaskArithmetic(), alpha=[1.0, 1.0000001], output=str(tmp_path / "o"))
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == ["alpha-1", "alpha-1.0000001"]


def test_options_of_an_inner_method_can_be_swept():
    assert with_option(CoreSpace(Ties(density=0.2)), "inner.density", 0.7).inner.density == 0.7
    for method, option in ((Dare(0.5), "density.x"), (TsvM(), "args"), (TaskArithmetic(), "gamma")):
        with pytest.raises(InputError, match="has no such option"):
            with_option(method, option, 1.0)
    with pytest.raises(InputError, match="--alpha"):
        with_option(TaskArithmetic(), "alpha", 1.0)


@pytest.mark.parametrize(
    ("method", "option", "value"),
    [
        (TsvM(), "keep", 1.5),
        (Dare(), "seed", 0.5),
        (Sst(filter="topk", k=2), "k", 2.5),
        (CompressThenMerge(), "rank", float("nan")),
        (CoreSpace(Dare()), "inner.seed", 0.5),
    ],
)
def test_options_that_are_counted_are_swept_over_whole_numbers(method, option, value):
    with pytest.raises(InputError, match=rf"sweep\.{option} is {value}; expected a whole number"):
        with_option(method, option, value)
    head, _, rest = option.partition(".")
    found = getattr(with_option(method, option, 3.0), head)
    found = getattr(found, rest) if rest else found
    assert (found, type(found)) == (3, int)


@pytest.mark.parametrize(
    ("method", "option"),
    [
        (Dare(), "rescale"),
        (Ties(), "convention"),
        (Ties(), "normalise"),
        (SafeLora(), "aligned"),
        (CoreSpace(), "inner"),
    ],
)
def test_options_that_are_no_numbers_are_not_swept(method, option):
    with pytest.raises(InputError, match=rf"sweep.combine.{option} is 1.0; the option takes no numbers"):
        with_option(method, option, 1.0, prefix="sweep.combine.")


def test_options_that_are_unset_or_numbers_are_swept():
    assert with_option(Resta(), "density", 0.5).density == 0.5
    assert with_option(Sst(filter="energy", share=0.2), "share", 1).share == 1
    assert with_option(Ties(), "normalise", False).normalise is False
    with pytest.raises(InputError, match=r"sweep.combine.keep is 1.5"):
        variants(None, TsvM(), {"combine.keep": [1.5]})


@pytest.mark.filterwarnings("ignore:.*lora_bias.*:UserWarning")
def test_an_adapter_without_lora_biases_can_be_the_direction_of_one_with(tmp_path):
    for name, biased in (("biased", True), ("plain", False)):
        trained(tmp_path / name, make_model(), "tiny", lora_bias=biased)
    method = SafeLora(aligned=str(tmp_path / "plain"))
    merge(utility=str(tmp_path / "biased"), method=method, safety=None, output=str(tmp_path / "o"))
    model = make_model()
    with attached(model, read_adapter(tmp_path / "o").pairs):
        assert torch.isfinite(model(IDS).logits).all()


def test_equal_weights_of_another_scaling_are_another_adapter(adapters, base, rows, tmp_path, capsys):
    strong = {}
    for name, folder in adapters.items():
        strong[name] = shutil.copytree(folder, tmp_path / name)
        path = strong[name] / "adapter_config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps(config | {"lora_alpha": 10 * config["lora_alpha"]}))
    plain, other = (read_adapter(folder["utility"]) for folder in (adapters, strong))
    assert plain.sha256 == other.sha256
    assert plain.identity != other.identity
    assert main(fisher_flags(base, adapters, rows, tmp_path / "fisher")) == 0
    flags = ["merge", "--method", "Sst", "--alpha", "1.0", "--fisher", str(tmp_path / "fisher")]
    for changed, message in ((strong["safety"], "measured for the safety adapter"), (None, "or another scaling")):
        pair = adapters | ({"safety": changed} if changed else {"utility": strong["utility"]})
        experts = [word for name in ("utility", "safety") for word in (f"--{name}", str(pair[name]))]
        assert main([*flags, *experts, "--output", str(tmp_path / "o")]) == 2
        assert message in capsys.readouterr().err
    # What a combination keeps of each expert (thresholds, masks) goes by this name.
    nothing = Calibrated([], None, None, Ties())
    both = read_inputs([str(adapters["utility"]), str(strong["utility"])], None, None, nothing)
    assert len({expert.key for expert in both.as_experts()}) == 2
