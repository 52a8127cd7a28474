"""What a recipe says: what every seed draws anew, what is refused before hours of work, and what a key follows."""

import os
import time

import pytest

from src.data.suite import Suite
from src.errors import InputError
from src.experiments.ablations import Ablations, Axis
from src.experiments.cell import Cell, closure
from src.experiments.cell_stages import Stages
from src.experiments.command import Cost
from src.experiments.costs import cost_table
from src.experiments.grid import Grid, Model, seeded
from src.experiments.interference import Interference, TaskExperts
from src.experiments.kept import nothing_alone
from src.experiments.recipe import EvaluationSpec, ExpertSpec, FisherSpec, Recipe
from src.experiments.safety_tax import SafetyTax
from src.experiments.settings import FirstStep, MethodSpec, Strengths
from src.experiments.stage import experiment
from src.experiments.store import Store
from src.experiments.study import notes_on
from src.merge.base import MergeMethod
from src.merge.combinations.concatenate import Concatenate
from src.merge.combinations.dare import Dare
from src.merge.combinations.linear import Linear
from src.merge.combinations.task_arithmetic import TaskArithmetic
from src.merge.combinations.ties import Ties
from src.merge.resta import Resta
from src.merge.sst import Sst
from src.models.base import BaseSpec
from src.single_values import StudyParser
from src.whole_values import ConfigFile
from tests.known_answers import KnownAnswers, model
from tests.registries import concrete
from tests.tiny import write_rows


def part(path, skip, limit):
    return {"path": str(path), "seed": 0, "skip": skip, "limit": limit}


@pytest.fixture
def recipe(tmp_path):
    """Experts whose training, validation and calibration rows are parts of one file each."""
    task, harm = (write_rows(tmp_path / f"{name}.jsonl", 20, what=name) for name in ("task", "harm"))
    eval_rows = write_rows(tmp_path / "eval.jsonl", 5, what="eval")

    def made(redraw="experts", suite_rows=eval_rows):
        return Recipe(
            BaseSpec("hub/x"),
            ExpertSpec([part(harm, 4, 8)], [part(harm, 0, 4)], "safety.yaml"),
            EvaluationSpec([Suite("bad", "harmful", str(suite_rows))]),
            ExpertSpec([part(task, 4, 8)], [part(task, 0, 4)]),
            FisherSpec([part(harm, 12, 8)], [part(task, 12, 8)]),
            redraw,
        )

    return made


def trained_with(cell):
    data = cell.settings["data"]
    return cell.settings["model"].get("seed"), {source["seed"] for key in ("train", "val") for source in data[key]}


def test_experts_of_a_seed_have_their_own_start_and_rows_where_asked(recipe):
    grid = Grid(recipe())
    fits = [make(seed) for seed in (1, 2) for make in (grid.utility, grid.safety)]
    starts, shuffles = zip(*map(trained_with, fits), strict=True)
    assert len(set(starts)) == 4
    assert shuffles == ({1}, {1}, {2}, {2})
    assert [fit.settings["data"]["seed"] for fit in fits] == [1, 1, 2, 2]
    fisher = grid.fisher([fits[2]], fits[3], 2, {})
    assert fisher.settings["model"]["seed"] == 2
    assert [fisher.settings["data"][side][0]["seed"] for side in ("safety", "utility")] == [2, 2]
    mixed = MethodSpec("mixed", train="mixed", strength=Strengths("safety_rows", [4.0]))
    (made,) = grid.models(mixed, 2)
    assert trained_with(made.made) == (starts[2], {2})


def test_draws_of_a_method_are_other_ones_for_every_seed(recipe):
    assert [seeded(Dare(seed=5), seed).seed for seed in (0, 2)] == [5, 7]
    grid = Grid(recipe("calibration"))
    spec = MethodSpec("RESTA", Resta(seed=5), strength=Strengths("alpha", [1.0]))
    ((_, merge),) = grid.merges(spec, [grid.utility(2)], grid.safety(2), 2)
    assert merge.settings["method"]["init_args"]["seed"] == 7


def test_rows_that_a_variant_names_are_drawn_anew_as_well(recipe, tmp_path):
    over = {"data": {"train": [part(tmp_path / "harm.jsonl", 6, 6)]}}
    assert trained_with(Grid(recipe()).safety(2, over))[1] == {2}
    assert trained_with(Grid(recipe("calibration")).safety(2, over))[1] == {0}


