import copy
import json
import shutil
from fractions import Fraction

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from src.adapters.base_weights import open_base
from src.adapters.basis import core_basis
from src.adapters.checks import check_compatible, same_base_name
from src.adapters.pairs import LowRankPair, weighted_sum
from src.adapters.peft_files import read_adapter, write_adapter
from src.errors import InputError
from src.merge.combinations.task_arithmetic import TaskArithmetic
from src.merge.stage import merge
from tests.tiny import make_model, random_pairs

IDS = torch.arange(10)[None]


def save_peft(folder, **options):
    torch.manual_seed(4)
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options)
    peft = get_peft_model(make_model(dtype=torch.float32), config)
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    peft.save_pretrained(folder)
    return peft.eval()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 9}},
        {"target_modules": ["q_proj", "down_proj"]},
    ],
)
def test_reading_gives_pefts_delta(tmp_path, options):
    peft = save_peft(tmp_path, **options)
    pairs = read_adapter(tmp_path).pairs
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in peft.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    assert set(pairs) == set(layers)
    for name, pair in pairs.items():
        torch.testing.assert_close(pair.dense().float(), layers[name].get_delta_weight("default"))


def test_written_adapters_load_in_peft_with_the_same_logits(tmp_path):
    model = make_model()
    pairs = random_pairs(model, 3, 1)
    names = list(pairs)
    pairs[names[0]] = weighted_sum([{"x": pairs[names[0]]}, {"x": pairs[names[0]]}], [1.0, 0.5])["x"]
    del pairs[names[3]]
    write_adapter(tmp_path / "a", pairs, base="tiny", manifest={}, seen=frozenset({"b", "a"}), card="card")
    loaded = PeftModel.from_pretrained(make_model(), str(tmp_path / "a")).double()
    for name, pair in pairs.items():
        model.get_submodule(name).weight += pair.dense()
    torch.testing.assert_close(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=1e-5, atol=1e-6)
    again = read_adapter(tmp_path / "a")
    assert again.seen == {"a", "b"}
    for name, pair in pairs.items():
        torch.testing.assert_close(again.pairs[name].dense(), pair.dense())


def test_writing_is_byte_identical(tmp_path):
    pairs = random_pairs(make_model(), 2, 1)
    shuffled = dict(reversed(pairs.items()))
    for folder, given in (("a", pairs), ("b", shuffled)):
        write_adapter(tmp_path / folder, given, base="t", manifest={}, seen=frozenset(), card="c")
    assert read_adapter(tmp_path / "a").sha256 == read_adapter(tmp_path / "b").sha256


def test_weighted_sum_equals_dense(model):
    one, two = random_pairs(model, 2, 1), random_pairs(model, 3, 2)
    missing = next(iter(two))
    del two[missing]
    total = weighted_sum([one, two], [0.5, -2.0])
    torch.testing.assert_close(total[missing].dense(), 0.5 * one[missing].dense())
    for name in two:
        torch.testing.assert_close(total[name].dense(), 0.5 * one[name].dense() - 2 * two[name].dense())


@pytest.mark.parametrize("union", [False, True])
def test_the_core_space_holds_its_adapters_exactly(model, union):
    adapters = [random_pairs(model, 2, 1), random_pairs(model, 3, 2)]
    core = core_basis(adapters if union else adapters[:1])
    for pairs in adapters if union else adapters[:1]:
        assert core.residual(pairs) < 1e-6
        patch = core.patch(core.coordinates(pairs))
        for name, pair in pairs.items():
            torch.testing.assert_close(patch[name].dense(), pair.dense())
    if not union:
        assert core.residual(adapters[1]) > 0.5
        assert core.dim == 14 * 2 * 2


def test_what_a_core_space_misses_is_a_share_of_the_norm():
    core = core_basis([{"m": LowRankPair(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0], [0.0]]))}])
    update = {"m": LowRankPair(torch.eye(2), torch.diag(torch.tensor([3.0, 4.0])))}
    assert core.residual(update) == pytest.approx(0.8)


def test_the_core_space_does_not_depend_on_the_factors(model):
    pairs = random_pairs(model, 3, 1)
    turned = {n: LowRankPair(torch.linalg.inv(q) @ p.a.double(), p.b.double() @ q) for n, p, q in turns(pairs)}
    one, two = core_basis([pairs]), core_basis([turned])
    for name in pairs:
        torch.testing.assert_close(one.u[name] @ one.u[name].T, two.u[name] @ two.u[name].T)


