"""Studies on adapters that are there: known by their files, copied, and of methods that train nothing of them."""

import json
import shutil
from dataclasses import replace

import pytest

from src.adapters.given_adapter import copy_adapter
from src.adapters.peft_files import CARD, CONFIG, SEEN, WEIGHTS, read_adapter
from src.data.row_source import RowSource
from src.data.sources import load_rows
from src.data.suite import Suite
from src.errors import InputError
from src.experiments.ablations import Ablations, Axis
from src.experiments.cell import closure
from src.experiments.checks import check_first
from src.experiments.grid import Grid
from src.experiments.interference import Interference, TaskExperts
from src.experiments.learnt_rows import passes_on_learnt_rows
from src.experiments.recipe import EvaluationSpec, ExpertSpec, FisherSpec, Recipe
from src.experiments.safety_tax import SafetyTax
from src.experiments.settings import MethodSpec, Strengths
from src.experiments.store import Store
from src.experiments.timing import time_left
from src.files import sha256_file
from src.merge.combinations.dare import Dare
from src.merge.combinations.task_arithmetic import TaskArithmetic
from src.merge.sst import Sst
from src.models.base import BaseSpec
from tests.tiny import write_rows

TA = MethodSpec("TA", TaskArithmetic(), strength=Strengths("alpha", [1.0]))


@pytest.fixture
def folders(adapters, tmp_path):
    """Copies of two adapters, to change."""
    found = {name: shutil.copytree(one, tmp_path / name) for name, one in adapters.items()}
    (found["utility"] / SEEN).write_text("a" * 16 + "\n")
    return found


@pytest.fixture
def recipe(base, folders, tmp_path):
    rows = {name: str(write_rows(tmp_path / f"{name}.jsonl", 6, what=name)) for name in ("asked", "f_s", "f_u")}
    return Recipe(
        BaseSpec(str(base), dtype="float64"),
        safety=ExpertSpec(adapter=str(folders["safety"])),
        utility=ExpertSpec(adapter=str(folders["utility"])),
        fisher=FisherSpec(rows["f_s"], rows["f_u"]),
        evaluation=EvaluationSpec([Suite("bad", "harmful", rows["asked"])]),
    )


def given(recipe, seed=0):
    grid = Grid(recipe)
    return grid.utility(seed), grid.safety(seed)


def test_an_adapter_is_known_by_what_is_read_of_it_wherever_it_lies(recipe, folders, tmp_path):
    before = [cell.key for cell in given(recipe)]
    assert before == [cell.key for cell in given(recipe, seed=7)]
    assert len(set(before)) == 2
    (folders["utility"] / CARD).write_text("another card")
    (folders["utility"] / "optimizer.pt").write_text("state")
    assert [cell.key for cell in given(recipe)] == before
    elsewhere = shutil.move(folders["utility"], tmp_path / "elsewhere")
    moved = replace(recipe, utility=ExpertSpec(adapter=str(elsewhere)))
    assert [cell.key for cell in given(moved)] == before
    config = json.loads((elsewhere / CONFIG).read_text())
    (elsewhere / CONFIG).write_text(json.dumps(config | {"lora_alpha": 99}))
    assert given(moved)[0].key != before[0]


def test_what_depends_on_an_adapter_depends_on_its_content(recipe, folders):
    def keys():
        return [cell.key for cell in closure(SafetyTax([TA]).plan(Grid(recipe), [0]).cells)]

    before = keys()
    shutil.copy(folders["safety"] / WEIGHTS, folders["utility"] / WEIGHTS)
    assert sum(one == other for one, other in zip(before, keys(), strict=True)) == 3  # base, safety and its answers


def test_a_copy_is_the_adapter_without_what_is_not_read(folders, tmp_path):
    (folders["utility"] / "optimizer.pt").write_text("state")
    target = tmp_path / "copy"
    target.mkdir()
    (target / "old").write_text("of an earlier one")
    found = copy_adapter(str(folders["utility"]), target)
    one, other = read_adapter(folders["utility"]), read_adapter(target)
    assert found == {"sha256": one.sha256, "base": one.base}
    assert (other.identity, other.seen, other.manifest) == (one.identity, one.seen, one.manifest)
    assert one.seen
    assert {path.name for path in target.iterdir()} == {CONFIG, WEIGHTS, SEEN, "manifest.json"}


def test_a_missing_adapter_is_told_and_a_hub_repository_is_not_fetched(recipe, tmp_path):
    absent = replace(recipe, safety=ExpertSpec(adapter=str(tmp_path / "none")))
    with pytest.raises(InputError, match=r"none: no such directory; expected a PEFT adapter"):
        given(absent)[1].key  # noqa: B018
    on_hub = replace(recipe, safety=ExpertSpec(adapter="someone/safety"))
    cells = closure(SafetyTax([TA]).plan(Grid(on_hub), [0]).cells)
    check_first(cells, Grid(on_hub), 0)


