"""Bases that cannot be built, and adapters that know their base by another name: one line each, and a way out."""

import json
import shutil
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import save_file

from src.adapters.base_weights import open_base
from src.adapters.checks import check_base, check_compatible, same_base_name
from src.adapters.peft_files import read_adapter
from src.cli import main
from src.errors import InputError
from src.experiments.plain_settings import plain_base
from src.judges.model_files import model_content
from src.models.base import BaseSpec, check_trained_on, load_model, load_tokenizer, model_without_weights
from tests.commands import base_flags, fisher_flags, fit_flags

ELSEWHERE = "unsloth/tiny-bnb-4bit"


def configured(folder, copy, **settings):
    """A copy of a directory whose configuration has other settings."""
    shutil.copytree(folder, copy)
    config = next(path for path in (copy / "adapter_config.json", copy / "config.json") if path.exists())
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    return copy


@pytest.fixture
def renamed(adapters, tmp_path):
    """The adapters, the safety adapter knowing its base by another name."""
    return adapters | {
        "safety": configured(adapters["safety"], tmp_path / "renamed", base_model_name_or_path=ELSEWHERE)
    }


def not_loaded(monkeypatch):
    monkeypatch.setattr("src.models.fisher.load_model", lambda _: pytest.fail("the base was loaded"))


CACHED = (
    "/home/a/.cache/huggingface/hub/models--Meta-Llama--Llama-3.1-8B/snapshots/0e9e39f249a16976918f6564b8830bc894c89659"
)


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("meta-llama/Llama-3.1-8B", "Meta-Llama/llama-3.1-8b", True),
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B/", True),
        ("meta-llama/Llama-3.1-8B", CACHED, True),
        (CACHED + "/", CACHED.replace("/home/a", "/root"), True),
        ("gpt2", "/x/models--gpt2/snapshots/607a30d783dfa663caf39e06633721c8d4cfcd7e", True),
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-70B", False),
        ("mistralai/Llama-3.1-8B", CACHED, False),
        ("/data/Llama", "/data/llama", False),
        ("/data/one/Llama", "/data/two/Llama", False),
        ("pkg://one/Model.gguf", "pkg://one/model.gguf", False),
        ("", "gpt2", False),
        ("", "", True),
    ],
)
def test_spellings_of_a_base(first, second, same):
    assert same_base_name(first, second) is same
    assert same_base_name(second, first) is same


def test_directories_that_exist_are_told_by_their_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("Tiny", "tiny", "cache/models--org--tiny/snapshots/abc"):
        (tmp_path / name).mkdir(parents=True)
    assert not same_base_name("Tiny", "tiny")
    assert same_base_name("tiny/", str(tmp_path / "tiny"))
    assert same_base_name(str(tmp_path / "cache/models--org--tiny/snapshots/abc"), "org/tiny")


def test_a_base_that_only_its_directorys_name_tells_is_said_once(adapters, tmp_path, caplog):
    (tmp_path / "Tiny").mkdir()
    adapter = replace(read_adapter(adapters["safety"]), base="/elsewhere/Tiny", manifest={})
    with caplog.at_level("INFO"):
        for _ in range(2):
            check_base(adapter, str(tmp_path / "Tiny"), "0" * 64, what="base.name")
    line = f"its base '/elsewhere/Tiny' is taken to be '{tmp_path / 'Tiny'}', by the directory's name"
    assert [message.endswith(line) for message in caplog.messages] == [True]
    with pytest.raises(InputError, match=r"base\.name is '.*tiny'"):
        check_base(adapter, str(tmp_path / "tiny"), None, what="base.name")


def test_another_name_of_the_base_is_refused_before_it_is_loaded(base, renamed, rows, tmp_path, monkeypatch, capsys):
    not_loaded(monkeypatch)
    for more in ([], ["--dry_run", "true"]):
        assert main(fisher_flags(base, renamed, rows, tmp_path / "out", *more)) == 2
        line = capsys.readouterr().err.strip()
        assert f"{renamed['safety']}: trained on the base '{ELSEWHERE}'; base.name is '{base}'" in line
        assert "base_model_name_or_path in its adapter_config.json" in line
        assert line.endswith(f"or give --model.base.aliases '[\"{ELSEWHERE}\"]'")
        assert "\n" not in line


