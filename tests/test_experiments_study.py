"""Studies on the tiny model through the whole engine: every command is really run, in this process."""

import io
import json
import shutil
import time
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from src.cli import main
from src.experiments import lineage, stage
from src.experiments.cell_stages import Stages
from src.experiments.command import Cost
from src.experiments.engine import CellError
from src.experiments.study import left_out
from src.fisher.files import load_fisher
from tests.tiny import write_rows

ran = []


def in_process(arguments, log_file):
    """What ``run_command`` does, without a new interpreter for each command."""
    started, errors = time.monotonic(), io.StringIO()
    with redirect_stderr(errors):
        code = main(list(arguments))
    if code:
        raise CellError(errors.getvalue().strip().splitlines()[-1].removeprefix("error: "))
    ran.append(arguments[0])
    return Cost(time.monotonic() - started, 1.0, "this process")


@pytest.fixture(autouse=True)
def _in_process(monkeypatch):
    monkeypatch.setattr(stage, "Stages", partial(Stages, execute=in_process))
    ran.clear()


def recipe(base, rows, *, utility=True):
    quiet = {"trainer": {"max_epochs": 1, "enable_progress_bar": False}, "model": {"lora": {"rank": 2}}}
    expert = {"train": str(rows["task"]), "val": str(rows["val"]), "settings": quiet}
    fisher_settings = {"trainer": {"enable_progress_bar": False}, "data": {"batch_size": 2}}
    suites = [
        {"name": "harmful", "kind": "harmful", "rows": str(rows["eval_harmful"]), "max_new_tokens": 4},
        {"name": "safe", "kind": "borderline", "rows": str(rows["eval_safe"]), "max_new_tokens": 4},
        {"name": "task", "kind": "utility", "rows": str(rows["eval_task"]), "max_new_tokens": 4},
    ]
    found = {
        "base": {"name": str(base), "dtype": "float64"},
        "utility": expert,
        "safety": {"train": str(rows["harmful"]), "val": str(rows["val"]), "config": "safety.yaml", "settings": quiet},
        "fisher": {"safety": str(rows["harmful"]), "utility": str(rows["benign"]), "settings": fisher_settings},
        "evaluation": {"suites": suites, "settings": {"trainer": {"enable_progress_bar": False}}},
    }
    if not utility:
        del found["utility"]
    return found


METHODS = [
    {"name": "TA", "method": {"class_path": "TaskArithmetic"}, "strength": {"values": [0.5, 1.0]}},
    {"name": "SST", "method": {"class_path": "Sst"}, "strength": {"values": [0.5, 1.0]}},
]


def run_study(folder, recipe_of, kind, arguments, *more, name="tiny", seeds=(0,)):
    study = {"class_path": kind, "init_args": arguments}
    config = {"name": name, "study": study, "recipe": recipe_of, "seeds": list(seeds)}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    places = ["--results", str(folder / "cells"), "--work", str(folder / "work")]
    return main(["experiment", "--config", str(path), *places, "--trainer", "cpu.yaml", *more])


def document(folder, name="tiny"):
    return json.loads((folder / "work" / "studies" / name / "study.json").read_text())


@pytest.fixture(scope="module")
def compared(base, rows, tmp_path_factory):
    """A finished comparison of two methods at two strengths; other tests work on copies of it."""
    folder = tmp_path_factory.mktemp("study")
    patch = pytest.MonkeyPatch()
    patch.setattr(stage, "Stages", partial(Stages, execute=in_process))
    ran.clear()
    assert run_study(folder, recipe(base, rows), "Comparison", {"methods": METHODS, "ours": "SST"}) == 0
    patch.undo()
    return folder, list(ran)


@pytest.fixture
def folder(compared, tmp_path):
    return shutil.copytree(compared[0], tmp_path / "copy")


def test_a_path_is_merged_and_evaluated_with_one_command_each(compared):
    _, commands = compared
    assert sorted(commands) == sorted(["fit", "fit", "fisher", "merge", "merge", "test"])


def test_a_comparison_can_be_of_some_of_its_methods_only(base, rows, folder):
    longer = METHODS[0] | {"name": "TIES", "strength": {"values": [0.5]}}
    arguments = {"methods": [*METHODS, longer], "ours": "SST", "only": ["SST"]}
    assert run_study(folder, recipe(base, rows), "Comparison", arguments, name="some") == 0
    assert ran == []
    found = document(folder, "some")
    assert [row["model"].split(" @ ")[0] for row in found["tables"][0]["rows"]] == ["base", "utility", "safety", "SST"]
    assert not any("left out" in note for note in found["notes"])
    (aside,) = (note for note in found["notes"] if note.startswith("Of 3 methods"))
    assert aside.startswith("Of 3 methods 1 are shown")
    assert aside.endswith("the others are TA, TIES.")


