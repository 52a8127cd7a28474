"""Interrupted and repeated evaluations: only what is missing is computed, and nothing stale is served."""

import json
import signal

import pytest

from src.cli import main
from src.models.evaluation import EvaluationModule
from tests.evaluations import answers, evaluate, flags, metrics, suites_of_every_kind
from tests.test_pipeline import run_processes
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
    ],
)
def test_another_model_template_or_length_is_computed_anew(base, adapters, tmp_path, computed, change):
    suite = {"name": "a", "kind": "benign", "rows": str(write_rows(tmp_path / "a.jsonl", 5, what="a"))}
    evaluate(base, tmp_path, [suite])
    change = [str(adapters["utility"]) if word == "utility" else word for word in change]
    evaluate(base, tmp_path, [suite], "--overwrite", "true", *change)
    assert computed["rows"] == 10


def test_another_base_is_computed_anew(base, tmp_path, computed):
    from tests.tiny import make_base

    suite = {"name": "a", "kind": "benign", "rows": str(write_rows(tmp_path / "a.jsonl", 5, what="a"))}
    evaluate(base, tmp_path, [suite])
    evaluate(make_base(tmp_path / "base", seed=8), tmp_path, [suite], "--overwrite", "true")
    assert computed["rows"] == 10


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
    run_processes([*several, "--trainer.devices", str(devices)])
    assert metrics(tmp_path / "several") == metrics(tmp_path / "one")
    assert everything(tmp_path / "several") == everything(tmp_path / "one")
    record = json.loads((tmp_path / "several" / "metrics.json").read_text())
    assert record["models"][0]["suites"]["one"]["exact_match"]["n"] == 1


def test_sampling_from_sharded_weights_is_refused(base, tmp_path, monkeypatch, capsys):
    suites = [one for one in suites_of_every_kind(tmp_path) if one["name"] in ("mmlu", "code")]
    monkeypatch.setattr(EvaluationModule, "_sharded", True)
    assert main(flags(base, tmp_path, suites, tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert "suite code: answers are sampled (temperature 1), which weights sharded over processes do not allow" in error
    assert not (tmp_path / "out" / "metrics.json").exists()
