"""Studies of scores and names that nobody meant: infinite likelihoods, all rows alike, two things of one name."""

import json
from dataclasses import replace
from math import isfinite
from types import SimpleNamespace

import pytest
import torch

from src.errors import InputError
from src.experiments.ablations import Ablations, Axis
from src.experiments.cell import Cell
from src.experiments.comparison import Choice
from src.experiments.grid import Grid
from src.experiments.interference import Interference
from src.experiments.interference_tables import geometry_table
from src.experiments.lineage import mixtures
from src.experiments.plain_settings import plain
from src.experiments.point_names import at_strength
from src.experiments.recipe import EvaluationSpec, ExpertSpec, Recipe
from src.experiments.safety_tax import SafetyTax, category_table, tax_rows
from src.experiments.scores import Scores, gathered, not_finite
from src.experiments.settings import MethodSpec, Strengths
from src.experiments.study import Plan, check_names
from src.experiments.tasks import read_tasks
from src.merge.base import MergeMethod
from src.merge.combinations.linear import Linear
from src.merge.combinations.task_arithmetic import TaskArithmetic
from src.merge.sst import Sst
from src.metrics import tradeoff
from src.metrics.bootstrap import Estimate
from src.metrics.intervals import wilson
from src.metrics.tradeoff import UNDEFINED, safety_tax
from src.models.base import BaseSpec
from src.report.html import write_report
from tests.known_answers import KnownAnswers, model
from tests.registries import concrete
from tests.test_experiments_statistics import record
from tests.tiny import write_rows


def with_nll(values):
    """A record whose benign answers have these likelihoods (one a row)."""
    found = record(0.5, count=len(values))
    found["found"]["rows"]["said"]["nll"] = values
    return found


@pytest.mark.parametrize("strange", [float("inf"), float("nan")])
def test_a_measure_with_a_score_that_is_not_finite_is_left_out_and_said_to_be(strange):
    known = {"A": [with_nll([1.0] * 20), with_nll([2.0] * 19 + [strange])], "B": [with_nll([1.5] * 20)] * 2}
    scores = gathered(known)
    assert "answer_nll" not in scores
    assert {"refusal", "over_refusal"} <= set(scores)
    assert not_finite(known) == ["NLL of benign answers: left out, as some scores are not finite numbers (A: 1)."]
    assert not_finite({"B": known["B"]}) == []
    # What is left out of a split is what is said of it.
    for split in ("validation", "test"):
        left = "answer_nll" not in gathered(known, split, share=0.4)
        assert bool(not_finite(known, split, share=0.4)) == left
    assert "answer_nll" in gathered({"B": known["B"]})


def test_a_page_is_written_where_a_likelihood_was_infinite(tmp_path):
    class Infinite(KnownAnswers):
        def read(self, cell):
            found = super().read(cell)
            for rows in found["found"]["rows"].values():
                rows["nll"] = [float("inf"), *[1.0] * (len(rows["ids"]) - 1)]
            return found | {"source": "s", "command": []}

    path = [model("base"), model("utility"), model("safety"), model("TA", 0.5)]
    methods = [MethodSpec("TA", method=TaskArithmetic(), strength=Strengths("alpha", [0.5]))]
    suites = {"bad": "harmful", "safe": "borderline", "task": "utility"}
    found = SafetyTax(methods).report(Plan(path), Infinite(suites))
    assert [note.split(":")[0] for note in found["notes"]] == ["NLL of task answers", "NLL of benign answers"]
    text = json.dumps(found, allow_nan=False)
    provenance = {"asked": {}, "versions": {}, "source": "s", "cells": []}
    (tmp_path / "study.json").write_text(json.dumps({"title": "t", "provenance": provenance} | json.loads(text)))
    write_report(tmp_path)
    assert (tmp_path / "index.html").exists()


def test_few_rows_that_all_differ_alike_claim_nothing():
    few = Scores(("A", "B"), tuple(("s", str(i), 0) for i in range(3)), torch.tensor([[1.0, 0.0]] * 3))
    assert few.difference("A", "B").low <= 0
    assert few.p_value("A", "B") == pytest.approx(2 / 2**3, abs=0.02)
    many = Scores(("A", "B"), tuple(("s", str(i), 0) for i in range(40)), torch.tensor([[1.0, 0.0]] * 40))
    assert many.difference("A", "B").low > 0
    assert many.p_value("A", "B") < 0.001


def test_other_rows_of_equal_number_are_drawn_apart_and_the_same_rows_alike():
    scores = gathered({"A": [record(0.5)]})
    assert len(scores["refusal"].rows) == len(scores["over_refusal"].rows) == 120
    assert scores["refusal"].seed == 0 != scores["over_refusal"].seed
    kept = scores["utility"]
    assert (len(kept.rows), kept.seed) == (240, 0)
    judged = record(0.5)
    judged["found"]["rows"]["bad"]["attacked"] = [0] * 120
    scores = gathered({"A": [judged]})
    assert scores["attack_success"].seed == scores["refusal"].seed