def test_an_adapter_of_another_base_stops_a_study_before_its_first_cell(recipe, folders):
    for name in ("utility", "safety"):
        config = json.loads((folders[name] / CONFIG).read_text())
        (folders[name] / CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": "someone/other"}))
        (folders[name] / "manifest.json").unlink()
    grid = Grid(recipe)
    with pytest.raises(InputError, match=r"someone/other.* or give --recipe\.base\.aliases"):
        check_first(closure(SafetyTax([TA]).plan(grid, [0]).cells), grid, 0)


def test_prompts_that_an_adapter_has_seen_are_not_asked_and_passes_on_them_are_told(recipe, folders, tmp_path):
    sst = MethodSpec("SST", Sst(), strength=Strengths("alpha", [1.0]))
    cells = closure(SafetyTax([sst]).plan(Grid(recipe), [0]).cells)
    check_first(cells, Grid(recipe), 0)
    assert passes_on_learnt_rows(cells) == []
    seen = [row.prompt_hash for row in load_rows(RowSource(str(tmp_path / "f_s.jsonl")), need_response=True)]
    (folders["safety"] / SEEN).write_text("\n".join(seen))
    cells = closure(SafetyTax([sst]).plan(Grid(recipe), [0]).cells)
    (note,) = passes_on_learnt_rows(cells)
    assert note.endswith("6 of 12 of “Fisher, seed 0” by “safety, given”.")
    asked = load_rows(RowSource(str(tmp_path / "asked.jsonl")), need_response=False)
    (folders["safety"] / SEEN).write_text(asked[0].prompt_hash)
    with pytest.raises(InputError, match=r"1 prompts of suite bad, .* are what safety, given is trained on"):
        check_first(closure(SafetyTax([sst]).plan(Grid(recipe), [0]).cells), Grid(recipe), 0)


def test_methods_that_train_need_the_rows_of_what_they_train(recipe, tmp_path):
    mixed = MethodSpec("mixed", train="mixed", strength=Strengths("safety_rows", [4.0]))
    core = MethodSpec("core", TaskArithmetic(), train="core", strength=Strengths("alpha", [1.0]))
    learnt = replace(TA, rows=str(tmp_path / "asked.jsonl"))
    alone = "expected train and val and adapter alone is there"
    for spec, message in (
        (mixed, f"mixed, safety_rows = 4: recipe.utility: {alone}"),
        (core, f"core, core: recipe.safety: {alone}"),
        (learnt, f"TA, safety: {alone}"),
    ):
        with pytest.raises(InputError) as error:
            Grid(recipe).models(spec, 0)
        assert str(error.value) == message
    rows = {"train": str(tmp_path / "f_u.jsonl"), "val": str(tmp_path / "f_s.jsonl")}
    both = replace(recipe, utility=ExpertSpec(adapter=recipe.utility.adapter, **rows))
    utility = MethodSpec("anew", train="utility", strength=Strengths("none", [1.0]))
    (model,) = Grid(both).models(utility, 0)
    assert model.made.stage == "fit"
    assert Grid(both).utility(0).stage == "given"


def test_draws_of_a_combination_are_other_ones_for_every_seed_of_given_experts(recipe, tmp_path):
    spec = MethodSpec("drawn", TaskArithmetic(), Dare(seed=5), Strengths("alpha", [1.0]), rank=4)

    def seeds(one):
        made = [Grid(one).models(spec, seed)[0].made for seed in (0, 2)]
        return [(cell.settings["combine"]["init_args"]["seed"]) for cell in made]

    assert seeds(recipe) == [5, 7]
    rows = str(tmp_path / "f_u.jsonl")
    assert seeds(replace(recipe, utility=ExpertSpec(rows, rows))) == [5, 5]


def test_an_axis_of_the_training_needs_one(recipe):
    study = Ablations(TA, [Axis("safety.model.lora.rank", [4])])
    with pytest.raises(InputError, match=r"^safety: adapter .*safety is there, and model is of a training$"):
        study.plan(Grid(recipe), [0])


def test_an_expert_has_rows_or_is_there():
    with pytest.raises(InputError, match=r"^safety: expected train and val$"):
        Grid(Recipe(BaseSpec("hub/x"), ExpertSpec(), EvaluationSpec([]))).safety(0)


def test_experts_of_tasks_may_be_there(recipe, folders, tmp_path):
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    for name in ("utility", "safety"):
        write_rows(tasks / f"{name}.test.jsonl", 3, what=name)
    summed = MethodSpec("sum", TaskArithmetic(), TaskArithmetic(), Strengths("alpha", [1.0]))
    experts = TaskExperts(adapter=f"{tmp_path}/{{task}}")
    plan = Interference(str(tasks), [2], [summed], experts).plan(Grid(recipe), [0])
    found = {cell.settings["adapter"] for cell in closure(plan.cells) if cell.stage == "given"}
    assert found == {str(folder) for folder in folders.values()}
    assert f"Given experts, the same for every seed: {tmp_path}/{{task}}." in plan.notes
    with pytest.raises(InputError, match=r"utility\.train\.jsonl|no task"):
        Interference(str(tasks), [2], [summed]).plan(Grid(recipe), [0])
    with pytest.raises(InputError, match=r"^study\.experts\.adapter is one; expected \{task\} in it"):
        TaskExperts(adapter="one")


def test_a_copy_takes_no_time(recipe, tmp_path):
    cells = list(given(recipe))
    assert time_left(cells, Store(tmp_path / "cells", tmp_path / "work")) == 0.0
    assert sha256_file(tmp_path / "utility" / WEIGHTS) == read_adapter(tmp_path / "utility").sha256
