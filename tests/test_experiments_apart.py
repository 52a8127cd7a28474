"""What must stay apart in a study: rows that are learnt and asked, both parts of the choice, pages of two studies."""

import json

import pytest

from src.data.suite import Suite
from src.errors import InputError
from src.experiments import command
from src.experiments.cell import Cell, closure
from src.experiments.comparison import Choice, Comparison
from src.experiments.content import identified
from src.experiments.engine import Outcome
from src.experiments.grid import Grid
from src.experiments.interference import Interference, TaskExperts
from src.experiments.learnt_rows import check_learnt_rows, passes_on_learnt_rows
from src.experiments.recipe import EvaluationSpec, ExpertSpec, FisherSpec, Recipe
from src.experiments.safety_tax import SafetyTax
from src.experiments.settings import MethodSpec, Strengths
from src.experiments.stage import check_page, experiment, failures
from src.experiments.store import Store
from src.merge.combinations.task_arithmetic import TaskArithmetic
from src.merge.sst import Sst
from src.models.base import BaseSpec
from tests.evaluations import write_jsonl
from tests.tiny import write_rows

SST = MethodSpec("SST", method=Sst(), strength=Strengths("alpha", [1.0]))
BOTH = MethodSpec("SST", method=Sst(), strength=Strengths("alpha", [0.5, 1.0]))


@pytest.fixture
def recipe(tmp_path):
    """A function that makes a recipe of rows that are apart, but for what is given."""
    names = ("task", "task_val", "harm", "harm_val", "refused", "benign", "asked", "safe")
    rows = {name: str(write_rows(tmp_path / f"{name}.jsonl", 6, what=name)) for name in names}

    def make(settings=None, **other):
        at = rows | other
        return Recipe(
            BaseSpec("hub/x"),
            safety=ExpertSpec(at["harm"], at["harm_val"], config="safety.yaml"),
            utility=ExpertSpec(at["task"], at["task_val"]),
            fisher=FisherSpec(at["refused"], at["benign"]),
            evaluation=EvaluationSpec(
                [Suite("bad", "harmful", at["asked"]), Suite("safe", "borderline", at["safe"])], settings=settings or {}
            ),
        )

    return make


def cells(recipe):
    return closure(SafetyTax([SST]).plan(Grid(recipe), [0]).cells)


def test_rows_that_are_apart_are_no_matter(recipe):
    check_learnt_rows(cells(recipe()))
    assert passes_on_learnt_rows(cells(recipe())) == []


@pytest.mark.parametrize(
    ("part", "same", "message"),
    [
        (
            "asked",
            "harm",
            r"safety, seed 0: 6 prompts of suite bad, the first harm/0, are what safety, seed 0 is trained on",
        ),
        ("asked", "task_val", r"utility, seed 0: 6 prompts of suite bad, .* are what utility, seed 0 is trained on"),
        (
            "safe",
            "benign",
            r"SST, alpha = 1, seed 0: 6 prompts of suite safe, .* are what Fisher, seed 0 is calibrated on",
        ),
        ("harm_val", "harm", r"safety, seed 0: 6 prompts of data.val are also training prompts"),
    ],
)
def test_learnt_rows_that_are_asked_stop_a_study_before_its_first_cell(recipe, tmp_path, part, same, message):
    given = {part: str(tmp_path / f"{same}.jsonl")}
    with pytest.raises(InputError, match=message):
        check_learnt_rows(cells(recipe(**given)))


def test_what_may_be_asked_all_the_same_is_asked(recipe, tmp_path):
    seen = {"model": {"allow_seen": True}}
    check_learnt_rows(cells(recipe(settings=seen, asked=str(tmp_path / "harm.jsonl"))))


def test_a_goal_in_disguise_is_a_learnt_row(recipe, tmp_path):
    goal = json.loads((tmp_path / "harm.jsonl").read_text().splitlines()[0])["prompt"]
    write_jsonl(tmp_path / "attack.jsonl", [{"prompt": f"Pray, {goal}", "request": goal}])
    disguised = {"path": str(tmp_path / "attack.jsonl"), "columns": {"goal": "request"}}
    with pytest.raises(InputError, match="1 prompts of suite bad"):
        check_learnt_rows(cells(recipe(asked=[disguised])))