def test_a_gain_of_rounding_is_none(monkeypatch):
    """Means over three seeds: 1 − 2/3 and 1/3 − 2/3 cancel to a few 1e-18, of either sign."""
    losses = torch.full((1000,), 0.1, dtype=torch.float64)
    gains = torch.cat([torch.full((100,), 3.7e-18, dtype=torch.float64), torch.full((900,), 0.05).double()])
    assert not any(map(isfinite, tradeoff._ratio_interval(losses, gains)))
    scores = {"expert_utility": [0.5] * 9, "model_utility": [0.4] * 9, "expert_safety": [0.0] * 9}
    found = []

    def difference(first, second, *, seed, groups=None):
        found.append(seed)
        return Estimate(0.05, 3.7e-18, 0.1, 9)

    monkeypatch.setattr(tradeoff, "paired_difference", difference)
    assert safety_tax(**scores, model_safety=[0.05] * 9).ratio == UNDEFINED
    assert found == [0, 1]


def test_categories_have_the_interval_of_their_mean_and_their_models_keep_their_names():
    def harmful(flags):
        rows = {"ids": [f"p{i}" for i in range(5)], "categories": ["model"] * 5, "refused": flags}
        return {
            "settings": {"data": {"suites": [{"name": "bad", "kind": "harmful"}]}},
            "found": {"rows": {"bad": rows}},
        }

    known = {"A": [harmful([1, 0, 0, 0, 0]), harmful([1, 1, 0, 0, 0])], "B": [harmful([1, 1, 1, 0, 0])] * 2}
    found = category_table(known)
    assert [row["model"] for row in found["rows"]] == ["A", "B"]
    (key,) = (column["key"] for column in found["columns"] if column["label"] == "model (n = 5)" and column["better"])
    assert (found["rows"][0][key]["low"], found["rows"][0][key]["high"]) == wilson(1.5, 5)


def test_the_tax_table_says_nothing_about_a_model_that_gained_nothing():
    scores = gathered({name: [record(0.5, seed=1)] for name in ("base", "utility", "safety", "TA @ 1")})
    assert [row["tax"] for row in tax_rows(scores, list(scores["refusal"].models))] == [UNDEFINED]


def test_angles_stand_at_the_draw_that_they_are_of():
    angles = {"adapters": ["a", "b", "safety"]} | dict.fromkeys(("cosines", "columns", "rows"), [[1.0] * 3] * 3)
    (table,) = geometry_table({1: {"found": angles}})
    assert [row["seed"] for row in table["rows"]] == [1]


def test_angles_are_means_over_pairs_of_experts_and_those_to_the_safety_expert_stand_apart():
    angles = {"adapters": ["a", "b", "safety"]}
    for start, name in enumerate(("cosines", "columns", "rows")):
        angles[name] = [[float(9 * start + 3 * i + j) for j in range(3)] for i in range(3)]
    (table,) = geometry_table({0: {"found": angles}})
    (row,) = table["rows"]
    assert row["cosine"] == angles["cosines"][1][0]
    assert (row["columns"], row["rows"]) == (angles["columns"][1][0], angles["rows"][1][0])
    assert row["safety"] == sum(angles["columns"][2][:2]) / 2


def test_adapters_without_a_common_module_have_no_angle():
    known, none = [[1.0, 0.5, None], [0.5, 1.0, 0.25], [None, 0.25, 1.0]], [[1.0, None, None], [None, 1.0, None]]
    angles = {"adapters": ["a", "b", "safety"], "cosines": [*none, none[0]], "columns": known, "rows": known}
    (table,) = geometry_table({0: {"found": angles}})
    (row,) = table["rows"]
    assert row == {"seed": 0, "cosine": "", "columns": 0.5, "rows": 0.5, "safety": 0.25}


def test_a_task_may_be_called_as_merges_are():
    methods = [MethodSpec("A", combine=Linear(), strength=Strengths("none", [1.0]))]
    tasks = {"qa (en)": "utility", "two (2)": "utility"}
    plan = Plan([*(model(f"expert {task}") for task in tasks), replace(model("A (2)"), experts=2)])
    whole = Interference("tasks", [2], methods).report(plan, KnownAnswers(tasks))
    assert [(row["method"], row["experts"]) for row in whole["tables"][0]["rows"]] == [("A", 2)]