def test_a_merge_with_rows_has_a_safety_expert_that_learnt_them_too(recipe, tmp_path):
    grid, further = Grid(recipe()), write_rows(tmp_path / "further.jsonl", 3, what="further")
    path = Strengths("alpha", [0.5, 1.0])
    own = MethodSpec("own", TaskArithmetic(), strength=path, rows={"path": str(further), "seed": 0})
    own.check()
    plain = MethodSpec("plain", TaskArithmetic(), strength=path)
    (first, second), (merged, _) = (grid.models(spec, 2) for spec in (own, plain))
    usual, (learnt,) = grid.safety(2), first.made.needs["safety"]
    keys = {name: [cell.key for cell in needs] for name, needs in merged.made.needs.items()}
    assert keys == {"utility": [grid.utility(2).key], "safety": [usual.key]}
    for point in (first, second):
        assert [cell.key for cell in point.made.needs["utility"]] == keys["utility"]
        assert [cell.key for cell in point.made.needs["safety"]] == [learnt.key]
    assert learnt.settings["data"]["train"] == usual.settings["data"]["train"] + [{"path": str(further), "seed": 2}]
    kept = [{key: v for key, v in cell.settings.items() if key != "data"} for cell in (learnt, usual)]
    assert kept[0] == kept[1]
    assert learnt.settings["data"]["val"] == usual.settings["data"]["val"]
    assert learnt.units == usual.units + 3 * usual.units / 8
    assert notes_on(grid, [plain]) == []
    assert notes_on(grid, [own]) == ["own: the safety expert has learnt further rows; the model named safety has not."]


def test_every_step_of_a_merge_with_rows_is_taken_from_its_own_safety_expert(recipe, tmp_path):
    grid, further = Grid(recipe()), write_rows(tmp_path / "further.jsonl", 3, what="further")
    step = Sst(coefficients="relearn")
    spec = MethodSpec("own", step, rows=str(further), first=FirstStep(step, first=FirstStep(TaskArithmetic(), 0.45)))
    cells = closure([model.made for model in grid.models(spec, 0)])
    assert {cell.label for cell in cells if cell.stage == "fit"} == {"utility, seed 0", "own, safety, seed 0"}
    assert len([cell for cell in cells if cell.stage == "fisher"]) == 2


def test_rows_of_a_merge_are_for_one_with_a_safety_expert(tmp_path):
    with pytest.raises(InputError, match=r"^method x: rows are for trainings and for merges with a safety expert$"):
        MethodSpec("x", combine=Ties(), strength=Strengths("none", [1.0]), rank=8, rows="rows.jsonl").check()
    spec = MethodSpec("x", TaskArithmetic(), rows="rows.jsonl")
    with pytest.raises(InputError, match=r"^axis safety\.data\.train: the reference has rows"):
        Ablations(spec, [Axis("safety.data.train", [["other.jsonl"]])])


def test_experts_share_their_start_and_rows_otherwise(recipe):
    grid = Grid(recipe("calibration"))
    for make in (grid.utility, grid.safety):
        assert {trained_with(make(seed))[0] for seed in (1, 2)} == {None}
        assert trained_with(make(1))[1] == {0}


def test_a_code_suite_of_a_study_has_what_methods_are_compared_by(recipe):
    one = recipe()
    one.evaluation.suites.append(Suite("he", "code", "code.jsonl", samples=10, temperature=0.8, k=[10]))
    with pytest.raises(InputError, match=r"^suite he: k is \[10\]; expected 1 in it, as studies compare pass@1$"):
        one.check()
    one.evaluation.suites[-1].k = [1, 10]
    one.check()


def test_suites_of_files_that_every_seed_divides_anew_are_refused(recipe, tmp_path):
    recipe().check()
    recipe("calibration", tmp_path / "task.jsonl").check()
    with pytest.raises(InputError, match=r"suite bad has rows of .*task\.jsonl, other rows of which every seed"):
        recipe(suite_rows=tmp_path / "task.jsonl").check()
    of_passes = recipe()
    of_passes.fisher = FisherSpec([part(tmp_path / "eval.jsonl", 2, 2)], of_passes.fisher.utility)
    with pytest.raises(InputError, match=r"suite bad has rows of .*eval\.jsonl"):
        of_passes.check()


