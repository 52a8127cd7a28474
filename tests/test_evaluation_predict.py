"""Predict goes on where it was killed, takes what test has answered, and gives nothing that is not an answer."""

from src.cli import main
from src.models.evaluation import EvaluationModule
from tests.evaluations import answers, evaluate, flags, suites_of_every_kind
from tests.test_evaluation_resume import computed, everything  # noqa: F401 - computed is a fixture


def predicted(base, folder, suites, output, *more):
    return main(["predict", *flags(base, folder, suites, output, *more)[1:]])


def test_a_killed_predict_redoes_only_what_is_missing(base, tmp_path, computed):  # noqa: F811
    suites = suites_of_every_kind(tmp_path)
    assert predicted(base, tmp_path, suites, tmp_path / "whole") == 0
    total, computed["rows"], computed["stop"] = computed["rows"], 0, 20
    assert predicted(base, tmp_path, suites, tmp_path / "out") == 2
    first, computed["rows"], computed["stop"] = computed["rows"], 0, None
    assert 0 < first < total
    assert predicted(base, tmp_path, suites, tmp_path / "out") == 0
    assert computed["rows"] + first == total
    assert everything(tmp_path / "out") == everything(tmp_path / "whole")
    suites[4]["max_new_tokens"] = 5  # the suite of one row
    computed["rows"] = 0
    assert predicted(base, tmp_path, suites, tmp_path / "out", "--overwrite", "true") == 0
    assert computed["rows"] == 1


def test_predict_takes_what_test_has_answered_and_test_measures_what_predict_has_not(base, tmp_path, computed):  # noqa: F811
    suites = suites_of_every_kind(tmp_path)
    assert predicted(base, tmp_path, suites, tmp_path / "alone") == 0
    whole, computed["rows"] = evaluate(base, tmp_path, suites), 0
    assert predicted(base, tmp_path, suites, tmp_path / "out", "--overwrite", "true") == 0
    assert computed["rows"] == 0
    assert everything(tmp_path / "out") == everything(tmp_path / "alone")
    assert not any("nll" in row or "answer_nll" in row for row in answers(tmp_path / "out", "attack"))
    again = ["--overwrite", "true"]
    assert evaluate(base, tmp_path, suites, *again, output="alone") == whole
    assert computed["rows"] == 7 + 1  # attack and one have references to score; choices and code are done


def test_an_answer_that_predict_kept_is_never_a_score(base, tmp_path, monkeypatch):
    """A suite whose references are scored keeps what predict answered under a key of its own."""
    suite = suites_of_every_kind(tmp_path)[4]
    keys = {}
    plan = EvaluationModule._plan

    def looked(self):
        plan(self)
        keys[self._scores] = self._keys[0, 0]

    monkeypatch.setattr(EvaluationModule, "_plan", looked)
    evaluate(base, tmp_path, [suite])
    assert predicted(base, tmp_path, [suite], tmp_path / "out", "--overwrite", "true") == 0
    assert keys[True] != keys[False]
    evaluate(base, tmp_path, [suite | {"score": False}], "--overwrite", "true")
    assert predicted(base, tmp_path, [suite | {"score": False}], tmp_path / "out", "--overwrite", "true") == 0
    assert keys[True] == keys[False]


def test_a_report_of_results_whose_answers_predict_wrote_anew_is_one_line(base, adapters, tmp_path, capsys):
    suites = [suites_of_every_kind(tmp_path)[i] for i in (3, 4)]
    models = ["--model.adapters", str(adapters["utility"])]
    evaluate(base, tmp_path, suites, *models)
    name = str(adapters["utility"])
    report = ["report", "--results", str(tmp_path / "out"), "--expert", name, "--output", str(tmp_path / "report")]
    assert main(report) == 0
    assert (tmp_path / "report" / "tradeoff.json").is_file()
    assert predicted(base, tmp_path, suites, tmp_path / "out", *models, "--overwrite", "true") == 0
    assert main([*report, "--overwrite", "true"]) == 2
    assert "its answers are not graded, though metrics.json counts them" in capsys.readouterr().err
    evaluate(base, tmp_path, suites, *models, "--overwrite", "true")
    assert main([*report, "--overwrite", "true"]) == 0