def test_a_study_on_given_adapters_gives_what_that_of_their_trainings_gives(base, rows, folder, tmp_path):
    asked = recipe(base, rows)
    for cell in map(json.loads, (path.read_text() for path in (folder / "cells").iterdir())):
        if cell["stage"] == "fit":
            name = cell["label"].partition(",")[0]
            asked[name] = {"adapter": str(shutil.copytree(folder / "work" / "weights" / cell["key"], tmp_path / name))}
    new = tmp_path / "given"
    new.mkdir()
    assert run_study(new, asked, "Comparison", {"methods": METHODS, "ours": "SST"}) == 0
    assert sorted(ran) == ["fisher", "merge", "merge", "test"]
    before, after = document(folder), document(new)
    assert after["summary"] == before["summary"]
    assert after["tables"][0]["title"] == "Chosen on validation rows, measured on test rows"
    assert after["tables"][0]["rows"] == before["tables"][0]["rows"]
    (note,) = (note for note in after["notes"] if note.startswith("Given adapters"))
    assert note.endswith(f"the same for every seed: utility ({tmp_path}/utility), safety ({tmp_path}/safety).")
    copies = [cell["command"] for cell in after["provenance"]["cells"] if cell["stage"] == "given"]
    assert [command[2] for command in copies] == [str(tmp_path / "utility"), str(tmp_path / "safety")]
    assert "given" not in [row["stage"] for row in after["tables"][-1]["rows"]]


def with_further(asked, folder, *names):
    suites = []
    for place, name in enumerate(names or ["more tasks"]):
        path = write_rows(folder / f"further{place}.jsonl", 9 - place, what=f"further{place}")
        suites.append({"name": name, "kind": "utility", "rows": str(path), "max_new_tokens": 4})
    return asked | {"evaluation": asked["evaluation"] | {"further": suites}}


@pytest.mark.parametrize("kind", ["Comparison", "SafetyTax"])
def test_further_suites_are_answered_by_a_finished_study_in_a_command_of_their_own(base, rows, folder, kind):
    before = set((folder / "cells").iterdir())
    own = {"ours": "SST"} if kind == "Comparison" else {}
    asked = with_further(recipe(base, rows), folder)
    assert run_study(folder, asked, kind, {"methods": METHODS} | own, name="more") == 0
    assert sorted(ran) == ["merge", "merge", "test"]  # weights of merges had gone; experts and passes are there
    added = [json.loads(path.read_text()) for path in set((folder / "cells").iterdir()) - before]
    assert [cell["stage"] for cell in added] == ["test"] * 7
    assert {tuple(cell["found"]["rows"]) for cell in added} == {("more tasks",)}
    found = document(folder, "more")
    sizes = {row["model"]: row["utility"]["n"] for row in found["tables"][0]["rows"]}
    if kind == "SafetyTax":
        assert set(sizes.values()) == {9 + 9}
        return
    first = json.loads((folder / "work" / "studies" / "tiny" / "study.json").read_text())
    (before_n,) = {row["utility"]["n"] for row in first["tables"][0]["rows"]}
    assert set(sizes.values()) == {before_n + 9}
    assert [row["model"] for row in found["tables"][0]["rows"]] == [row["model"] for row in first["tables"][0]["rows"]]
    assert any("only report (more tasks): all of their rows are test rows" in note for note in found["notes"])
    (seeds,) = [table for table in found["tables"] if table["title"].startswith("Seed by seed")]
    assert seeds["rows"] == []  # of one seed it would be the first table again
    claimed = [row for row in found["tables"][1]["rows"] if row["measure"] == "utility"]
    assert {row["difference"]["n"] for row in claimed} == {before_n + 9}


def test_a_suite_that_is_added_to_further_ones_undoes_none_of_their_answers(base, rows, folder):
    given = {"methods": METHODS, "ours": "SST"}
    assert run_study(folder, with_further(recipe(base, rows), folder), "Comparison", given, name="one") == 0
    before = set((folder / "cells").iterdir())
    more = with_further(recipe(base, rows), folder, "more tasks", "still more")
    assert run_study(folder, more, "Comparison", given, name="two") == 0
    added = [json.loads(path.read_text()) for path in set((folder / "cells").iterdir()) - before]
    assert len(added) == 7
    assert {tuple(cell["found"]["rows"]) for cell in added} == {("still more",)}
    one, two = (document(folder, name) for name in ("one", "two"))
    sizes = [{row["utility"]["n"] for row in found["tables"][0]["rows"]} for found in (one, two)]
    assert sizes[1] == {n + 8 for n in sizes[0]}
    assert any("only report (more tasks, still more): all" in note for note in two["notes"])


def test_a_point_whose_further_suites_are_left_is_left_out(base, rows, folder):
    asked = with_further(recipe(base, rows), folder)
    given = {"methods": METHODS, "ours": "SST"}
    assert run_study(folder, asked, "Comparison", given, "--compute", "false", name="more") == 0
    found = document(folder, "more")
    assert found["tables"][0]["rows"] == []
    assert any("7 of 7 points" in note for note in found["notes"])