@pytest.mark.parametrize(
    ("suite", "message"),
    [
        (Suite("bad", "harmful", "x.jsonl", rouge=True), "suite bad: rouge needs"),
        (Suite("bad", "harmful", "x.jsonl", max_new_tokens=0), "suite bad: expected max_new_tokens of at least 1"),
        (Suite("a/b", "harmful", "x.jsonl"), "suite 'a/b': expected a name"),
    ],
)
@pytest.mark.parametrize("further", [False, True])
def test_a_suite_that_cannot_be_asked_stops_before_any_training(suite, message, further):
    with pytest.raises(InputError, match=message):
        (EvaluationSpec([], further=[suite]) if further else EvaluationSpec([suite])).check()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (MethodSpec("A", Sst(), strength=Strengths("tt", [1.0])), "method A: strength tt: Sst has no such option"),
        (MethodSpec("A", Sst(), strength=Strengths("rho", [-1.0])), "rho is -1.0"),
        (MethodSpec("A", Sst(), Ties(), Strengths("combine.dens", [0.5])), "method A: strength dens: Ties has no such"),
        (MethodSpec("A", None, Ties(), Strengths("density", [0.5])), "method A: strength density: expected a method"),
        (MethodSpec("A", Sst(), None, Strengths("combine.density", [0.5])), "combine.density: expected a combine"),
        (MethodSpec("A", Sst(), Ties(), Strengths("combine.alpha", [0.5])), "sweep.alpha"),
    ],
)
def test_a_swept_option_that_is_none_stops_before_any_training(spec, message):
    with pytest.raises(InputError, match=message):
        spec.check()
    MethodSpec("A", TaskArithmetic(), Ties(), Strengths("combine.density", [0.5, 0.7]), rank=8).check()


ALPHA = Strengths("alpha", [0.5])
MIXED = {"train": "mixed", "strength": Strengths("safety_rows", [2.0, 4.0])}
BESIDE = {"train": "beside_safety", "strength": Strengths("none", [1.0])}
GUARD = {"model": {"regularizer": {"class_path": "AlignGuard"}}}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"train": "utility", "strength": Strengths("safety_rows", [2.0])},
            "strength safety_rows is for train mixed, not ",
        ),
        (BESIDE | {"strength": Strengths("safety_rows", [2.0])}, "strength safety_rows is for train mixed, not "),
        ({"train": "mixed"}, "strength alpha: train mixed has none; expected safety_rows, none or a dotted key"),
        ({"train": "utility"}, "strength alpha: train utility has none; expected none or a dotted key of settings"),
        ({"method": TaskArithmetic(), "settings": {"trainer": {}}}, "settings are those of a training; expected train"),
        ({"method": TaskArithmetic(), "fisher": {"model": {}}}, "fisher is for a method that needs Fisher files, or"),
        (MIXED | {"fisher": {"model": {}}}, "fisher is for a method that needs Fisher files, or train beside_safety"),
        (BESIDE | {"fisher": {"model": {}}}, "fisher is for .* with model.regularizer in settings"),
        (MIXED | {"rank": 8}, "rank and energy are for merges, not for train mixed"),
        (BESIDE | {"energy": 0.9}, "rank and energy are for merges, not for train beside_safety"),
        ({"method": Ties()}, "Ties gives full-rank updates; expected rank or energy"),
        ({"method": TaskArithmetic(), "combine": Ties()}, "Ties gives full-rank updates; expected rank or energy"),
        ({"method": Ties(), "rank": 8, "energy": 0.9}, "rank, energy and full_model exclude each other"),
        ({"method": Ties(), "rank": 0}, "rank is 0; expected at least 1"),
        ({"method": TaskArithmetic(), "energy": 1.5}, "energy is 1.5; expected a number above 0 to 1"),
        (
            {"method": TaskArithmetic(), "strength": Strengths("alpha", [-0.5, 1.0])},
            "strength alpha is -0.5; expected a",
        ),
        (
            {"method": TaskArithmetic(), "train": "core", "strength": Strengths("alpha", [float("inf")])},
            "strength alpha is inf; expected a finite number",
        ),
    ],
)
def test_what_nothing_reads_or_merge_and_fit_refuse_stops_before_any_training(options, message):
    with pytest.raises(InputError, match=f"^method A: {message}"):
        MethodSpec("A", **options).check()