def test_an_alias_of_the_base_measures_and_merges_the_same(base, adapters, renamed, rows, tmp_path):
    aliases = ["--model.base.aliases", f'["{ELSEWHERE}"]']
    for name, given, more in (("plain", adapters, []), ("alias", renamed, aliases)):
        assert main(fisher_flags(base, given, rows, tmp_path / name, *more)) == 0
        named = ["--utility", str(given["utility"]), "--safety", str(given["safety"])]
        flags = [*named, "--method", "Sst", "--fisher", str(tmp_path / name), "--output", str(tmp_path / f"{name}-out")]
        assert main(["merge", *flags, *(["--aliases", f'["{ELSEWHERE}"]'] if more else [])]) == 0
    one, two = (read_adapter(tmp_path / f"{name}-out") for name in ("plain", "alias"))
    assert one.base == two.base == str(base)
    assert all(torch.equal(one.pairs[name].dense(), two.pairs[name].dense()) for name in one.pairs)


@pytest.mark.parametrize("command", ["fit", "test"])
def test_an_alias_of_the_base_trains_and_tests(base, renamed, rows, tmp_path, monkeypatch, capsys, command):
    if command == "fit":
        flags = fit_flags(base, rows, tmp_path / "out", "--model.core", str(renamed["safety"]))
    else:
        suite = {"name": "asks", "kind": "harmful", "rows": str(rows["eval_harmful"]), "max_new_tokens": 4}
        given = ["--model.adapters", f"[{renamed['safety']}]", f"--data.suites={json.dumps([suite])}"]
        flags = ["test", *base_flags(base), *given, "--output", str(tmp_path / "out")]
    module = {"fit": "expert", "test": "evaluation"}[command]
    with monkeypatch.context() as patched:
        patched.setattr(f"src.models.{module}.load_model", lambda _: pytest.fail("the base was loaded"))
        assert main(flags) == 2
    assert f"give --model.base.aliases '[\"{ELSEWHERE}\"]'" in " ".join(capsys.readouterr().err.split())
    assert main([*flags, "--model.base.aliases", f'["{ELSEWHERE}"]']) == 0


def test_a_merge_names_its_way_out(renamed, tmp_path, capsys):
    given = ["--utility", str(renamed["utility"]), "--safety", str(renamed["safety"]), "--method", "TaskArithmetic"]
    assert main(["merge", *given, "--output", str(tmp_path / "out")]) == 2
    line = capsys.readouterr().err.strip()
    assert f"that of {renamed['utility']} is" in line
    assert "base_model_name_or_path in its adapter_config.json" in line
    assert line.endswith(f"or give --aliases '[\"{ELSEWHERE}\"]'")
    assert main(["inspect", str(renamed["utility"]), str(renamed["safety"])]) == 2
    assert main(["inspect", str(renamed["utility"]), str(renamed["safety"]), "--aliases", f'["{ELSEWHERE}"]']) == 0


@pytest.mark.parametrize(
    ("module", "keys"),
    [
        ("model.language_model.layers.0.up", ["language_model.model.layers.0.up"]),
        ("model.layers.0.up", ["model.language_model.layers.0.up"]),
        ("model.layers.0.up", ["language_model.model.layers.0.up"]),
        ("lm_head", ["language_model.lm_head"]),
        ("model.layers.0.up", ["model.layers.0.up", "model.language_model.layers.0.up"]),
        ("transformer.h.0.up", ["h.0.up", "language_model.transformer.h.0.up"]),
    ],
)
def test_a_weight_is_found_by_the_name_that_files_of_its_model_have(tmp_path, module, keys):
    """The first key is the one meant."""
    stored = {f"{key}.weight": torch.zeros(1) for key in ["model.vision_tower.layers.0.up", *keys]}
    save_file(stored, tmp_path / "model.safetensors")
    with open_base(str(tmp_path)) as weights:
        assert weights.key_of(module) == f"{keys[0]}.weight"
        assert weights.key_of("model.layers.1.up") is None


