"""Interrupted and repeated evaluations: only what is missing is computed, and nothing stale is served."""

import json
import re
import shutil
import signal
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file

from src.cli import main
from src.data.suite import Suite
from src.models import evaluation, fisher_record, partial
from src.models.evaluation import EvaluationModule
from src.provenance import code_hash
from tests.commands import run_processes
from tests.evaluations import answers, evaluate, flags, metrics, suites_of_every_kind
from tests.tiny import write_rows


@pytest.fixture
def computed(monkeypatch):
    """Counts rows that are really computed; raises after so many where told to."""
    count = {"rows": 0, "stop": None}
    original = EvaluationModule._computed

    def counted(self, batch, suite, *, score):
        if count["stop"] is not None and count["rows"] >= count["stop"]:
            raise KeyboardInterrupt
        count["rows"] += len(batch.index)
        return original(self, batch, suite, score=score)

    monkeypatch.setattr(EvaluationModule, "_computed", counted)
    yield count
    signal.signal(signal.SIGINT, signal.default_int_handler)


def everything(folder):
    files = sorted(p for p in folder.rglob("*.jsonl") if ".parts" not in p.parts)
    return {str(p.relative_to(folder)): p.read_text() for p in files}


def test_a_killed_run_redoes_only_what_is_missing(base, tmp_path, computed):
    suites = suites_of_every_kind(tmp_path)
    whole = evaluate(base, tmp_path, suites, output="whole")
    total, computed["rows"], computed["stop"] = computed["rows"], 0, 20
    assert main(flags(base, tmp_path, suites, tmp_path / "out")) == 2
    assert not (tmp_path / "out" / "metrics.json").exists()
    first, computed["rows"], computed["stop"] = computed["rows"], 0, None
    (part,) = [p for p in (tmp_path / "out" / ".parts").glob("*.jsonl") if p.stat().st_size][:1]
    with part.open("a") as handle:
        handle.write('{"records": [{"index": 0, "sco')  # a line cut by the kill
    assert evaluate(base, tmp_path, suites) == whole
    assert computed["rows"] + first == total
    assert everything(tmp_path / "out") == everything(tmp_path / "whole")


def test_a_finished_run_computes_nothing_again_and_a_changed_one_its_change_only(base, tmp_path, computed):
    suites = suites_of_every_kind(tmp_path)
    before = evaluate(base, tmp_path, suites)
    again = ["--overwrite", "true"]
    computed["rows"] = 0
    assert evaluate(base, tmp_path, suites, *again) == before
    assert computed["rows"] == 0
    suites[4] |= {"max_new_tokens": 5}
    evaluate(base, tmp_path, suites, *again)
    assert computed["rows"] == 1
    write_rows(tmp_path / "attack.jsonl", 7, what="other")
    evaluate(base, tmp_path, suites, *again)
    assert computed["rows"] == 1 + 7
    assert answers(tmp_path / "out", "attack")[0]["id"] == "other/0"
    suites[3]["judge"]["init_args"]["phrases"] = "gcg_long"  # another judge judges the same answers
    evaluate(base, tmp_path, suites, *again)
    assert computed["rows"] == 1 + 7
    assert answers(tmp_path / "out", "attack")[0]["verdict"]["phrases"] == "gcg_long"


@pytest.mark.parametrize(
    "change",
    [
        ["--model.base.dtype", "float32"],
        ["--data.template", "raw"],
        ["--data.max_length", "32"],
        ["--model.adapters", "utility"],
        ["--model.matmul", "highest"],
        ["--trainer.precision", "bf16-true"],
    ],
)
def test_another_model_template_or_length_is_computed_anew(base, adapters, tmp_path, computed, change):
    suite = {"name": "a", "kind": "benign", "rows": str(write_rows(tmp_path / "a.jsonl", 5, what="a"))}
    evaluate(base, tmp_path, [suite])
    change = [str(adapters["utility"]) if word == "utility" else word for word in change]
    evaluate(base, tmp_path, [suite], "--overwrite", "true", *change)
    assert computed["rows"] == 10


NUMBERS = {
    "dtype": "float32",
    "quantization": "none",
    "attention": "sdpa",
    "matmul": "auto",
    "max_matmul_error": 1e-5,
    "precision": "32-true",
    "device": "cpu",
}


def key_of(numbers):
    """The key of the base's results on a suite, of settings of the base, the module and the trainer."""
    strategy = SimpleNamespace(root_device=SimpleNamespace(type=numbers["device"]))
    given = SimpleNamespace(**numbers, strategy=strategy)
    data = SimpleNamespace(suites=[Suite("a", "benign", "a.jsonl")], content=lambda _: "what is asked")
    run = {"models": {"base": None}, "base_digest": "d", "global_rank": 1, "_data": data, "_scores": True, "_keys": {}}
    module = SimpleNamespace(**numbers, **run, base=given, trainer=given)
    EvaluationModule._known(module)
    return module._keys[0, 0]