def test_directions_of_a_shared_core_space_do_not_depend_on_the_factors(model):
    """The span is not enough: a diagonal Fisher matrix hangs on the directions themselves."""
    adapters = [random_pairs(model, 3, 1), random_pairs(model, 2, 2)]
    name = next(iter(adapters[0]))
    adapters[0][name] = LowRankPair(torch.cat([adapters[0][name].a] * 2), torch.cat([adapters[0][name].b] * 2, dim=1))
    turned = [
        {n: LowRankPair(torch.linalg.inv(q) @ p.a.double(), p.b.double() @ q) for n, p, q in turns(a)} for a in adapters
    ]
    one, two = core_basis(adapters), core_basis(turned)
    assert one.shapes == two.shapes
    assert one.shapes[name] == (5, 5)
    for sides in zip((one.u, one.v), (two.u, two.v), strict=True):
        for module in adapters[0]:
            same = (sides[0][module].T @ sides[1][module]).abs()
            torch.testing.assert_close(same, torch.eye(len(same), dtype=torch.float64), atol=1e-6, rtol=0)


def test_a_shared_core_space_needs_updates_of_one_shape(model):
    pairs, name = random_pairs(model, 2, 1), "model.layers.0.mlp.up_proj"
    other = {name: LowRankPair(torch.ones(1, 16), torch.ones(3, 1))}
    with pytest.raises(ValueError, match=r"up_proj: updates of shapes \(24, 16\) and \(3, 16\) cannot be added"):
        core_basis([pairs, other])


def turns(pairs):
    draw = torch.Generator().manual_seed(9)
    return [(n, p, torch.randn(p.rank, p.rank, generator=draw, dtype=torch.float64)) for n, p in pairs.items()]


def test_zero_and_rank_deficient_updates_drop_directions(model):
    pairs = random_pairs(model, 3, 1)
    first, second = list(pairs)[:2]
    pairs[first] = pairs[first].scaled(0.0)
    b = pairs[second].b.clone()
    b[:, 2] = b[:, 1]
    a = pairs[second].a.clone()
    a[2] = a[1]
    pairs[second] = LowRankPair(a, b)
    core = core_basis([pairs])
    assert first not in core.u
    assert core.shapes[second] == (2, 2)
    with pytest.raises(ValueError, match="every delta is zero"):
        core_basis([{first: pairs[first]}])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True}, "LoRA biases"),
        ({"modules_to_save": ["lm_head"]}, "fully trained modules"),
        ({"bias": "all"}, "bias is 'all'; trained biases .*; expected none .*lora_bias: true"),
        ({"trainable_token_indices": [1]}, "trained tokens"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora is set; BD-LoRA"),
        ({"modules_to_save": "lm_head"}, "modules_to_save is 'lm_head'; expected a list"),
        ({"base_model_name_or_path": 5}, "base_model_name_or_path is 5; expected the name"),
        ({"alpha_pattern": ["q_proj"]}, r"alpha_pattern is \['q_proj'\]; expected a mapping"),
        ({"rank_pattern": "q_proj"}, "rank_pattern is 'q_proj'; expected a mapping"),
        ({"lora_alpha": 10**400}, r"the alpha of lora_alpha is 10*; expected a finite number"),
        ({"lora_alpha": float("nan")}, "the alpha of lora_alpha is nan; expected a finite number"),
        ({"alpha_pattern": {"q_proj": -(10**400)}}, r"the alpha of q_proj is -10*; expected a finite number"),
        ({"alpha_pattern": {"*q_proj": 8}}, r"alpha_pattern has '\*q_proj', which is no regular expression"),
    ],
)
def test_what_low_rank_pairs_cannot_express_is_refused(adapters, tmp_path, change, message):
    folder = shutil.copytree(adapters["safety"], tmp_path / "copy")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(InputError, match=message):
        read_adapter(folder)