def test_only_the_rows_that_are_taken_count(recipe, tmp_path):
    """Parts of one file are apart: the expert's and the suite's."""
    whole = {"path": str(tmp_path / "harm.jsonl"), "seed": 0}
    check_learnt_rows(cells(recipe(harm=[whole | {"skip": 2}], asked=[whole | {"limit": 2}])))
    with pytest.raises(InputError, match="1 prompts of suite bad"):
        check_learnt_rows(cells(recipe(harm=[whole | {"skip": 2}], asked=[whole | {"limit": 3}])))


def test_passes_over_random_tokens_read_no_rows(recipe, tmp_path):
    random = {"model": {"labels": "random_tokens"}}
    one = recipe(safe=str(tmp_path / "benign.jsonl"), refused=str(tmp_path / "harm.jsonl"))
    with pytest.raises(InputError, match="are what Fisher, seed 0 is calibrated on"):
        check_learnt_rows(cells(one))
    one.fisher.settings = random
    check_learnt_rows(cells(one))
    assert passes_on_learnt_rows(cells(one)) == []


def test_choice_suites_and_further_suites_are_compared_too(recipe, tmp_path):
    task = json.loads((tmp_path / "task.jsonl").read_text().splitlines()[0])["prompt"]
    question = {"id": "c/0", "question": task, "choices": ["a", "b"], "answer": 0}
    other = question | {"id": "c/1", "question": "Another?"}
    rows = write_jsonl(tmp_path / "choice.jsonl", [question, other])
    few = write_jsonl(tmp_path / "few.jsonl", [question | {"question": "A third?"}])
    one = recipe()
    one.evaluation.suites.append(Suite("mc", "choice", str(rows), few_shot=str(few), shots=1))
    with pytest.raises(
        InputError, match="1 prompts of suite mc, the first c/0, are what utility, seed 0 is trained on"
    ):
        check_learnt_rows(cells(one))
    one = recipe()
    one.evaluation.further.append(Suite("more", "harmful", str(tmp_path / "harm_val.jsonl")))
    with pytest.raises(InputError, match="6 prompts of suite more"):
        check_learnt_rows(cells(one))


def test_rows_that_are_known_by_their_goals_make_other_cells(tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "Pray, steal", "request": "steal"}])
    plain, goals = (
        {"name": "s", "kind": "jailbreak", "rows": {"path": str(rows), "columns": c}} for c in ({}, {"goal": "request"})
    )
    assert "known_by" not in identified("test", {"data": {"suites": [plain]}})["data"]["suites"][0]
    assert identified("test", {"data": {"suites": [goals]}})["data"]["suites"][0]["known_by"] == "goal"


def test_passes_on_learnt_rows_are_a_note(recipe, tmp_path):
    (note,) = passes_on_learnt_rows(cells(recipe(refused=str(tmp_path / "harm.jsonl"))))
    assert note.endswith("those on others: 6 of 12 of “Fisher, seed 0” by “safety, seed 0”.")


def test_rows_of_the_hub_are_not_fetched(recipe):
    check_learnt_rows(cells(recipe(asked="some/dataset", harm="some/dataset", refused="some/dataset")))


@pytest.mark.parametrize(("share", "which"), [(0.01, "0 of 6 rows of bad"), (0.99, "6 of 6 rows of bad")])
def test_strengths_are_chosen_on_some_rows_and_reported_on_others(recipe, share, which):
    study = Comparison([BOTH], "SST", Choice(share=share))
    with pytest.raises(InputError, match=f"study.choice: {which} are validation rows"):
        study.plan(Grid(recipe()), [0])
    Comparison([SST], "SST", Choice(share=share)).plan(Grid(recipe()), [0])  # nothing is chosen
    Comparison([BOTH], "SST").plan(Grid(recipe()), [0])
    # Rows of the hub are not counted, so nothing is known of a suite that has some.
    here = recipe().evaluation.suites[0].rows
    study.plan(Grid(recipe(asked=[here, "some/dataset"], safe="some/dataset")), [0])


def test_a_study_of_interference_asks_no_tasks_but_its_experts(recipe, tmp_path):
    one = recipe()
    one.evaluation.suites.append(Suite("gsm8k", "utility", str(tmp_path / "task.jsonl")))
    study = Interference(str(tmp_path), [2], [MethodSpec("sum", combine=TaskArithmetic(), method=Sst())], TaskExperts())
    with pytest.raises(InputError, match=r"recipe\.evaluation\.suites: gsm8k asks for right answers"):
        study.plan(Grid(one), [0])