def test_further_suites_are_refused_where_nothing_would_report_them(base, rows, tmp_path, capsys):
    ablations = {"reference": METHODS[1], "axes": [{"option": "method.t", "values": [3.0]}]}
    assert run_study(tmp_path, with_further(recipe(base, rows), tmp_path), "Ablations", ablations) == 2
    assert "evaluation.further: Ablations asks no suites that only report" in capsys.readouterr().err
    twice = with_further(recipe(base, rows), tmp_path, "task")
    assert run_study(tmp_path, twice, "SafetyTax", {"methods": METHODS}) == 2
    assert "several suites are named task; expected different names" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


def test_the_report_says_what_was_measured(compared):
    folder, _ = compared
    found = document(folder)
    models = [row["model"] for row in found["tables"][0]["rows"]]
    assert [model.split(" @ ")[0] for model in models] == ["base", "utility", "safety", "TA", "SST"]
    metrics = {}
    for path in (folder / "cells").glob("*.json"):
        cell = json.loads(path.read_text())
        if cell["stage"] == "test":
            metrics[cell["label"]] = cell
    assert len(metrics) == 7
    base = metrics["base"]
    flags = base["found"]["rows"]["harmful"]["refused"]
    assert sum(flags) == base["found"]["suites"]["harmful"]["refusal"]["hits"]
    assert len(flags) == 7
    assert {claim["claim"] for claim in found["tables"][1]["rows"]} <= {
        "no difference shown",
        "beats it",
        "is beaten by it",
    }
    assert found["provenance"]["asked"]["study"]["ours"] == "SST"
    cells = {row["stage"]: row["cells"] for row in found["tables"][-1]["rows"]}
    assert cells == {"test": 7, "fit": 2, "merge": 4, "fisher": 1}
    costs = next(table for table in found["tables"] if table["title"] == "Cost of the methods")
    assert [bool(row["fisher"]) for row in costs["rows"]] == [False, True]
    assert all(row["merge"] > 0 for row in costs["rows"])


def test_the_page_shows_the_pencil_of_the_chosen_merge_and_the_overlap_of_its_fishers(compared):
    found = document(compared[0])
    (pencil,) = found["pencils"]
    assert pencil["model"].startswith("SST @ ")
    assert pencil["pencil"]["spectrum"]["value"][0] > 0
    assert len(pencil["pencil"]["map"]["kept"]) == len(pencil["pencil"]["map"]["layers"])
    cells = [json.loads(path.read_text()) for path in (compared[0] / "cells").glob("*.json")]
    merges = {cell["label"]: cell["found"] for cell in cells if cell["stage"] == "merge"}
    assert ["pencil" in merges[label] for label in sorted(merges)] == [True, True, False, False]
    (overlap,) = [table for table in found["tables"] if table["title"] == "Overlap of F_s and F_u"]
    assert [row["methods"] for row in overlap["rows"]] == ["SST"]
    assert 0 <= overlap["rows"][0]["least"] <= overlap["rows"][0]["greatest"] <= 90


def test_nothing_is_computed_twice_not_even_by_another_study(folder, base, rows):
    assert run_study(folder, recipe(base, rows), "Comparison", {"methods": METHODS, "ours": "SST"}) == 0
    assert ran == []
    assert run_study(folder, recipe(base, rows), "SafetyTax", {"methods": METHODS[:1]}, name="tax") == 0
    assert ran == []
    taxes = next(table for table in document(folder, "tax")["tables"] if table["title"] == "Safety tax")
    assert [row["model"] for row in taxes["rows"]] == ["TA @ 0.5", "TA @ 1"]


def test_a_new_strength_costs_a_merge_and_an_evaluation(folder, base, rows):
    more = [METHODS[0] | {"strength": {"values": [0.5, 1.0, 1.5]}}]
    assert run_study(folder, recipe(base, rows), "SafetyTax", {"methods": more}, name="tax") == 0
    assert ran == ["merge", "test"]


def test_results_alone_are_enough_on_another_machine(folder, base, rows):
    shutil.rmtree(folder / "work")
    assert run_study(folder, recipe(base, rows), "Comparison", {"methods": METHODS, "ours": "SST"}) == 0
    assert ran == []