def test_broken_adapters_are_named(adapters, tmp_path):
    with pytest.raises(InputError, match="no such directory"):
        read_adapter(tmp_path / "nowhere" / "at" / "all")
    folder = shutil.copytree(adapters["safety"], tmp_path / "copy")
    (folder / "adapter_model.safetensors").write_bytes(b"short")
    with pytest.raises(InputError, match="not a readable safetensors"):
        read_adapter(folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        read_adapter(folder)


def test_incompatible_adapters_are_named(adapters, tmp_path):
    safety = read_adapter(adapters["safety"])
    other = {"model.layers.9.x": LowRankPair(torch.ones(1, 2), torch.ones(2, 1))}
    write_adapter(tmp_path / "o", other, base=safety.base, manifest={}, seen=frozenset(), card="c")
    check_compatible([safety, read_adapter(tmp_path / "o")])
    for name, pairs in (("n", safety.pairs), ("o", other)):
        write_adapter(tmp_path / name, pairs, base="", manifest={}, seen=frozenset(), card="c")
    with pytest.raises(InputError, match="no module in common cannot be merged where they name no base"):
        check_compatible([read_adapter(tmp_path / "n"), read_adapter(tmp_path / "o")])
    write_adapter(tmp_path / "p", safety.pairs, base="other/base", manifest={}, seen=frozenset(), card="c")
    with pytest.raises(InputError, match="trained on the base 'other/base'"):
        check_compatible([safety, read_adapter(tmp_path / "p")])


@pytest.mark.parametrize(
    ("dtype", "rank", "message"),
    [
        (torch.int8, 2, r"x.lora_A.weight is stored as torch.int8; expected float16"),
        (torch.float8_e4m3fn, 2, r"x.lora_A.weight is stored as torch.float8_e4m3fn; expected float16"),
        (torch.float32, 0, "x has factors of rank 0; expected at least 1"),
    ],
)
def test_factors_that_are_no_numbers_or_none_are_named(adapters, tmp_path, dtype, rank, message):
    from safetensors.torch import save_file

    folder = shutil.copytree(adapters["safety"], tmp_path / "copy")
    shapes = {"A": (rank, 4), "B": (4, rank)}
    factors = {f"base_model.model.x.lora_{k}.weight": torch.zeros(shape).to(dtype) for k, shape in shapes.items()}
    save_file(factors, folder / "adapter_model.safetensors")
    with pytest.raises(InputError, match=message):
        read_adapter(folder)


@pytest.mark.parametrize("text", ["[]", '{"base": "tiny"}'])
def test_a_manifest_that_is_no_mapping_is_named(adapters, tmp_path, text):
    folder = shutil.copytree(adapters["safety"], tmp_path / "copy")
    (folder / "manifest.json").write_text(text)
    with pytest.raises(InputError, match=r"manifest.json: not a manifest; expected a mapping"):
        read_adapter(folder)


def test_base_names_may_differ_as_hub_id_and_directory(tmp_path):
    (tmp_path / "Mistral-7B-v0.1").mkdir()
    assert same_base_name("mistralai/Mistral-7B-v0.1", str(tmp_path / "Mistral-7B-v0.1"))
    assert not same_base_name("mistralai/Mistral-7B-v0.1", "meta/Mistral-7B-v0.1")


def save_gpt2(folder):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_positions=32, n_embd=12, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float64).eval()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_gpt2_adapters_are_read_merged_and_written(tmp_path):
    from transformers import GPT2LMHeadModel

    from src.adapters.attach import attached, check_fits
    from src.merge.stage import merge

    model = save_gpt2(tmp_path / "base")
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        config = LoraConfig(r=3, lora_alpha=6, target_modules=["c_attn", "c_proj"], task_type="CAUSAL_LM")
        peft = get_peft_model(save_gpt2(tmp_path / "base"), config)
        for key, parameter in peft.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(parameter, std=0.1)
        peft.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
        peft.save_pretrained(tmp_path / name)
        adapter = read_adapter(tmp_path / name)
        assert adapter.layout.transposed
        check_fits(model, adapter.pairs, name)
        with attached(model, adapter.pairs):
            torch.testing.assert_close(model(IDS).logits, peft(IDS).logits, rtol=1e-5, atol=1e-6)
    both = [str(tmp_path / "one"), str(tmp_path / "two")]
    merge(utility=both, output=str(tmp_path / "m"))
    merge(utility=both, full_model=True, output=str(tmp_path / "full"))
    with attached(model, read_adapter(tmp_path / "m").pairs):
        expected = model(IDS).logits
    loaded = PeftModel.from_pretrained(save_gpt2(tmp_path / "base"), str(tmp_path / "m"))
    torch.testing.assert_close(loaded(IDS).logits, expected, rtol=1e-5, atol=1e-6)
    full = GPT2LMHeadModel.from_pretrained(tmp_path / "full", dtype=torch.float64)
    torch.testing.assert_close(full(IDS).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_embeddings_are_read_attached_and_written(tmp_path, caplog):
    from src.adapters.attach import attached, check_fits

    peft = save_peft(tmp_path / "a", target_modules=["q_proj", "embed_tokens"])
    adapter = read_adapter(tmp_path / "a")
    assert adapter.layout.embeddings == {"model.embed_tokens"}
    delta = peft.get_submodule("base_model.model.model.embed_tokens").get_delta_weight("default")
    torch.testing.assert_close(adapter.pairs["model.embed_tokens"].dense().float(), delta)
    model = make_model(dtype=torch.float32)
    check_fits(model, adapter.pairs, "a")
    with attached(model, adapter.pairs):
        torch.testing.assert_close(model(IDS).logits, peft(IDS).logits, rtol=1e-4, atol=1e-5)
    write_adapter(
        tmp_path / "b", adapter.pairs, base="t", manifest={}, seen=frozenset(), card="c", layout=adapter.layout
    )
    loaded = PeftModel.from_pretrained(make_model(dtype=torch.float32), str(tmp_path / "b"))
    torch.testing.assert_close(loaded(IDS).logits, peft(IDS).logits, rtol=1e-4, atol=1e-5)
    again = read_adapter(tmp_path / "b").pairs["model.embed_tokens"]
    torch.testing.assert_close(again.dense(), adapter.pairs["model.embed_tokens"].dense())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_is_added_to_a_scaled_embedding_is_scaled_with_it(tmp_path):
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    from src.adapters.attach import attached

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3TextConfig(vocab_size=258, num_key_value_heads=1, head_dim=8, pad_token_id=0, **sizes)
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(config).eval()
    peft = get_peft_model(copy.deepcopy(model), LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]))
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    peft.eval().save_pretrained(tmp_path / "a")
    with attached(model, read_adapter(tmp_path / "a").pairs):
        torch.testing.assert_close(model(IDS).logits, peft(IDS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files_are_read_in_float32(adapters, tmp_path, dtype):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(adapters["safety"], tmp_path / "half")
    weights = {key: value.to(dtype) for key, value in load_file(folder / "adapter_model.safetensors").items()}
    save_file(weights, folder / "adapter_model.safetensors")
    for name, pair in read_adapter(folder).pairs.items():
        assert pair.a.dtype == torch.float32
        key = f"base_model.model.{name}.lora_"
        expected = weights[f"{key}B.weight"].double() @ weights[f"{key}A.weight"].double()
        torch.testing.assert_close(pair.dense(), expected)


def test_keys_that_are_no_factors_are_refused(adapters, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(adapters["safety"], tmp_path / "extra")
    weights = load_file(folder / "adapter_model.safetensors")
    save_file(weights | {"base_model.model.lm_head.weight": torch.ones(2, 2)}, folder / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"lm_head.weight is not a LoRA factor"):
        read_adapter(folder)
    convolution = {key: torch.ones(2, 2, 3) if "lora_A" in key else value for key, value in weights.items()}
    save_file(convolution, folder / "adapter_model.safetensors")
    with pytest.raises(InputError, match="3 dimensions"):
        read_adapter(folder)


def save_dora(base, folder):
    """A DoRA adapter with one fully trained module on a base with untied weights, whose files it names."""
    model = make_model(dtype=torch.float32)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone(), requires_grad=False)
    model.save_pretrained(base)
    config = LoraConfig(
        r=3, lora_alpha=6, use_dora=True, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"]
    )
    torch.manual_seed(3)
    peft = get_peft_model(model, config)
    for name, parameter in peft.named_parameters():
        if "lora_magnitude" in name:
            parameter.data *= 1.3
        elif "lora_" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    peft.peft_config["default"].base_model_name_or_path = str(base)
    peft.save_pretrained(folder)
    return peft.eval()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_dora_and_trained_modules_are_converted_exactly_given_the_base(tmp_path):
    from transformers import AutoModelForCausalLM

    from src.merge.stage import merge

    peft = save_dora(tmp_path / "base", tmp_path / "a")
    with pytest.raises(InputError, match="use_dora is set"):
        merge(utility=str(tmp_path / "a"), rank=16, output=str(tmp_path / "m"))
    given = {"utility": str(tmp_path / "a"), "base": str(tmp_path / "base")}
    with pytest.raises(InputError, match="full-rank updates"):
        merge(**given, output=str(tmp_path / "m"))
    merge(**given, rank=16, output=str(tmp_path / "m"))
    merge(**given, full_model=True, output=str(tmp_path / "full"))
    expected = peft(IDS).logits
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    loaded = PeftModel.from_pretrained(fresh, str(tmp_path / "m"))
    torch.testing.assert_close(loaded(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)
    full = AutoModelForCausalLM.from_pretrained(tmp_path / "full", dtype=torch.float32)
    torch.testing.assert_close(full(IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_pickled_weights_are_read_and_code_in_them_is_not_run(adapters, tmp_path):
    folder = tmp_path / "a"
    shutil.copytree(adapters["utility"], folder)
    expected = read_adapter(folder)
    (folder / "adapter_model.safetensors").rename(tmp_path / "weights")
    torch.save(load_file(tmp_path / "weights"), folder / "adapter_model.bin")
    found = read_adapter(folder)
    assert all(torch.equal(found.pairs[name].dense(), pair.dense()) for name, pair in expected.pairs.items())
    for content in ({"x": Fraction(1, 2)}, [torch.ones(2)], {1: torch.ones(2)}, {"x": torch.eye(2).to_sparse()}):
        torch.save(content, folder / "adapter_model.bin")
        with pytest.raises(InputError, match=r"adapter_model\.bin: not a (readable file of PyTorch|mapping from)"):
            read_adapter(folder)
    for content in (b"nonsense", bytes(range(256)), b""):
        (folder / "adapter_model.bin").write_bytes(content)
        with pytest.raises(InputError, match=r"adapter_model\.bin: not a readable file"):
            read_adapter(folder)


def test_the_kind_of_model_is_kept(adapters, tmp_path):
    folder = tmp_path / "a"
    shutil.copytree(adapters["utility"], folder)
    config = json.loads((folder / "adapter_config.json").read_text()) | {"task_type": "SEQ_2_SEQ_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    merge(utility=str(folder), output=str(tmp_path / "m"))
    assert json.loads((tmp_path / "m" / "adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"


def test_a_module_whose_name_ends_another_is_not_taken_for_it(tmp_path):
    inner = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Linear(6, 5), torch.nn.Linear(6, 5)])})
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Linear(6, 5)]), "vision": inner})
    draw = torch.Generator().manual_seed(0)
    pairs = {
        name: LowRankPair(torch.randn(rank, 6, generator=draw), torch.randn(5, rank, generator=draw))
        for name, rank in (("layers.0", 2), ("vision.layers.0", 3))
    }
    write_adapter(tmp_path / "a", pairs, base="x/y", manifest={}, seen=frozenset(), card="c")
    for name, pair in read_adapter(tmp_path / "a").pairs.items():
        torch.testing.assert_close(pair.dense(), pairs[name].dense())
    config = LoraConfig.from_pretrained(str(tmp_path / "a"))
    config.task_type = None
    peft = PeftModel.from_pretrained(model, str(tmp_path / "a"), config=config)
    found = {n.removeprefix("base_model.model."): m for n, m in peft.named_modules() if hasattr(m, "get_delta_weight")}
    assert set(found) == set(pairs)
    for name, layer in found.items():
        torch.testing.assert_close(layer.get_delta_weight("default"), pairs[name].dense().float())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_full_rank_adapters_are_inspected_given_the_base(tmp_path, capsys):
    from src.cli import main
    from src.merge.stage import merge

    save_dora(tmp_path / "base", tmp_path / "a")
    base = ["--base", str(tmp_path / "base")]
    merge(utility=str(tmp_path / "a"), base=base[1], rank=3, warn_below=0.0, output=str(tmp_path / "m"))
    given = ["inspect", str(tmp_path / "a"), str(tmp_path / "m")]
    assert main([*given, "--output", str(tmp_path / "i")]) == 2
    assert "--base" in capsys.readouterr().err
    assert main([*given, *base, "--output", str(tmp_path / "i")]) == 0
    found = json.loads((tmp_path / "i" / "inspect.json").read_text())
    with open_base(base[1]) as weights:
        one = {name: delta.dense() for name, delta in read_adapter(tmp_path / "a", weights).updates.items()}
    two = {name: pair.dense() for name, pair in read_adapter(tmp_path / "m").pairs.items()}
    flat = [torch.cat([each[name].flatten() for name in one]) for each in (one, two)]
    assert found["adapters"][0]["norm"] == pytest.approx(flat[0].norm().item())
    assert found["cosines"][0][1] == pytest.approx(torch.cosine_similarity(*flat, dim=0).item())
    assert found["columns"][0][1] == pytest.approx(1.0)  # the best of rank 3 lies in the leading directions
    for name, delta in one.items():
        energies = torch.linalg.svdvals(delta).square()
        leading = int((energies.cumsum(0) < 0.99 * energies.sum()).sum()) + 1
        assert len(found["angles"][0]["columns"][name]) == min(3, leading)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_full_rank_adapter_can_hold_the_alignment(tmp_path):
    from src.merge.safe_lora import SafeLora

    save_dora(tmp_path / "base", tmp_path / "a")
    base = str(tmp_path / "base")
    given = {"utility": str(tmp_path / "a"), "base": base, "rank": 4, "warn_below": 0.0}
    merge(**given, method=SafeLora(aligned=str(tmp_path / "a"), base=base), output=str(tmp_path / "aligned"))
    merge(**given, safety=str(tmp_path / "a"), method=SafeLora(), output=str(tmp_path / "safety"))
    one, two = (read_adapter(tmp_path / name).pairs for name in ("aligned", "safety"))
    for name, pair in one.items():
        torch.testing.assert_close(pair.dense(), two[name].dense())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_full_rank_adapters_are_refused_where_factors_are_needed(tmp_path):
    from src.merge.combinations.task_arithmetic import TaskArithmetic
    from src.merge.combinations.tsv_m import TsvM
    from src.merge.safe_lora import SafeLora
    from src.merge.stage import merge

    save_dora(tmp_path / "base", tmp_path / "a")
    given = {"utility": str(tmp_path / "a"), "base": str(tmp_path / "base"), "output": str(tmp_path / "m"), "rank": 4}
    with pytest.raises(InputError, match="TsvM works in the factors"):
        merge(**given, combine=TsvM())
    with pytest.raises(InputError, match="method TsvM needs low-rank updates"):
        merge(**given, safety=str(tmp_path / "a"), method=TsvM())
    for method in (TaskArithmetic(), SafeLora()):
        merge(**given, safety=str(tmp_path / "a"), method=method, warn_below=0.0, overwrite=True)