def test_parts_of_a_file_stay_apart_however_its_path_is_spelled(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = recipe(
        harm=[{"path": str(tmp_path / "harm.jsonl"), "seed": 0, "skip": 4}],
        refused=[{"path": "./harm.jsonl", "seed": 0, "limit": 4}],
    )
    (fisher,) = {c.key: c for c in closure(SafetyTax([SST]).plan(Grid(one), [3]).cells) if c.stage == "fisher"}.values()
    assert fisher.settings["data"]["safety"][0]["seed"] == 0


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a"])
def test_a_study_is_called_as_a_folder_may_be(recipe, name):
    with pytest.raises(InputError, match="expected that of one folder"):
        experiment(name=name, study=SafetyTax([SST]), recipe=recipe(), seeds=[0])


def page(folder, name="one", kind="SafetyTax"):
    folder.mkdir(exist_ok=True)
    (folder / "study.json").write_text(json.dumps({"provenance": {"asked": {"name": name, "study": {"kind": kind}}}}))
    return folder


def test_a_page_replaces_its_own_state_alone(tmp_path):
    study = SafetyTax([SST])
    check_page(tmp_path / "none", "one", study)
    check_page(page(tmp_path / "own"), "one", study)
    for other in (page(tmp_path / "name", name="two"), page(tmp_path / "kind", kind="Comparison")):
        with pytest.raises(InputError, match=r"study.json: of the study .*; expected one \(SafetyTax\), or another"):
            check_page(other, "one", study)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "index.html").write_text("mine")
    with pytest.raises(InputError, match=r"index.html: of no study \(no study.json beside it\)"):
        check_page(tmp_path / "foreign", "one", study)
    assert (tmp_path / "foreign" / "index.html").read_text() == "mine"


def known(tmp_path, **changes):
    cell = Cell("test", "base", {"data": {}})
    store = Store(tmp_path / "cells", tmp_path / "work")
    store.finish(cell, {"found": {"rows": {"s": {"ids": ["a", "b"], "refused": [0, 1]}}}, "cost": {}})
    (path,) = (tmp_path / "cells").glob("*.json")
    record = json.loads(path.read_text())
    path.write_text(
        json.dumps({key: value for key, value in (record | changes).items() if value is not None or key not in changes})
    )
    return store, cell


def test_a_result_is_read_as_it_was_written(tmp_path):
    store, cell = known(tmp_path)
    assert store.read(cell)["found"]["rows"]["s"]["ids"] == ["a", "b"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"found": None}, "no key 'found'"),
        ({"found": {}}, "no key 'rows'"),
        ({"found": {"rows": {"s": {"ids": ["a", "b"], "refused": [0]}}}}, r"columns of suite s have \[1, 2\] rows"),
        ({"key": "another"}, "key is 'another'; expected the result of base"),
    ],
)
def test_a_result_that_was_changed_is_one_line(tmp_path, changes, message):
    store, cell = known(tmp_path, **changes)
    with pytest.raises(InputError, match=message):
        store.read(cell)


def test_the_reason_of_a_failed_command_is_its_last_line(tmp_path):
    log_file = tmp_path / "log.txt"
    log_file.write_text('Traceback (most recent call last):\n  File "own.py", line 3\nRuntimeError: oops\n\n')
    assert command._reason(log_file, 1) == f"exit code 1: RuntimeError: oops (see {log_file})"
    log_file.write_text("")
    assert command._reason(log_file, 1).startswith("exit code 1:")


def test_a_reason_that_several_cells_have_is_said_once():
    made = [Cell("merge", f"m{i}", {"i": i}) for i in range(3)]
    outcome = Outcome(failed={made[0].key: "why", made[1].key: "why", made[2].key: "other"})
    assert failures(outcome, made) == "3 of 3 cells failed: m0 and m1: why; m2: other"


def test_a_dry_run_warns_of_passes_on_learnt_rows(recipe, tmp_path, caplog, capsys):
    one = recipe(refused=str(tmp_path / "harm.jsonl"))
    folders = {"results": str(tmp_path / "cells"), "work": str(tmp_path / "work")}
    experiment(name="one", study=SafetyTax([SST]), recipe=one, seeds=[0], dry_run=True, **folders)
    assert "Fisher passes were taken on prompts that an expert had learnt" in caplog.text
    assert "cells" in capsys.readouterr().out