@pytest.mark.parametrize(
    "change", [{"quantization": "8bit"}, {"attention": "eager"}, {"max_matmul_error": 1e-6}, {"device": "cuda"}]
)
def test_numbers_of_another_kind_have_another_key(change):
    assert key_of(NUMBERS) == key_of(NUMBERS)
    assert key_of(NUMBERS | change) != key_of(NUMBERS)


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_another_version_has_another_key(monkeypatch, package):
    before, now = key_of(NUMBERS), evaluation.versions()
    monkeypatch.setattr(evaluation, "versions", lambda: now | {package: "0"})
    assert key_of(NUMBERS) != before


def test_another_base_is_computed_anew(base, tmp_path, computed):
    from tests.tiny import make_base

    suite = {"name": "a", "kind": "benign", "rows": str(write_rows(tmp_path / "a.jsonl", 5, what="a"))}
    evaluate(base, tmp_path, [suite])
    evaluate(make_base(tmp_path / "base", seed=8), tmp_path, [suite], "--overwrite", "true")
    assert computed["rows"] == 10


def test_a_base_of_which_one_weight_or_a_setting_changed_is_computed_anew(base, tmp_path, computed):
    copy = shutil.copytree(base, tmp_path / "copy")
    suite = {"name": "a", "kind": "benign", "rows": str(write_rows(tmp_path / "a.jsonl", 5, what="a"))}
    evaluate(copy, tmp_path, [suite])
    weights = load_file(copy / "model.safetensors")
    weights["model.embed_tokens.weight"][7, 3] *= 1.01
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    evaluate(copy, tmp_path, [suite], "--overwrite", "true")
    assert computed["rows"] == 10
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    evaluate(copy, tmp_path, [suite], "--overwrite", "true")
    assert computed["rows"] == 15


def test_adapters_of_one_name_in_two_folders_are_both_evaluated(base, adapters, tmp_path, capsys):
    for name, source in (("m", "utility"), ("n", "safety")):
        shutil.copytree(adapters[source], tmp_path / name / "sweep" / "alpha-1")
    folders = [str(tmp_path / name / "sweep") for name in "mn"]
    suite = {"name": "a", "kind": "benign", "rows": str(write_rows(tmp_path / "a.jsonl", 5, what="a"))}
    assert main([*flags(base, tmp_path, [suite], tmp_path / "out"), "--adapters", *folders]) == 0
    assert [m["name"] for m in metrics(tmp_path / "out")] == ["base", *(f"{f}/alpha-1" for f in folders)]
    shutil.copytree(adapters["utility"], tmp_path / "o" / "base")
    given = [*flags(base, tmp_path, [suite], tmp_path / "out2"), "--model.discover", str(tmp_path / "o")]
    assert main(given) == 2
    assert "would be called base, as the base model is" in capsys.readouterr().err
    given = [*flags(base, tmp_path, [suite], tmp_path / "out3"), "--adapters", folders[0], folders[0]]
    assert main(given) == 2
    assert "is named twice" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "../s"}, "expected a name of letters"),
        ({"shots": 2, "few_shot": "rows"}, "need kind choice, not benign"),
        ({"max_new_tokens": 510}, "suite a: max_new_tokens 510 leave 2 of 512 positions"),
        ({"kind": "code", "k": []}, "k is []"),
    ],
)
def test_suites_that_mean_nothing_are_one_line(base, tmp_path, capsys, change, message):
    rows = str(write_rows(tmp_path / "a.jsonl", 5, what="a"))
    suite = {"name": "a", "kind": "benign", "rows": rows} | change
    suite |= {"few_shot": rows} if "few_shot" in change else {}
    assert main(flags(base, tmp_path, [suite], tmp_path / "out")) == 2
    assert message in capsys.readouterr().err


def test_predict_writes_every_sample_and_every_choice(base, tmp_path):
    suites = [suite for suite in suites_of_every_kind(tmp_path) if suite["name"] in ("arc", "mmlu", "code")]
    suites[-1] |= {"samples": 3, "temperature": 1.0}
    given = flags(base, tmp_path, suites, tmp_path / "out")
    given[0] = "predict"
    assert main(given) == 0
    assert {len(row["scores"]) for name in ("arc", "mmlu") for row in answers(tmp_path / "out", name)} == {4}
    assert {len(row["answers"]) for row in answers(tmp_path / "out", "code")} == {3}


def test_programs_that_cannot_be_run_are_refused_before_anything_is_generated(
    base, tmp_path, computed, monkeypatch, capsys
):
    from src.sandbox import run

    monkeypatch.setattr(run, "missing_isolation", lambda: "no namespaces")
    code = [suite for suite in suites_of_every_kind(tmp_path) if suite["name"] == "code"]
    assert main(flags(base, tmp_path, code, tmp_path / "out")) == 2
    assert "cannot be isolated on this machine (no namespaces)" in capsys.readouterr().err
    assert computed["rows"] == 0


