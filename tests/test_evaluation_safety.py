"""The shipped safety evaluation, on small files of the hub's schemas with a tiny judge: four numbers together."""

from pathlib import Path

import pytest
import yaml

from src.cli import main
from src.data.row_source import as_sources
from src.judges.refusal import Refusal
from src.metrics.judging import Judgement
from src.metrics.refusal import is_refusal
from src.models.computation import Computation
from src.models.grading import Graded, safety_line, safety_summary, utility_line
from tests.evaluations import answers, flags, metrics, write_jsonl
from tests.test_evaluation_sources import PROMPTS
from tests.test_judges import make_classifier

ROOT = Path(__file__).resolve().parents[1]
SAID = ["I'm sorry, but I can't help with that.", "Sure, here is how: step one.", ""]


def local_suites(folder):
    """The suites of ``test_safety.yaml``: each mapping reads three rows of its schema, and the judge is tiny."""
    suites = yaml.safe_load((ROOT / "configs/test_safety.yaml").read_text())["data"]["suites"]
    judge = make_classifier(folder / "judge")
    for suite in suites:
        name = suite["rows"].removesuffix(".yaml")
        (source,) = as_sources(suite["rows"])
        record = PROMPTS[name][0]
        own = [{"prompt": f"{name} {i}", "id": i} for i in range(3)]
        fields = {key: "prompt" if value == "p" else key.replace("Index", "id") for key, value in record.items()}
        rows = [{key: each.get(fields[key], value) for key, value in record.items()} for each in own]
        source.path, source.split = str(write_jsonl(folder / f"{name}.jsonl", rows)), "train"
        suite["rows"] = vars(source)
        if "judge" in suite:
            settings = suite["judge"]["init_args"]
            assert settings["name"] == "LibrAI/longformer-harmful-ro"
            assert suite["max_new_tokens"] == 512
            suite["max_new_tokens"] = 64  # the tiny base has 512 positions in all
            suite["judge"] = suite["judge"] | {"init_args": settings | {"name": judge}}
    return suites


def test_the_shipped_safety_evaluation_shows_its_four_numbers_together(base, tmp_path, monkeypatch, capsys):
    def answered(self, suite, tokens, batch):
        return [{"answer": SAID[i], "unfinished": False} for i in batch.index.tolist()]

    monkeypatch.setattr(Computation, "answers", answered)
    suites = local_suites(tmp_path)
    assert main(flags(base, tmp_path, suites, tmp_path / "out")) == 0
    (model,) = metrics(tmp_path / "out")
    kinds = {kind: [one["name"] for one in suites if one["kind"] == kind] for kind in {s["kind"] for s in suites}}
    assert {kind: len(names) for kind, names in kinds.items()} == {
        "harmful": 7, "jailbreak": 2, "borderline": 3, "benign": 1,
    }  # fmt: skip
    safety = model["safety"]
    counts = {name: (one["hits"], one["n"]) for name, one in safety.items()}
    judged = [row for name in kinds["harmful"] + kinds["jailbreak"] for row in answers(tmp_path / "out", name)]
    attacked = sum(row["verdict"]["positive"] and not row["collapsed"] for row in judged)
    assert counts == {
        "refusal": (9, 27), "attack_success": (attacked, 27), "over_refusal": (4, 12), "collapse": (13, 39),
    }  # fmt: skip
    parts = {kind: (one["hits"], one["n"]) for kind, one in safety["over_refusal"]["kinds"].items()}
    assert parts == {"borderline": (3, 9), "benign": (1, 3)}
    assert {kind: one["n"] for kind, one in safety["attack_success"]["kinds"].items()} == {
        "harmful": 21,
        "jailbreak": 6,
    }
    assert model["suites"]["harmbench"]["refusal"]["categories"]["illegal"]["hits"] == 1
    assert "attack_success" not in model["suites"]["dolly"]
    (line,) = [one for one in capsys.readouterr().err.splitlines() if one.startswith("base: refusal")]
    for part in (
        "refusal 0.33 (n = 27: ",
        "attack-success",
        "over-refusal 0.33 (n = 12: borderline 0.33, benign 0.33)",
    ):
        assert part in line
    assert line.endswith("collapse 0.33 (n = 39)")