@pytest.mark.parametrize(
    "options",
    [
        MIXED,
        BESIDE | {"settings": GUARD, "fisher": {"model": {}}},
        BESIDE | {"strength": Strengths("model.regularizer.init_args.align", [1.0]), "fisher": {"model": {}}},
        {"method": Sst(), "fisher": {"model": {}}, "rank": 8},
        {"method": Ties(), "train": "core", "settings": {"trainer": {}}, "energy": 0.9},
    ],
)
def test_what_is_read_is_taken(options):
    MethodSpec("A", **options).check()


def test_methods_that_say_so_are_known_to_give_full_rank_updates():
    said = {kind for kind in concrete(MergeMethod) if "full rank" in kind.__doc__.lower()}
    assert {Dare, Ties} <= said
    assert said == {kind for kind in concrete(MergeMethod) if kind.full_rank}


def test_settings_of_a_method_reach_the_passes_of_a_first_step_that_has_any(recipe):
    relearn = Sst(coefficients="relearn")
    over = {"model": {"basis": "union"}}
    steps = FirstStep(relearn, first=FirstStep(TaskArithmetic(), 0.5))
    spec = MethodSpec("A", relearn, strength=ALPHA, fisher=over, first=steps)
    grid = Grid(recipe())
    ((_, merge),) = grid.merges(spec, [grid.utility(0)], grid.safety(0), 0)
    while merge.needs.get("fisher"):
        (fisher,) = merge.needs["fisher"]
        assert fisher.settings["model"]["basis"] == "union"
        (merge,) = fisher.needs["first"]
    assert merge.label == "A, first step, first step, alpha = 0.5, seed 0"


@pytest.mark.parametrize(
    ("spec", "axes", "message"),
    [
        (
            MethodSpec("A", TaskArithmetic(), strength=ALPHA, train="core"),
            [],
            "method A: the reference merges the safety",
        ),
        (
            MethodSpec("A", Sst(), strength=Strengths("t", [5.0])),
            [Axis("method.t", [3.0])],
            "axis method.t: the streng",
        ),
        (
            MethodSpec("A", TaskArithmetic(), strength=ALPHA),
            [Axis("fisher.model.labels", ["data"])],
            "axis fisher.model.labels: the reference needs no Fisher files",
        ),
    ],
)
def test_ablations_refuse_what_a_reference_does_not_read(spec, axes, message):
    with pytest.raises(InputError, match=message):
        Ablations(spec, axes)


def test_a_filter_is_not_measured_at_a_sum_of_experts_that_it_is_not_added_to(recipe):
    grid = Grid(recipe())
    experts = [Cell("fit", f"expert {i}", {"i": i}) for i in range(2)]

    def merges(method, combine, rank=None):
        spec = MethodSpec("A", method=method, combine=combine, strength=Strengths("alpha", [1.0]), rank=rank)
        return grid.merges(spec, experts, experts[0], 0)

    with pytest.raises(InputError, match="method A: combine is Ties, and Fisher passes measure at a plain sum"):
        merges(Sst(), Ties(), 4)
    weights = [
        merge.needs["fisher"][0].settings["model"].get("utility_weights")
        for combine in (Linear(), Concatenate(), TaskArithmetic(), None)
        for _, merge in merges(Sst(), combine)
    ]
    assert weights == [[0.5, 0.5], None, None, None]
    assert len(merges(TaskArithmetic(), Ties(), 4)) == 1


def test_interference_trains_no_cores():
    spec = MethodSpec("A", TaskArithmetic(), TaskArithmetic(), ALPHA, train="core")
    with pytest.raises(InputError, match="method A: this study merges experts as they are; leave train out"):
        Interference("tasks", [2], [spec])


@pytest.mark.parametrize("option", ["limit", "max_new_tokens"])
def test_tasks_that_cannot_be_asked_stop_before_any_training(option):
    with pytest.raises(InputError, match=f"study.experts.{option} is 0; expected at least 1"):
        TaskExperts(**{option: 0})