@pytest.mark.parametrize(
    ("read", "absent", "unfetched"),
    [
        (read_adapter, "{}: no such directory; expected a PEFT adapter", "{}: neither an adapter directory nor a hub"),
        (
            lambda name: open_base(name).__enter__(),
            "base {}: no such directory; name one",
            "base {}: no such directory, and",
        ),
    ],
)
def test_a_name_that_is_neither_here_nor_on_the_hub_is_one_line(monkeypatch, read, absent, unfetched):
    def fetch(name, allow_patterns):
        raise OSError("no route\n  to it" + "x" * 200)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    for name, said in (("a/b/c", absent), ("someone/an-expert", unfetched)):
        with pytest.raises(InputError, match=f"^{said.format(name)}") as raised:
            read(name)
    assert str(raised.value).endswith(" now (no route to it" + "x" * 106 + ")")


def test_a_hub_id_is_fetched_and_read(adapters, tmp_path, monkeypatch):
    asked = []

    def fetch(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(adapters["utility"])

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    merge(
        utility="someone/an-expert", safety=str(adapters["safety"]), method=TaskArithmetic(), output=str(tmp_path / "m")
    )
    merge(
        utility=str(adapters["utility"]),
        safety=str(adapters["safety"]),
        method=TaskArithmetic(),
        output=str(tmp_path / "n"),
    )
    assert asked[0][0] == "someone/an-expert"
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(asked[0][1])
    assert {"manifest.json", "seen_prompts.txt"} <= set(asked[0][1])
    assert len({(tmp_path / n / "adapter_model.safetensors").read_bytes() for n in "mn"}) == 1
    assert json.loads((tmp_path / "m" / "manifest.json").read_text())["utility"][0]["path"] == "someone/an-expert"