def test_weights_that_are_made_again_and_differ_are_told_of(folder, base, rows, monkeypatch, caplog):
    """Another processor ends a training elsewhere; a strength that is added there is of other weights than the rest."""

    def elsewhere(arguments, log_file):
        cost = in_process(arguments, log_file)
        if arguments[0] == "fit":
            file = Path(arguments[arguments.index("--output") + 1]) / "adapter_model.safetensors"
            save_file({name: 1.001 * tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
        return cost

    def told():
        return [note for note in document(folder, "tax")["notes"] if "was trained more than once" in note]

    def add(*values):
        more = [METHODS[0] | {"strength": {"values": [0.5, 1.0, *values]}}]
        assert run_study(folder, recipe(base, rows), "SafetyTax", {"methods": more}, name="tax") == 0

    for path in (folder / "cells").glob("*.json"):
        cell = json.loads(path.read_text())
        assert all(len(hashes) == 1 for hashes in cell["trained"].values())
        assert bool(cell["trained"]) == (cell["label"] != "base")
    monkeypatch.setattr(lineage.log, "handlers", [caplog.handler])  # commands in this process take stderr with them
    shutil.rmtree(folder / "work")
    add(1.5)
    assert ran == ["fit", "fit", "merge", "test"]
    assert told() == []
    assert "trained again" not in caplog.text
    shutil.rmtree(folder / "work")
    first = {path: path.read_text() for path in (folder / "cells").glob("*.json")}
    monkeypatch.setattr(stage, "Stages", partial(Stages, execute=elsewhere))
    add(1.5, 2.0)
    assert caplog.text.count("trained again, and the weights differ from before") == 2
    notes = told()
    assert [note.split(", seed 0")[0] for note in notes] == ["utility", "safety"]
    groups = notes[1].partition("weights: ")[2].split("; ")
    assert "TA, alpha = 1.5, seed 0" in groups[0]
    assert groups[1].endswith(" in TA, alpha = 2, seed 0.")
    # The first machine's results come back, by git say; the weights are still those of the second.
    for path, text in first.items():
        path.write_text(text)
    add(1.5, 2.0, 3.0)
    assert ran[-2:] == ["merge", "test"]
    assert told()[1].endswith(" in TA, alpha = 2, seed 0, TA, alpha = 3, seed 0.")


def test_a_work_folder_may_lie_beside_this_one(folder, base, rows, monkeypatch):
    """Answers of a model that is called ``../work/weights/KEY``."""
    (folder / "here").mkdir()
    monkeypatch.chdir(folder / "here")
    for path in (folder / "cells").glob("*.json"):
        if json.loads(path.read_text())["stage"] == "test":
            path.unlink()
    assert run_study(Path(".."), recipe(base, rows), "SafetyTax", {"methods": METHODS[:1]}, name="tax") == 0
    assert ran == ["merge", "test"]
    assert len(document(folder, "tax")["tables"][0]["rows"]) == 5


def test_prompts_are_shown_and_not_kept(folder, base, rows):
    asked = [json.loads(line)["prompt"].strip() for line in rows["eval_harmful"].read_text().splitlines()]
    kept = "".join(path.read_text() for path in (folder / "cells").glob("*.json"))
    assert not any(json.dumps(prompt) in kept for prompt in asked)
    shown = [one["prompt"] for one in document(folder)["examples"] if one["suite"] == "harmful"]
    assert shown
    assert set(shown) <= set(asked)
    given = {"methods": METHODS, "ours": "SST"}
    assert run_study(folder, recipe(base, rows), "Comparison", given, "--prompts", "false") == 0
    assert {one["prompt"] for one in document(folder)["examples"]} == {None}
    assert "left out" in (folder / "work" / "studies" / "tiny" / "index.html").read_text()
    assert ran == []


def test_the_report_of_an_unfinished_study_computes_nothing(folder, base, rows):
    for path in (folder / "cells").glob("*.json"):
        if json.loads(path.read_text())["label"].startswith("TA, alpha = 1,"):
            path.unlink()
    given = {"methods": METHODS, "ours": "SST"}
    assert run_study(folder, recipe(base, rows), "Comparison", given, "--compute", "false") == 0
    assert ran == []
    found = document(folder)
    assert found["notes"][0] == "TA @ 1 is left out: not computed or failed (1 of 7 points)."
    chosen = [row["model"] for row in found["tables"][0]["rows"]]
    assert "TA @ 0.5" in chosen


def test_the_note_on_what_is_left_out_names_a_path_once():
    assert left_out([], 7) == []
    names = ["base", "mixed, plain", "A @ 0.5", "A @ 1", "B, post hoc @ 2"]
    others = "mixed, plain; A @ 0.5, 1; B, post hoc @ 2"
    assert left_out(names, 9) == [f"base is left out, and so are {others}: not computed or failed (5 of 9 points)."]


def test_a_dry_run_lists_cells_and_time_and_writes_nothing(folder, base, rows, capsys):
    before = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".yaml")
    more = [METHODS[0] | {"strength": {"values": [0.5, 1.0, 1.5]}}]
    capsys.readouterr()
    arguments = {"methods": more}
    assert (
        run_study(folder, recipe(base, rows), "SafetyTax", arguments, "--dry_run", name="more") == 0
    )  # a flag alone is true
    lines = capsys.readouterr().out.splitlines()
    # base, two experts and their training, three merges, and the models' evaluations
    assert lines[-1].startswith("11 cells, 9 cached, 2 to do, ")
    assert lines[-1].endswith("min expected")
    assert [line.split()[1] for line in lines[:-1] if "to do" in line] == ["merge", "test"]
    assert sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".yaml") == before