@pytest.mark.parametrize("seconds", [10.0, 39.0, float("nan")])
def test_claims_of_living_machines_cannot_be_left_behind(recipe, seconds):
    with pytest.raises(InputError, match=f"stale_after is {seconds}; expected at least 40 seconds"):
        experiment(name="x", study=None, recipe=recipe(), seeds=[0], stale_after=seconds)


def test_rows_behind_others_are_drawn_anew_where_experts_are(recipe, tmp_path):
    given = [part(write_rows(tmp_path / "own.jsonl", 9, what="own"), skip, 4) for skip in (0, 4)]
    drawn = {redraw: Grid(recipe(redraw)).drawn_anew(given, 2) for redraw in ("calibration", "experts")}
    seeds = {redraw: [source["seed"] for source in found] for redraw, found in drawn.items()}
    assert seeds == {"calibration": [2, 0], "experts": [2, 2]}


@pytest.mark.parametrize("key", ["reference_safety", "reference_utility", "beside"])
def test_a_key_follows_the_content_of_an_adapter_that_settings_name(tmp_path, key):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    keys = []
    for content in ("one", "other", "one"):
        (adapter / "adapter_model.safetensors").write_text(content)
        os.utime(adapter / "adapter_model.safetensors", ns=(len(keys), len(keys)))
        settings = {"model": {"base": {"name": "hub/x"}, key: {str(adapter): 1.0, "safety": 0.5}}}
        keys.append(Cell("fisher", "x", settings).key)
    assert keys[0] == keys[2] != keys[1]


def test_a_cell_that_was_killed_and_goes_on_has_cost_both_pieces(tmp_path):
    store = Store(tmp_path / "cells", tmp_path / "work")
    killed = []

    def execute(arguments, log_file):
        log_file.parent.mkdir(parents=True, exist_ok=True)
        log_file.write_text("at work")
        if not killed:
            killed.append(log_file)
            later = time.time() + 1000
            os.utime(log_file, (later, later))
            raise KeyboardInterrupt
        return Cost(5.0, 1.0, "p")

    stages = Stages(store, None, execute)
    with pytest.raises(KeyboardInterrupt):
        stages._run("fit", "fit-x", {}, [])
    assert stages._run("fit", "fit-x", {}, [])[0].seconds == pytest.approx(1005, abs=60)
    assert stages._run("fit", "fit-x", {}, [])[0].seconds == 5.0


def test_the_cost_of_a_method_is_the_mean_over_seeds_of_its_whole_path():
    seconds, models = {}, []
    for seed, spent in enumerate(((0.5, 1.5), (1.0, 3.0))):
        expert, passes = Cell("fit", f"expert {seed}", {"toy": seed}), Cell("fisher", f"passes {seed}", {"toy": seed})
        seconds |= {expert.key: 100.0, passes.key: 10.0}
        for strength, one in enumerate(spent):
            settings, needs = {"toy": [seed, strength]}, {"utility": (expert,), "fisher": (passes,)}
            merge = Cell("merge", "merge", settings, needs)
            seconds[merge.key] = one
            models.append(Model("A", float(strength), seed, Cell("test", "test", {}), merge))

    class Spent:
        def has_result(self, cell):
            return True

        def read(self, cell):
            return {"cost": {"seconds": seconds[cell.key], "peak_mb": 1.0, "processor": "toy"}}

    (row,) = cost_table({"A": models}, Spent())["rows"]
    assert (row["merge"], row["fisher"], row["fit"]) == (3.0, 10.0, "")


def test_a_safety_tax_says_where_mixed_training_has_fewer_rows(recipe):
    mixed = MethodSpec("mixed", train="mixed", strength=Strengths("safety_rows", [4.0, 20.0]))
    study = SafetyTax([MethodSpec("TA", TaskArithmetic(), strength=Strengths("alpha", [1.0])), mixed])
    plan = study.plan(Grid(recipe("calibration")), [0])
    assert any(note.startswith("mixed @ 20 has 8 safety rows") for note in plan.notes)
    known = [model("base"), model("utility"), model("safety"), model("TA", 1.0), model("mixed", 4.0)]
    plan = type(plan)(known, notes=plan.notes)
    suites = {"bad": "harmful", "safe": "borderline", "task": "utility"}
    assert plan.notes[0] in study.report(plan, KnownAnswers(suites))["notes"]