@pytest.mark.parametrize(
    "index",
    [{"tasks": ["a"]}, ["a"], [{"metric": "exact"}], [{"task": 1}]],
    ids=["mapping", "names", "nameless", "number"],
)
def test_an_index_of_tasks_that_is_none_is_one_line(tmp_path, index):
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="expected a list of mappings with the key 'task'"):
        read_tasks(str(tmp_path))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "b", "a"], "a is listed more than once; expected every task once"),
        (["a", "b (v2)"], "a task is a suite of its name: suite 'b \\(v2\\)': expected a name of letters"),
        (["a", "harmful"], "harmful is a suite of recipe.evaluation, too; expected tasks of other names"),
    ],
)
def test_names_that_no_test_could_have_stop_before_any_training(tmp_path, names, message):
    for name in names:
        for split in ("train", "test"):
            write_rows(tmp_path / f"{name}.{split}.jsonl", 4, what=name)
    (tmp_path / "index.json").write_text(json.dumps([{"task": name} for name in names]))
    methods = [MethodSpec("A", combine=Linear(), strength=Strengths("none", [1.0]))]
    grid = SimpleNamespace(recipe=SimpleNamespace(evaluation=SimpleNamespace(suites=[{"name": "harmful"}])))
    with pytest.raises(InputError, match=message):
        Interference(str(tmp_path), [2], methods).plan(grid, [0])  # type: ignore[arg-type]


def alpha(name, *values):
    return MethodSpec(name, method=TaskArithmetic(), strength=Strengths("alpha", list(values)))


def test_points_that_would_be_called_alike_are_told_apart_or_refused():
    close = [1234567.0, 1234568.0, 0.1234561, 0.1234559]
    assert len({at_strength("A", value) for value in close}) == 4
    check_names([alpha("A", *close)])
    one = MethodSpec("A @ 1", method=TaskArithmetic(), strength=Strengths("none", [1.0]))
    with pytest.raises(InputError, match="two points are called A @ 1; expected different names"):
        check_names([alpha("A", 1.0), one])


@pytest.mark.parametrize(
    "axes",
    [
        [Axis("method.t", [3.0, 4.0], ["same", "same"])],
        [Axis("method.t", [3.0], ["x"]), Axis("method.t", [4.0], ["x"])],
    ],
)
def test_variants_of_one_name_are_refused(axes):
    with pytest.raises(InputError, match=r"names are .*; expected different ones"):
        Ablations(MethodSpec("SST", method=Sst(), strength=Strengths("alpha", [1.0])), axes)


@pytest.mark.parametrize(("option", "value"), [("share", 0.0), ("share", 2.0), ("refusal", 9.0), ("refusal", -0.1)])
def test_a_choice_out_of_range_is_refused_whatever_study_has_it(option, value):
    with pytest.raises(InputError, match=f"choice.{option} is {value}"):
        Choice(**{option: value})


def test_ablations_without_harmful_prompts_are_refused_before_anything_is_computed(tmp_path):
    expert = ExpertSpec(str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"))
    grid = Grid(Recipe(BaseSpec("x"), expert, EvaluationSpec([]), expert))
    spec = MethodSpec("SST", method=Sst(), strength=Strengths("alpha", [0.5, 1.0]))
    with pytest.raises(InputError, match="no suite of kind harmful or jailbreak"):
        Ablations(spec, [Axis("method.t", [3.0])]).plan(grid, [0])


@pytest.mark.parametrize("kind", concrete(MergeMethod), ids=lambda kind: kind.__name__)
def test_every_option_of_a_method_is_kept_under_its_name(kind):
    """What is kept elsewhere would be left out of a study's keys."""
    assert plain(kind())["class_path"].endswith(f".{kind.__name__}")


@pytest.mark.parametrize(
    ("told", "processors", "noted"),
    [
        ([True, False], ["Xeon", "EPYC"], "(EPYC; Xeon), and 1 of 2 do not say"),
        ([True, True], ["Xeon", "EPYC"], ""),
        ([False, False], ["Xeon", "Xeon"], ""),
    ],
)
def test_models_of_several_processors_that_do_not_tell_their_weights_are_noted(told, processors, noted):
    fit = Cell("fit", "utility, seed 0", {})
    tests = [Cell("test", f"model {i}", {"i": i}, {"adapter": (fit,)}) for i in range(2)]
    records = {
        cell.key: {"cost": {"processor": processor}} | ({"trained": {fit.key: ["f0"]}} if known else {})
        for cell, known, processor in zip(tests, told, processors, strict=True)
    }
    store = SimpleNamespace(has_result=lambda cell: cell.key in records, read=lambda cell: records[cell.key])
    notes = mixtures(tests, store)  # type: ignore[arg-type]
    assert len(notes) == bool(noted)
    assert noted in "".join(notes)