def test_an_alias_lets_no_third_base_in(adapters, renamed, tmp_path):
    third = configured(adapters["utility"], tmp_path / "third", base_model_name_or_path="other/base")
    mixed = [read_adapter(renamed["safety"]), read_adapter(adapters["utility"]), read_adapter(third)]
    check_compatible(mixed[:2], [ELSEWHERE])
    with pytest.raises(InputError, match="third: trained on the base 'other/base'"):
        check_compatible(mixed, [ELSEWHERE])


def test_a_fingerprint_decides_over_names_once_the_base_is_loaded(base, renamed, tmp_path):
    known = configured(renamed["safety"], tmp_path / "known")
    manifest = json.loads((known / "manifest.json").read_text())
    (known / "manifest.json").write_text(json.dumps(manifest | {"base": {"name": "x", "fingerprint": "f"}}))
    adapter, spec, quantised = read_adapter(known), BaseSpec(str(base)), BaseSpec(str(base), quantization="4bit")
    check_trained_on([adapter], spec)
    check_trained_on([adapter], spec, "f")
    with pytest.raises(InputError, match="other weights"):
        check_trained_on([adapter], BaseSpec(str(base), aliases=[ELSEWHERE]), "g")
    # A quantised base has no fingerprint: its name decides, and is known before.
    for one, fingerprint in ((quantised, None), (spec, "")):
        with pytest.raises(InputError, match="base_model_name_or_path"):
            check_trained_on([adapter], one, fingerprint)


def test_an_unset_alias_is_no_part_of_a_studys_keys():
    assert plain_base(BaseSpec("a")) == {"name": "a", "dtype": "float32"}
    assert plain_base(BaseSpec("a", aliases=["b"]))["aliases"] == ["b"]


@pytest.mark.skipif(bool(find_spec("flash_attn")), reason="flash_attn is here")
@pytest.mark.parametrize("build", [load_model, model_without_weights])
def test_attention_whose_package_is_missing_is_one_line(base, build):
    with pytest.raises(InputError) as caught:
        build(BaseSpec(str(base), attention="flash_attention_2"))
    assert str(caught.value).startswith(f"base.name {base}: ")
    assert "cannot be loaded with base.attention flash_attention_2 (" in str(caught.value)
    assert "\n" not in str(caught.value)


QUANTISED = {
    "optimum": {"quant_method": "gptq", "bits": 4},
    "gptqmodel": {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
}
"""Configurations of bases by a package that each needs."""


@pytest.mark.parametrize("package", QUANTISED)
@pytest.mark.filterwarnings("ignore")
def test_a_quantised_base_whose_package_is_missing_is_one_line(base, tmp_path, package):
    if find_spec(package):
        pytest.skip(f"{package} is here")
    folder = configured(base, tmp_path / "base", quantization_config=QUANTISED[package])
    with pytest.raises(InputError, match=r"^base\.name .*: the model cannot be loaded \(") as caught:
        load_model(BaseSpec(str(folder)))
    assert "attention" not in str(caught.value)


@pytest.mark.parametrize("error", [ImportError, KeyError, RuntimeError])
def test_whatever_transformers_lacks_is_one_line(base, monkeypatch, error):
    def fail(*_, **__):
        raise error("needs\nsentencepiece")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", fail)
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", fail)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", fail)
    for build in (load_tokenizer, load_model, model_without_weights):
        with pytest.raises(InputError, match=r"^base\.name .* cannot be loaded \(.*needs"):
            build(BaseSpec(str(base)))
    with pytest.raises(InputError, match=r"^judge no/such: the model cannot be loaded \(.*needs"):
        model_content("no/such", None)


@pytest.mark.parametrize("name", ["pkg://no.such/file.gguf", "pkg:///file.gguf"])
def test_a_package_that_is_none_is_one_line(name):
    with pytest.raises(InputError, match=r"^base\.name pkg://.*is not installed"):
        load_model(BaseSpec(name))