def test_a_task_of_which_its_expert_knows_nothing_is_named():
    found = KnownAnswers({"a": "utility"}).read(model("expert a").test)
    nothing = {"found": {"rows": {"a": found["found"]["rows"]["a"] | {"exact": [0] * 5, "ids": list("vwxyz")}}}}
    alone = {("a", 0): found, ("b", 0): nothing | {"settings": found["settings"]}, ("b", 1): nothing}
    (note,) = nothing_alone([model("A (2)")], alone)
    assert note.startswith("Left out: b (seed 0); the expert scores 0 there")
    assert nothing_alone([model("A (2)")], {("a", 0): found}) == []


@pytest.mark.parametrize("epochs", ["2", "two", 2.5, float("inf"), True, [2]])
def test_epochs_that_are_no_number_are_named_before_any_training(recipe, epochs):
    asked = recipe()
    asked.utility.settings = {"trainer": {"max_epochs": epochs}}
    with pytest.raises(InputError, match=r"^settings of utility: trainer.max_epochs is .*; expected a whole number"):
        Grid(asked).utility(0)


@pytest.mark.parametrize(
    ("trainer", "units"),
    [({"max_epochs": 3}, 24.0), ({"max_epochs": None, "max_steps": 5}, None), ({"max_epochs": -1}, None)],
)
def test_the_size_of_a_training_is_known_where_epochs_end_it(recipe, trainer, units):
    asked = recipe()
    asked.utility.settings = {"trainer": trainer}
    assert Grid(asked).utility(0).units == units


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model: [1", "not valid YAML"),
        ("model: é".encode("latin-1"), "not valid YAML"),
        (b"", "expected a mapping of keys to values"),
        (b"- model", "expected a mapping of keys to values"),
    ],
)
def test_a_configuration_that_is_no_mapping_is_named_before_any_training(recipe, tmp_path, content, message):
    asked = recipe()
    asked.safety.config = str(tmp_path / "own.yaml")
    (tmp_path / "own.yaml").write_bytes(content)
    with pytest.raises(InputError, match=rf"own\.yaml: {message}"):
        Grid(asked).safety(0)


@pytest.mark.parametrize("model", ["", "model:\n"])
def test_a_configuration_of_the_passes_may_leave_the_model_out(recipe, tmp_path, model):
    asked = recipe()
    asked.fisher.config = str(tmp_path / "own.yaml")
    (tmp_path / "own.yaml").write_text(f"{model}data: {{batch_size: 2}}\n")
    grid = Grid(asked)
    settings = grid.fisher([grid.utility(0)], grid.safety(0), 0, {}).settings
    assert set(settings["model"]) == {"base", "seed"}
    assert settings["data"]["batch_size"] == 2


def test_a_flag_changes_one_value_of_nested_settings_and_is_no_text(tmp_path):
    parser = StudyParser()
    parser.add_argument("--config", action=ConfigFile)
    parser.add_class_arguments(ExpertSpec, "safety")
    parser.add_argument("--utility", type=ExpertSpec | None)
    parser.add_argument("--experts", type=TaskExperts | None)
    settings = "{data: {window: 16, max_length: 128}, trainer: {max_epochs: 2, precision: '32'}}"
    spec = f"{{train: a.jsonl, val: b.jsonl, settings: {settings}}}"
    (tmp_path / "study.yaml").write_text(f"safety: {spec}\nutility: {spec}\n")
    given = ["data.max_length 256", "model.optimizer.init_args.lr 1e-3", "trainer.logger false", "model.x '2'"]
    given = [one.replace(" ", "=") for one in given]
    flags = [f"--{name}.settings.{one}" for name in ("safety", "utility", "experts") for one in given]
    found = parser.parse_args(["--config", str(tmp_path / "study.yaml"), *flags])
    model = {"optimizer": {"init_args": {"lr": 1e-3}}, "x": "2"}
    own = {"model": model, "data": {"max_length": 256}, "trainer": {"logger": False}}
    assert found.experts.settings == own
    trainer = {"max_epochs": 2, "precision": "32", "logger": False}
    for name in ("safety", "utility"):
        assert found[name].settings == own | {"data": {"window": 16, "max_length": 256}, "trainer": trainer}
