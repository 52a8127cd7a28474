"""What reports say where something was not measured, or where paths begin elsewhere; on answers that are made up."""

import json
from dataclasses import replace

import pytest

from src.cli import main
from src.experiments import ablations
from src.experiments.interference import Interference
from src.experiments.safety_tax import SafetyTax
from src.experiments.settings import MethodSpec, Strengths
from src.experiments.study import Plan
from src.merge.combinations.linear import Linear
from src.merge.sst import Sst
from tests.known_answers import KnownAnswers, model

SUITES = {"bad": "harmful", "safe": "borderline", "task": "utility"}
METHODS = [MethodSpec("TA", method=Sst(), strength=Strengths("alpha", [0.5, 1.0]))]
PATH = [model("base"), model("utility"), model("safety"), model("TA", 0.5), model("TA", 1.0)]


@pytest.mark.parametrize(
    ("suites", "missing", "said"),
    [
        (SUITES, [PATH[1].test.label], "the utility expert is not finished"),
        (["bad"], [], "utility was not measured"),
        (["task"], [], "refusal of harmful prompts was not measured"),
        (["safe"], [], "refusal of harmful prompts and utility were not measured"),
        (SUITES, [one.test.label for one in PATH[3:]], "no point of a method is finished"),
    ],
)
def test_a_tax_that_was_not_measured_is_not_said_to_be_undefined(suites, missing, said):
    store = KnownAnswers({name: SUITES[name] for name in suites}, missing)
    found = SafetyTax(METHODS).report(Plan(PATH), store)
    assert found["summary"] == [f"Nothing is said about the safety tax: {said}."]


def test_ablations_begin_a_path_at_the_utility_expert_only_where_it_begins_there(monkeypatch):
    guard = MethodSpec("guard", train="beside_safety", strength=Strengths("model.x", [1.0]))
    mixed = MethodSpec("mixed", train="mixed", strength=Strengths("safety_rows", [8.0]))
    study = ablations.Ablations(METHODS[0], [ablations.Axis("method.t", [3.0])], methods=[guard, mixed])
    models = [*PATH, model("method.t = 3.0", 1.0), model("guard", 1.0), model("mixed", 8.0)]
    asked = []
    monkeypatch.setattr(ablations, "gaps", lambda *given: asked.append(given[1]) or [])
    study.report(Plan(models), KnownAnswers(SUITES))
    assert asked[0] == {
        "TA": ["utility", "TA @ 0.5", "TA @ 1"],
        "method.t = 3.0": ["utility", "method.t = 3.0 @ 1"],
        "guard": ["guard @ 1"],
        "mixed": ["utility", "mixed @ 8"],
    }


def test_a_merge_without_one_of_its_seeds_is_left_out_of_interference():
    """Its mean would be over other tasks than those of the rest."""
    methods = [MethodSpec(name, combine=Linear(), strength=Strengths("none", [1.0])) for name in ("A", "B")]
    tasks = {"one": "utility", "two": "utility"}
    experts = [model(f"expert {task}", seed=seed) for seed in (0, 1) for task in tasks]
    merges = [replace(model(f"{name} (2)", seed=seed), experts=2) for seed in (0, 1) for name in ("A", "B")]
    easy = {one.test.label: 0.9 for one in merges if one.seed == 0}
    plan = Plan([*experts, *merges])
    whole = Interference("tasks", [2], methods).report(plan, KnownAnswers(tasks, own=easy))
    assert [row["method"] for row in whole["tables"][0]["rows"]] == ["A", "B"]
    assert whole["notes"] == []
    missing = ["B (2) @ None, seed 1", "expert one @ None, seed 1"]
    found = Interference("tasks", [2], methods).report(plan, KnownAnswers(tasks, missing, easy))
    assert [row["method"] for row in found["tables"][0]["rows"]] == ["A"]
    assert found["notes"] == [
        "B (2) is left out: not computed or failed (1 of 2 points).",
        "expert one @ None, seed 1 is left out: not computed or failed (1 of 4 points).",
    ]
    assert "B" not in found["summary"][0]


def test_what_is_written_again_is_named_and_a_picture_that_is_none_is_not(tmp_path, capsys):
    provenance = {"asked": {}, "versions": {}, "source": "s", "cells": []}
    empty = {key: [] for key in ("summary", "notes", "fronts", "tables", "examples")}
    (tmp_path / "study.json").write_text(json.dumps({"title": "t", "provenance": provenance} | empty))
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().err == f"report in {tmp_path}: index.html, tables.csv, study.json\n"