def test_a_judge_of_the_shipped_configuration_reads_the_answer_alone(tmp_path):
    """Its label 1 is harmful; what it is told does not depend on the prompt."""
    from src.judges.classifier import Classifier

    (settings,) = {
        str(sorted(suite["judge"]["init_args"].items()))
        for suite in yaml.safe_load((ROOT / "configs/test_safety.yaml").read_text())["data"]["suites"]
        if "judge" in suite
    }
    assert settings == "[('name', 'LibrAI/longformer-harmful-ro'), ('positive', 1), ('text', '{answer}')]"
    judge = Classifier(make_classifier(tmp_path / "c"), positive=1, text="{answer}")
    judge.load("cpu")
    one, two = judge.judge(["a", "another prompt"], ["Step one"] * 2)
    assert one.score == pytest.approx(two.score, abs=1e-6)


def graded(kind, goals, **flags):
    records = [dict(zip(flags, each, strict=True)) for each in zip(*flags.values(), strict=True)]
    return Graded(kind, records, list(goals))


def test_a_kind_that_stands_alone_is_not_named_in_the_line():
    suites = [graded("harmful", "abcd", refused=[1, 0, 0, 0], collapsed=[0] * 4)]
    assert safety_line(safety_summary(suites)) == (
        "refusal 0.25 (n = 4), collapse 0.00 (n = 4), attack success not judged"
    )
    suites.append(graded("jailbreak", "efgh", refused=[0] * 4, attacked=[1, 1, 0, 0]))
    assert safety_line(safety_summary(suites)).startswith("refusal 0.12 (n = 8: harmful 0.25, jailbreak 0.00), attack-")


def test_suites_of_right_and_wrong_answers_have_a_line_too():
    suites = {
        "harm": {"kind": "harmful", "refusal": {"value": 0.5, "n": 4}},
        "tasks": {"kind": "utility", "exact_match": {"value": 0.625, "n": 8}, "rouge_l": {"value": 0.31}},
        "mmlu": {"kind": "choice", "accuracy": {"value": 0.25, "n": 16}},
        "programs": {"kind": "code", "pass@1": {"value": 0.0, "n": 3}},
    }
    said = "exact match on tasks 0.62 (n = 8), ROUGE-L on tasks 0.31, accuracy on mmlu 0.25 (n = 16)"
    assert utility_line(suites) == f"{said}, pass@1 on programs 0.00 (n = 3)"
    assert utility_line({"harm": suites["harm"]}) == safety_line({}) == ""


def test_a_judge_of_refusal_takes_the_place_of_the_list_in_what_is_shown(base, tmp_path, monkeypatch):
    answer = "I can't say for sure, but the answer is 42."  # the project's list takes it for a refusal
    monkeypatch.setattr(
        Computation, "answers", lambda *given: [{"answer": answer, "unfinished": False} for _ in given[-1].index]
    )
    monkeypatch.setattr(Refusal, "judge", lambda *given: [Judgement(False)] * len(given[-1]))
    rows = str(write_jsonl(tmp_path / "rows.jsonl", [{"prompt": f"p{i}"} for i in range(3)]))
    suite = {"name": "asked", "kind": "borderline", "rows": rows, "max_new_tokens": 4}
    found = {}
    for name, judge in (("list", {}), ("judge", {"judge": {"class_path": "src.judges.refusal.Refusal"}})):
        assert main(flags(base, tmp_path, [suite | judge], tmp_path / name)) == 0
        (model,) = metrics(tmp_path / name)
        found[name] = model
    assert is_refusal(answer)
    assert found["list"]["safety"]["over_refusal"]["value"] == 1.0
    assert found["judge"]["safety"]["over_refusal"]["value"] == 0.0
    (shown,) = found["judge"]["suites"].values()
    assert (shown["refusal"]["value"], shown["matched_refusal"]["value"]) == (0.0, 1.0)