def test_a_method_that_cannot_work_is_reported_and_the_rest_stands(folder, base, rows, capsys):
    # Full rank before KnOTS: only merge says that it takes none.
    bad = {"name": "TIES", "combine": {"class_path": "Ties"}, "method": {"class_path": "Knots"}, "rank": 4}
    bad |= {"strength": {"values": [0.5, 1.0]}}
    arguments = {"methods": [*METHODS, bad], "ours": "SST"}
    assert run_study(folder, recipe(base, rows), "Comparison", arguments) == 2
    error = capsys.readouterr().err
    assert "2 of 18 cells failed: TIES, alpha = 0.5, seed 0 and TIES, alpha = 1, seed 0: " in error
    assert "--rank" in error
    assert "2 more cells need them" in error
    found = document(folder)
    assert len(found["tables"][0]["rows"]) == 5
    assert sum(note.startswith("Failed: TIES") for note in found["notes"]) == 2
    assert any(note.startswith("TIES @ 0.5 is left out") for note in found["notes"])


def test_mixed_training_is_a_method_of_the_grid(folder, base, rows):
    mixed = {"name": "mixed", "train": "mixed", "strength": {"option": "safety_rows", "values": [2, 4]}}
    assert run_study(folder, recipe(base, rows), "SafetyTax", {"methods": [mixed]}, name="mixed") == 0
    assert ran == ["fit", "fit", "test"]
    trained = [json.loads(path.read_text()) for path in (folder / "cells").glob("*.json")]
    counts = {one["label"]: one["found"]["rows"]["train"] for one in trained if one["stage"] == "fit"}
    assert counts["mixed, safety_rows = 2, seed 0"] == 13 + 2
    assert counts["mixed, safety_rows = 4, seed 0"] == 13 + 4


def test_strengths_that_nothing_can_choose_are_refused_before_anything_runs(base, rows, tmp_path, capsys):
    given = recipe(base, rows)
    given["evaluation"]["further"] = [given["evaluation"]["suites"].pop(0)]
    assert run_study(tmp_path, given, "Comparison", {"methods": METHODS, "ours": "SST"}, name="none") == 2
    assert "recipe.evaluation.suites: no suite of kind harmful or jailbreak" in capsys.readouterr().err
    assert ran == []


def test_a_page_says_where_mixed_training_has_fewer_rows_than_asked_for(base, rows, tmp_path):
    given = recipe(base, rows)
    given["safety"]["train"] = [str(rows["harmful"]), {"path": str(rows["benign"]), "limit": 2}]
    mixed = {"name": "mixed", "train": "mixed", "strength": {"option": "safety_rows", "values": [2, 4, 10]}}
    ours = METHODS[0] | {"strength": {"values": [0.5, 0.7, 1.0]}}
    arguments = {"methods": [ours, mixed], "ours": "TA"}
    assert run_study(tmp_path, given, "Comparison", arguments, "--compute", "false", name="short") == 0
    (note,) = [note for note in document(tmp_path, "short")["notes"] if note.startswith("mixed")]
    assert note == "mixed @ 10 has 7 safety rows: each source gives an equal share, as far as it has so many."


