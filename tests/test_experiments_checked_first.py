"""Rows and settings that a command would refuse stop a study before its first cell."""

import pytest

from src.data.row_source import RowSource
from src.data.sources import load_rows
from src.data.suite import Suite
from src.errors import InputError
from src.experiments import checks, stage
from src.experiments.ablations import Ablations, Axis
from src.experiments.cell import closure
from src.experiments.checks import check_first
from src.experiments.grid import Grid
from src.experiments.recipe import EvaluationSpec, ExpertSpec, FisherSpec, Recipe
from src.experiments.safety_tax import SafetyTax
from src.experiments.settings import MethodSpec, Strengths
from src.merge.sst import Sst
from src.models.base import BaseSpec
from tests.evaluations import write_jsonl
from tests.tiny import write_rows

SST = {"method": Sst(), "strength": Strengths("alpha", [1.0])}


@pytest.fixture
def made(tmp_path):
    """A recipe whose experts have different settings."""
    rows = {name: str(write_rows(tmp_path / f"{name}.jsonl", 6, what=name)) for name in ("task", "harm", "eval", "val")}

    def make(part=None, **options):
        given = {
            "utility": {"train": rows["task"], "val": rows["val"], "settings": {"data": {"window": 3}}},
            "safety": {"train": [{"path": rows["harm"]}], "val": rows["val"], "config": "safety.yaml"},
            "fisher": {"safety": rows["harm"], "utility": rows["task"]},
            "evaluation": {"suites": [Suite("bad", "harmful", rows["eval"])]},
        }
        kinds = {"utility": ExpertSpec, "safety": ExpertSpec, "fisher": FisherSpec, "evaluation": EvaluationSpec}
        if part is not None:
            given[part] |= {key: value(rows) if callable(value) else value for key, value in options.items()}
        return Recipe(BaseSpec("hub/x"), **{name: kind(**given[name]) for name, kind in kinds.items()})

    return make


def check(recipe, *methods, seeds=(0, 1), study=None):
    grid = Grid(recipe)
    study = study or SafetyTax(list(methods) or [MethodSpec("SST", **SST)])
    check_first(closure(study.plan(grid, list(seeds)).cells), grid, seeds[0])


def source(name, **options):
    return lambda rows: [{"path": rows[name]} | options]


@pytest.mark.parametrize(
    ("part", "options", "message"),
    [
        ("utility", {"train": source("task", columns={"response": "Answer"})}, "recipe.utility.train: .*no column 'An"),
        ("safety", {"val": source("harm", where={"splitt": "train"})}, "recipe.safety.val: .*no column 'splitt'"),
        ("safety", {"train": source("harm", weight=2.0)}, "recipe.safety.train: .*weight is for Fisher passes"),
        ("fisher", {"utility": source("task", where={"id": "trian"})}, "recipe.fisher.utility: .*no rows left of 6"),
        (
            "evaluation",
            {
                "further": lambda rows: [
                    Suite("odd", "benign", [{"path": rows["eval"], "columns": {"promt": "prompt"}}])
                ]
            },
            "recipe.evaluation: suite odd: .*columns maps unknown field 'promt'",
        ),
    ],
)
def test_rows_that_a_command_would_refuse_are_told_with_their_place(made, monkeypatch, part, options, message):
    monkeypatch.setattr(checks, "_check_settings", lambda *_: None)
    check(made())
    with pytest.raises(InputError, match=f"^{message}"):
        check(made(part, **options))


def test_rows_of_a_method_are_told_with_its_name_and_each_source_is_read_once(made, monkeypatch, tmp_path):
    monkeypatch.setattr(checks, "_check_settings", lambda *_: None)
    bad = [{"path": str(tmp_path / "task.jsonl"), "columns": {"prompt": "question"}}]
    mixed = MethodSpec("mixed", train="mixed", rows=bad, strength=Strengths("safety_rows", [2.0]))
    with pytest.raises(InputError, match=r"^mixed, safety_rows = 2, seed 0: .*no column 'question'"):
        check(made(), mixed)
    read, load = [], checks.load_rows
    monkeypatch.setattr(checks, "load_rows", lambda rows, **options: read.append(rows.path) or load(rows, **options))
    check(made(), MethodSpec("mixed", train="mixed", strength=Strengths("none", [1.0])), MethodSpec("SST", **SST))
    assert sorted(path.rpartition("/")[2] for path in read) == ["harm.jsonl"] * 2 + ["task.jsonl"] * 2 + ["val.jsonl"]