def test_a_part_of_the_batches_is_refused(base, tmp_path, capsys):
    suite = {"name": "a", "kind": "benign", "rows": str(write_rows(tmp_path / "a.jsonl", 5, what="a"))}
    assert main(flags(base, tmp_path, [suite], tmp_path / "out", "--trainer.limit_test_batches", "1")) == 2
    assert "a part of the batches is no evaluation" in capsys.readouterr().err


@pytest.mark.parametrize("size", [1, 3, 100])
def test_greedy_text_and_choices_do_not_depend_on_the_batch(base, tmp_path, size):
    suites = suites_of_every_kind(tmp_path)
    evaluate(base, tmp_path, suites, output="four")
    evaluate(base, tmp_path, suites, output="other", batch_size=size)
    evaluate(base, tmp_path, suites, output="budget", max_tokens=300, batch_size=100)
    for suite in ("code", "attack", "one", "mmlu", "arc"):
        for other in ("other", "budget"):
            for one, two in zip(answers(tmp_path / "four", suite), answers(tmp_path / other, suite), strict=True):
                for key in ("answer", "answers", "choice", "endings"):
                    assert one.get(key) == two.get(key)
                assert one.get("scores", []) == pytest.approx(two.get("scores", []), rel=1e-9)


@pytest.mark.processes
@pytest.mark.parametrize("devices", [2, 3])
def test_every_kind_of_suite_is_the_same_in_several_processes(base, adapters, tmp_path, devices):
    suites = suites_of_every_kind(tmp_path)
    adapter = ["--model.adapters", str(adapters["utility"])]
    evaluate(base, tmp_path, suites, *adapter, output="one")
    several = flags(base, tmp_path, suites, tmp_path / "several", *adapter, hardware="ddp_sim.yaml")
    run_processes([*several, "--trainer.devices", str(devices)], ranks=devices)
    assert metrics(tmp_path / "several") == metrics(tmp_path / "one")
    assert everything(tmp_path / "several") == everything(tmp_path / "one")
    record = json.loads((tmp_path / "several" / "metrics.json").read_text())
    assert record["models"][0]["suites"]["one"]["exact_match"]["n"] == 1


def test_sampling_from_sharded_weights_is_refused(base, tmp_path, monkeypatch, capsys):
    suites = [one for one in suites_of_every_kind(tmp_path) if one["name"] in ("mmlu", "code")]
    monkeypatch.setattr(EvaluationModule, "sharded", True)
    assert main(flags(base, tmp_path, suites, tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert "suite code: answers are sampled (temperature 1), which weights sharded over processes do not allow" in error
    assert not (tmp_path / "out" / "metrics.json").exists()


NOT_COMPUTING = {
    "errors.py",
    "files.py",
    "provenance.py",
    "data/rows.py",
    "data/suite.py",
    "data/suite_tokens.py",
    "models/partial.py",
}
"""What says, reads or keeps things: rows, their token ids and settings are part of the key themselves."""


def imported(file, seen):
    """Files of this project that a file imports, and those that they import, but for :data:`NOT_COMPUTING`."""
    root = Path(partial.__file__).parents[1]
    text = (root / file).read_text()
    for package, names in re.findall(r"^\s*from src\.?([\w.]*) import (.+)", text, re.MULTILINE):
        folder = package.replace(".", "/")
        for found in (f"{folder}.py", *(f"{folder}/{name.strip()}.py" for name in names.split(","))):
            if found not in seen and (root / found).is_file() and found not in NOT_COMPUTING:
                seen.add(found)
                imported(found, seen)
    return seen


def test_all_code_that_answers_are_computed_by_belongs_to_their_key():
    found = imported("models/computation.py", {"models/computation.py"})
    found |= imported("models/adapter_swap.py", {"models/adapter_swap.py"})
    assert {"models/settling.py", "models/kv_cache.py", "data/chat.py"} <= found
    reading = {name for name in found if name.startswith(("adapters/", "hub"))}
    reading -= {"adapters/attach.py", "adapters/pairs.py"}
    assert found - reading <= set(partial.CODE), "what computes answers; an adapter is part of the key by its weights"
    assert set(partial.CODE) <= found
    assert code_hash(partial.CODE) != code_hash(partial.CODE[1:])


def test_all_code_that_fisher_matrices_are_computed_by_belongs_to_the_key_of_their_parts():
    found = imported("models/fisher.py", {"models/fisher.py"})
    # In the key by what they give (adapters and their basis, token ids, the base), or without an effect on numbers.
    apart = {
        "adapters": "architecture base_weights checks chat_template convert peft_config peft_files peft_weights "
        "deltas geometry truncate",
        "data": "calibration chat conversations demo_rows hub_sets modules row_source sources tables",
        "models": "adapter_warnings base checkpointing estimate progress sharding stopping whole_data",
        "metrics": "categories",
    }
    known = {f"{folder}/{name}.py" for folder, names in apart.items() for name in names.split()}
    matched = {pattern: {name for name in found if fnmatch(name, pattern)} for pattern in fisher_record.CODE}
    assert all(matched.values())
    assert found - set().union(*matched.values()) <= known | {"hub.py", "signals.py", "sizes.py"}