def test_models_that_a_study_names_are_known_by_their_whole_content(tmp_path):
    from src.experiments.content import base_content, identified

    for name, byte in (("one", b"a"), ("two", b"b")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(bytes(2**24) + byte)
    one, two = (str(tmp_path / name) for name in ("one", "two"))
    assert base_content(one) != base_content(two)
    for stage_, settings in (
        ("merge", lambda model: {"method": {"class_path": "SafeLora", "init_args": {"aligned": model}}}),
        ("test", lambda model: {"data": {"suites": [{"judge": {"class_path": "C", "init_args": {"name": model}}}]}}),
        ("fit", lambda model: {"model": {"base": {"name": model}}}),
    ):
        assert identified(stage_, settings(one)) != identified(stage_, settings(two))
        assert one not in str(identified(stage_, settings(one)))
        assert "some/model" in str(identified(stage_, settings("some/model")))


def test_mixed_training_sees_the_rows_that_a_calibration_has(folder, base, rows):
    """Its rows are added to its own, and a draw from them is another one for every seed."""
    benign = {"path": str(rows["benign"]), "seed": 7, "limit": 3}
    mixed = {"name": "mixed", "train": "mixed", "strength": {"option": "safety_rows", "values": [2]}, "rows": benign}
    arguments = {"methods": [mixed]}
    assert run_study(folder, recipe(base, rows), "SafetyTax", arguments, name="mixed", seeds=(0, 1)) == 0
    cells = [json.loads(path.read_text()) for path in (folder / "cells").glob("*.json")]
    fits = {one["label"]: one for one in cells if one["stage"] == "fit"}
    for seed in (0, 1):
        fit = fits[f"mixed, safety_rows = 2, seed {seed}"]
        assert fit["found"]["rows"]["train"] == 13 + 3 + 2
        assert [s["seed"] for s in fit["settings"]["data"]["train"] if s["path"] == str(rows["benign"])] == [7 + seed]


def test_trainings_beside_other_experts_are_methods_of_the_grid(folder, base, rows):
    """Fine-tuning of the core, and AlignGuard in training: trainings that need cells of their own."""
    guard = {"class_path": "AlignGuard", "init_args": {"k": 4}}
    methods = [
        METHODS[0] | {"name": "core", "train": "core", "settings": {"trainer": {"max_epochs": 1}}},
        {
            "name": "AlignGuard",
            "train": "beside_safety",
            "settings": {"model": {"regularizer": guard}},
            "strength": {"option": "model.regularizer.init_args.align", "values": [0.1, 1000.0]},
        },
        {"name": "in turn", "train": "beside_safety", "strength": {"option": "none", "values": [1.0]}},
    ]
    assert run_study(folder, recipe(base, rows), "SafetyTax", {"methods": methods}, name="beside") == 0
    assert (ran.count("fit"), ran.count("fisher")) == (4, 1)
    cells = [json.loads(path.read_text()) for path in (folder / "cells").glob("*.json")]
    counts = {one["label"]: one["found"]["rows"]["train"] for one in cells if one["stage"] == "fit"}
    assert counts["core, core, seed 0"] == 7 + 9
    found = document(folder, "beside")
    expected = {"core @ 0.5", "AlignGuard @ 0.1", "AlignGuard @ 1000", "in turn"}
    assert expected <= {row["model"] for row in found["tables"][0]["rows"]}
    spent = next(table for table in found["tables"] if table["title"] == "Cost of the methods")["rows"]
    fisher = {row["method"]: row["fisher"] for row in spent}
    assert fisher["AlignGuard"] > 0
    assert fisher["core"] == fisher["in turn"] == ""
    assert all(row["fit"] > 0 for row in spent)


def test_a_second_step_measures_at_the_merge_of_the_first(folder, base, rows):
    relearn = {"class_path": "Sst", "init_args": {"coefficients": "relearn"}}
    twice = {"name": "twice", "method": relearn, "first": {"method": relearn, "alpha": 1.5}}
    methods = [twice | {"fisher": {"model": {"relearn": True}}, "strength": {"values": [0.5, 1.0]}}]
    assert run_study(folder, recipe(base, rows), "SafetyTax", {"methods": methods}, name="twice") == 0
    assert ran == ["fisher", "merge", "fisher", "merge", "test"]
    cells = [json.loads(path.read_text()) for path in (folder / "cells").glob("*.json")]
    first = next(one for one in cells if one["label"] == "twice, first step, alpha = 1.5, seed 0")
    second = next(one for one in cells if one["label"] == "Fisher at twice, first step, alpha = 1.5, seed 0")
    assert second["needs"]["first"] == [first["key"]]
    assert first["found"]["alpha"] == 1.5
    file = load_fisher(folder / "work" / "weights" / second["key"] / "safety.safetensors")
    assert file.start is not None
    assert list(file.record["reference"]) == [str(folder / "work" / "weights" / first["key"])]
    assert {"twice @ 0.5", "twice @ 1"} <= {row["model"] for row in document(folder, "twice")["tables"][0]["rows"]}


def test_a_third_step_has_two_before_it(folder, base, rows, capsys):
    """The passes of the second are at the first's merge, those of the third at the second's."""
    relearn = {"class_path": "Sst", "init_args": {"coefficients": "relearn", "radius": 0.6}}
    half = {"method": {"class_path": "TaskArithmetic"}, "alpha": 0.5}
    methods = [
        {"name": "thrice", "method": relearn, "first": {"method": relearn, "first": half}}
        | {"fisher": {"model": {"relearn": True}}, "strength": {"option": "t", "values": [4.0, 2.0]}}
    ]
    assert run_study(folder, recipe(base, rows), "SafetyTax", {"methods": methods}, name="thrice") == 0
    assert ran == ["merge", "fisher", "merge", "fisher", "merge", "test"]
    found = [json.loads(path.read_text()) for path in (folder / "cells").glob("*.json")]
    cells = {one["label"]: one for one in found}
    names = ["thrice, first step, first step, alpha = 0.5", "thrice, first step, alpha = 1"]
    for name in names:
        passes, merge = cells[f"Fisher at {name}, seed 0"], cells[f"{name}, seed 0"]
        assert passes["needs"]["first"] == [merge["key"]]
    assert cells[f"{names[1]}, seed 0"]["needs"]["fisher"] == [cells[f"Fisher at {names[0]}, seed 0"]["key"]]
    plain = [{"name": "wrong", "method": relearn, "first": half | {"first": half}}]
    capsys.readouterr()
    assert run_study(folder, recipe(base, rows), "SafetyTax", {"methods": plain}, name="wrong") == 2
    assert "method wrong, first step: first is for a method with coefficients relearn" in capsys.readouterr().err


def test_averages_by_fisher_files_of_whole_weights_are_methods_of_the_grid(folder, base, rows):
    """As in configs/comparison.yaml: passes of their own, over those of the study."""
    own = {"coordinates": "weight", "reference_safety": {"safety": 1.0}, "halves": False}
    asked = {"Fisher average": ("FisherAverage", "diagonal", 4), "RegMean": ("RegMean", "kronecker", None)}
    methods = [
        {
            "name": name,
            "method": {"class_path": kind},
            "strength": {"values": [0.5, 1.0]},
            "fisher": {"model": own | {"representation": form}},
            "rank": rank,
        }
        for name, (kind, form, rank) in asked.items()
    ]
    assert run_study(folder, recipe(base, rows), "SafetyTax", {"methods": methods}, name="averages") == 0
    assert sorted(ran) == ["fisher", "fisher", "merge", "merge", "test"]
    found = document(folder, "averages")
    assert [entry["model"] for entry in found["pencils"]] == []
    assert not [table for table in found["tables"] if table["title"] == "Overlap of F_s and F_u" and table["rows"]]


def test_led_has_its_magnitudes_measured_at_the_experts_and_at_the_base(folder, base, rows, capsys):
    """Passes as in configs/comparison.yaml; the path is over the weight of the safety update."""
    own = {"coordinates": "weight", "representation": "magnitude", "labels": "data", "halves": False}
    spec = {
        "name": "LED",
        "method": {"class_path": "Led"},
        "strength": {"option": "weight_safety", "values": [0.5, 1.0]},
        "fisher": {"model": own | {"reference_safety": {"safety": 1.0}, "relearn": False}},
        "rank": 4,
    }
    assert run_study(folder, recipe(base, rows), "SafetyTax", {"methods": [spec]}, name="led") == 0
    assert ran == ["fisher", "fisher", "merge", "test"]
    found = [json.loads(path.read_text()) for path in (folder / "cells").glob("*.json")]
    cells = {one["label"]: one for one in found if one["stage"] in ("fisher", "merge")}
    merges = [cells[f"LED, weight_safety = {value:g}, seed 0"] for value in (0.5, 1)]
    assert [merge["found"]["settings"]["weight_safety"] for merge in merges] == [0.5, 1.0]
    weights = {name: folder / "work" / "weights" / cells[name]["key"] for name in cells if name.startswith("Fisher at")}
    ((name, at_base),) = weights.items()
    assert name == "Fisher at the base, seed 0"
    assert merges[0]["needs"]["base_fisher"] == [at_base.name]
    for one in ("safety", "utility"):
        assert load_fisher(at_base / f"{one}.safetensors").record["reference"] == "base"
    capsys.readouterr()
    named = [spec | {"method": {"class_path": "Led", "init_args": {"base_fisher": str(at_base)}}}]
    assert run_study(folder, recipe(base, rows), "SafetyTax", {"methods": named}, name="named") == 2
    assert "method LED: leave base_fisher out; a study measures at the base itself" in capsys.readouterr().err


def test_ablations_change_one_setting_and_share_the_rest(folder, base, rows):
    axes = [{"option": "method.t", "values": [3.0]}, {"option": "fisher.model.labels", "values": ["data"]}]
    arguments = {"reference": METHODS[1], "axes": axes, "choice": {"share": 0.6}, "methods": [METHODS[0]]}
    assert run_study(folder, recipe(base, rows), "Ablations", arguments, name="ablations") == 0
    assert sorted(ran) == ["fisher", "merge", "merge", "test"]
    tables = document(folder, "ablations")["tables"]
    names = [row["model"].split(" @ ")[0] for row in tables[0]["rows"]]
    assert names == ["base", "utility", "safety", "SST", "method.t = 3.0", "fisher.model.labels = data", "TA"]
    assert not any("at equal refusal" in table["title"] for table in tables)  # this model refuses nothing


def test_ablations_compare_paths_at_equal_refusal_where_they_meet(folder, base, rows, monkeypatch):
    monkeypatch.setattr("src.experiments.ablations.meets", bool)
    axes = [{"option": "method.t", "values": [3.0]}]
    arguments = {"reference": METHODS[1], "axes": axes, "choice": {"share": 0.6}, "methods": [METHODS[0]]}
    assert run_study(folder, recipe(base, rows), "Ablations", arguments, name="ablations") == 0
    tables = document(folder, "ablations")["tables"]
    equal = {
        one["title"]: [row["other"] for row in one["rows"]] for one in tables if "at equal refusal" in one["title"]
    }
    assert equal == {
        "SST at equal refusal (validation rows)": ["method.t = 3.0", "TA"],
        "TA at equal refusal (validation rows)": ["SST", "method.t = 3.0"],
    }


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    for name in ("one", "two", "three"):
        write_rows(folder / f"{name}.train.jsonl", 8, what=f"{name} train")
        write_rows(folder / f"{name}.test.jsonl", 5, what=f"{name} test")
    index = [{"task": "two", "metric": "rougeL"}, {"task": "one"}, {"task": "three", "metric": "exact"}]
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def test_interference_merges_growing_numbers_of_experts(tasks, base, rows, tmp_path):
    asked = recipe(base, rows, utility=False)
    asked["evaluation"]["suites"] = asked["evaluation"]["suites"][:1]
    method = {
        "name": "sum",
        "combine": {"class_path": "TaskArithmetic"},
        "method": {"class_path": "TaskArithmetic"},
        "strength": {"values": [1.0]},
    }
    experts = {"settings": asked["safety"]["settings"], "val_rows": 2, "max_new_tokens": 4}
    arguments = {"tasks": str(tasks), "counts": [2, 3], "methods": [method], "experts": experts}
    assert run_study(tmp_path, asked, "Interference", arguments) == 0
    assert ran.count("fit") == 4
    assert ran.count("inspect") == 1
    records = [json.loads(path.read_text()) for path in (tmp_path / "cells").glob("*.json")]
    (geometry,) = [record for record in records if record["stage"] == "inspect"]
    assert {"cosines", "columns", "rows"} <= set(geometry["found"])
    assert "angles" not in geometry["found"]
    found = document(tmp_path)
    titles = [table["title"] for table in found["tables"]]
    assert "Angles between experts" in titles
    assert "Performance kept, task by task" in titles
    sizes = found["tables"][titles.index("Rank and energy kept")]["rows"]
    assert [row["form"] for row in sizes] == ["exact", "exact"]
    # Two and three experts of rank 2 and a safety expert of rank 2, nothing cut off.
    assert [(row["rank"], row["energy"]) for row in sizes] == [(6.0, 1.0), (8.0, 1.0)]
    assert [row["model"].split(",")[0] for row in sizes] == ["2 experts", "3 experts"]


def test_experts_that_are_averaged_have_their_fisher_measured_at_the_average(tasks, base, rows, tmp_path):
    mean = {
        "name": "average, SST",
        "combine": {"class_path": "Linear"},
        "method": {"class_path": "Sst"},
        "strength": {"values": [1.0]},
    }
    asked = recipe(base, rows, utility=False)
    asked["evaluation"]["suites"] = asked["evaluation"]["suites"][:1]
    experts = {"settings": asked["safety"]["settings"], "val_rows": 2, "max_new_tokens": 4}
    arguments = {"tasks": str(tasks), "counts": [2, 3], "methods": [mean], "experts": experts}
    assert run_study(tmp_path, asked, "Interference", arguments) == 0
    cells = [json.loads(path.read_text()) for path in (tmp_path / "cells").glob("*.json")]
    weights = [cell["settings"]["model"]["utility_weights"] for cell in cells if cell["stage"] == "fisher"]
    assert sorted(weights) == [[1 / 3] * 3, [1 / 2] * 2]


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("Comparison", {"methods": METHODS, "ours": "nobody"}, "study.ours is nobody"),
        ("Comparison", {"methods": METHODS, "ours": "SST", "only": ["TA"]}, "leaves out study.ours, which is SST"),
        (
            "Comparison",
            {"methods": METHODS, "ours": "SST", "only": ["SST", "TIES"]},
            "only names TIES; expected some of: TA, SST",
        ),
        ("Comparison", {"methods": [METHODS[0], METHODS[1] | {"strength": {"values": [1]}}], "ours": "SST"}, "equal"),
        ("SafetyTax", {"methods": [METHODS[0], METHODS[0]]}, "names are TA, TA"),
        ("SafetyTax", {"methods": [METHODS[0] | {"name": "base"}]}, "names are base"),
        ("SafetyTax", {"methods": [{"name": "x"}]}, "expected one of method, combine and train"),
        ("SafetyTax", {"methods": [METHODS[0] | {"train": "mixed"}]}, "train takes neither method nor combine"),
        ("SafetyTax", {"methods": [{"name": "x", "train": "core"}]}, "train core needs a method"),
        ("SafetyTax", {"methods": [METHODS[1] | {"first": {"method": METHODS[1]["method"]}}]}, "coefficients relearn"),
        (
            "SafetyTax",
            {
                "methods": [
                    METHODS[1]
                    | {"method": {"class_path": "Sst", "init_args": {"coefficients": "relearn"}}}
                    | {"first": {"method": {"class_path": "TaskArithmetic"}, "alpha": 0.5}}
                    | {"fisher": {"model": {"reference_safety": "patched"}}}
                ]
            },
            "not both",
        ),
        ("Interference", {"tasks": "nowhere", "counts": [2], "methods": METHODS}, "expected combine"),
        ("Ablations", {"reference": METHODS[1], "axes": [{"option": "colour", "values": [1]}]}, "axis colour"),
    ],
)
def test_settings_that_contradict_each_other_are_one_line(base, rows, tmp_path, capsys, kind, arguments, message):
    assert run_study(tmp_path, recipe(base, rows), kind, arguments) == 2
    (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error: ")]
    assert message in line
    assert not (tmp_path / "work").exists()