def test_rows_of_the_hub_are_not_fetched(made):
    hub = [{"path": "some/dataset", "columns": {"prompt": "question"}}]
    checks._read("fit", checks._sources(hub)[0])
    checks._read("test", {"name": "x", "kind": "choice", "rows": hub, "few_shot": hub, "shots": 1})


def test_the_rows_that_a_suite_asks_are_checked_and_no_others(tmp_path):
    rows = [{"prompt": f"How many? {i}", "response": "none" if i == 0 else str(i)} for i in range(10)]
    path = write_jsonl(tmp_path / "numbers.jsonl", rows)
    refused = []
    for seed in range(8):
        suite = {"name": "s", "kind": "utility", "answer": "number"}
        suite["rows"] = [{"path": str(path), "seed": seed, "limit": 3}]
        asked = load_rows(RowSource(**suite["rows"][0]), need_response=True)
        if any(row.response == "none" for row in asked):
            refused.append(seed)
            with pytest.raises(InputError, match="number"):
                checks._read("test", suite)
        else:
            checks._read("test", suite)
    assert 0 < len(refused) < 8


@pytest.mark.parametrize(
    ("part", "settings", "message"),
    [
        ("utility", {"trainer": {"max_epoch": 2}}, "recipe.utility.settings: .*trainer.max_epoch' is not accepted"),
        ("safety", {"model": {"optimiser": 1}}, "recipe.safety.settings: .*model.optimiser' is not accepted"),
        ("fisher", {"model": {"labels": "none"}}, "recipe.fisher.settings: .*model.labels\": 'none'; expected one of "),
        ("evaluation", {"data": {"batchsize": 4}}, "recipe.evaluation.settings: .*data.batchsize' is not accepted"),
    ],
)
def test_settings_that_a_command_would_refuse_are_told_with_their_place(made, monkeypatch, part, settings, message):
    monkeypatch.setattr(checks, "TOLD", [{"fisher": "fisher", "evaluation": "test"}.get(part, "fit")])
    with pytest.raises(InputError, match=f"^{message}"):
        check(made(part, settings=settings))


def test_settings_of_a_method_are_told_with_its_name(made, monkeypatch):
    monkeypatch.setattr(checks, "TOLD", ["fit"])
    guard = {"model": {"regularizer": {"class_path": "AlignGuard", "init_args": {"k": 4}}}}
    beside = MethodSpec("guard", train="beside_safety", settings=guard, strength=Strengths("none", [1.0]))
    check(made(), beside)
    axes = Ablations(MethodSpec("SST", **SST), [Axis("safety.trainer.max_epoch", [3])])
    with pytest.raises(InputError, match=r"^safety.trainer.max_epoch = 3, alpha = 1, seed 0: settings of fit: "):
        check(made(), study=axes)
    monkeypatch.setattr(checks, "TOLD", ["fisher"])
    wrong = MethodSpec("SST 2", **SST, fisher={"model": {"lables": "data"}})
    with pytest.raises(InputError, match=r"^SST 2, alpha = 1, seed 0: settings of fisher: .*lables"):
        check(made(), wrong)


def test_settings_that_differ_in_rows_and_seeds_are_parsed_once(made, monkeypatch):
    parsed = []

    def parse(arguments, _log_file):
        parsed.append(arguments[0])
        raise checks._Taken

    monkeypatch.setattr(checks, "_parse", parse)
    mixed = MethodSpec("mixed", train="mixed", strength=Strengths("safety_rows", [2.0, 4.0]))
    check(made(), MethodSpec("SST", **SST), mixed)
    assert sorted(parsed) == ["fisher", "fit", "fit", "test"]


@pytest.mark.parametrize("options", [{"dry_run": True}, {}, {"compute": False}])
def test_what_is_left_to_compute_is_checked_unless_nothing_is_computed(made, tmp_path, monkeypatch, options):
    def refuse(todo, grid, seed):
        raise InputError(f"{len(todo)} cells")

    monkeypatch.setattr(stage, "check_first", refuse)
    places = {"results": str(tmp_path / "cells"), "work": str(tmp_path / "work")}
    asked = {"name": "x", "study": SafetyTax([MethodSpec("SST", **SST)]), "recipe": made(), "seeds": [0]} | places
    if options == {"compute": False}:
        stage.experiment(**asked, **options)
        assert (tmp_path / "work" / "studies" / "x" / "index.html").exists()
        return
    with pytest.raises(InputError, match=r"^8 cells"):
        stage.experiment(**asked, **options)
    assert not (tmp_path / "work").exists()
