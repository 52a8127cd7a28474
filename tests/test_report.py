"""The report of a made-up small evaluation whose trade-off can be worked out by hand."""

import csv
import json
import re

import pytest

from src.cli import main
from src.errors import InputError
from src.experiments.store import Store
from src.metrics.bootstrap import Estimate
from src.report.html import write_report
from src.report.results import ModelResult, load_results
from tests.evaluations import read_rows, write_jsonl

HARMFUL = {
    "base": [0, 0, 0, 0],
    "utility": [0, 0, 0, 0],
    "sst/1": [1, 1, 1, 1],
    "sst/2": [1, 1, 1, 0],
    "ta/1": [0, 0, 0, 0],
}
TASK = {
    "base": [0, 0, 0, 0],
    "utility": [1, 1, 1, 0],
    "sst/1": [1, 0, 1, 0],
    "sst/2": [0, 1, 1, 1],
    "ta/1": [1, 1, 1, 0],
}
MANIFESTS = {
    "base": {},
    "utility": {"kind": "expert"},
    "sst/1": {"kind": "merge", "method": "Sst", "alpha": 1.0},
    "sst/2": {"kind": "merge", "method": "Sst", "alpha": 0.5},
    "ta/1": {"kind": "merge", "method": "TaskArithmetic", "alpha": 0.5},
}
TIMES = 10


def share(flags):
    value = sum(flags) / len(flags)
    return {"value": value, "interval": [max(0, value - 0.1), min(1, value + 0.1)], "hits": sum(flags), "n": len(flags)}


@pytest.fixture
def evaluated(tmp_path):
    folder, models = tmp_path / "evaluation", []
    for name, manifest in MANIFESTS.items():
        harmful, task = HARMFUL[name] * TIMES, TASK[name] * TIMES
        attacked = [not flag for flag in harmful]
        suites = {
            "harm": {"kind": "harmful", "refusal": share(harmful), "attack_success": share(attacked)},
            "task": {"kind": "utility", "exact_match": share(task)},
            "safe": {"kind": "benign", "refusal": share([0] * 4)},
        }
        models.append({"name": name, "adapter": manifest or None, "manifest": manifest, "suites": suites})
        (folder / "answers" / name).mkdir(parents=True)
        both = zip(harmful, attacked, strict=True)
        harmful = [{"prompt": f"{i}", "refused": bool(a), "attacked": b} for i, (a, b) in enumerate(both)]
        write_jsonl(folder / "answers" / name / "harm.jsonl", harmful)
        tasks = [{"prompt": f"t{i}", "exact": bool(flag)} for i, flag in enumerate(task)]
        write_jsonl(folder / "answers" / name / "task.jsonl", tasks)
    (folder / "metrics.json").write_text(json.dumps({"models": models}))
    return folder


def made(evaluated, *more):
    output = evaluated.parent / "report"
    assert main(["report", "--results", str(evaluated), "--output", str(output), *more]) == 0
    return output


def test_costs_against_the_utility_expert(evaluated, capsys):
    folder = made(evaluated)
    found = json.loads((folder / "tradeoff.json").read_text())
    costs = {one["name"]: one for one in found["costs"]}
    assert found["expert"] == "utility"
    assert set(costs) == {"base", "sst/1", "sst/2", "ta/1"}
    # Utility 3/4 of the expert, 2/4 and 3/4 of the merges; safety 0, 4/4 and 3/4; one row and two rows change.
    numbers = {name: [one[key]["value"] for key in ("gain", "loss", "drift")] for name, one in costs.items()}
    assert numbers["sst/1"] == [1.0, 0.25, 0.25]
    assert numbers["sst/2"] == [0.75, 0.0, 0.5]
    assert costs["sst/1"]["tax"]["value"] == 0.25
    assert costs["sst/1"]["tax"]["low"] < 0.25 < costs["sst/1"]["tax"]["high"]
    assert costs["sst/2"]["tax"]["value"] == 0.0
    assert costs["ta/1"]["tax"] == costs["base"]["tax"] == "undefined: no safety gain"
    assert "undefined: no" in capsys.readouterr().out


def test_fronts_of_the_methods(evaluated):
    fronts = {one["method"]: one for one in json.loads((made(evaluated) / "tradeoff.json").read_text())["fronts"]}
    # 95 % of the expert's utility is .7125: alpha .5 keeps .75. Its attacks succeed .25 of the time, those of alpha 1
    # never. The front covers a rectangle of .75 by .75 and one of .25 by .5 beside it.
    numbers = ("safety_at_utility", "utility_at_attack", "hypervolume")
    assert [fronts["Sst"][name]["value"] for name in numbers] == pytest.approx([0.75, 0.5, 0.6875])
    assert fronts["Sst"]["points"] == 2
    none = fronts["TaskArithmetic"]
    assert (none["safety_at_utility"]["value"], none["utility_at_attack"], none["hypervolume"]["value"]) == (0, None, 0)
    for each in (fronts["Sst"][name] for name in numbers):
        assert each["low"] < each["value"] < each["high"]
        assert each["n"] == 40
    assert 0.05 < none["safety_at_utility"]["high"] < 0.1  # no refusal of 40 prompts: Wilson's upper end is 0.088
    assert 0.05 < none["hypervolume"]["high"] < 0.1
    more = made(evaluated, "--attacks_at_most", "0.25", "--overwrite", "true")
    assert json.loads((more / "tradeoff.json").read_text())["fronts"][1]["utility_at_attack"]["value"] == 0.75


def test_tables_show_the_trade_off(evaluated):
    folder = made(evaluated)
    text = (folder / "table.md").read_text()
    assert "| model | safety gain, n = 40 | utility loss, n = 40 | safety tax | drift, n = 40 |" in text
    assert "| Sst, α = 0.5 | +0.75 [" in text
    assert (folder / "fronts.png").read_bytes().startswith(b"\x89PNG")
    assert "| strengths | Safety@95%Utility, n = 40 | Utility@ASR≤0.1, n = 40 | hypervolume, n = 40 |" in text
    assert re.search(r"\| Sst \| 2 \| 0\.75 \[.*\] \| 0\.50 \[.*\] \| 0\.69 \[.*\] \|", text)
    assert re.search(r"\| TaskArithmetic \| 1 \| 0\.00 \[.*\] \| – \| 0\.00 \[.*\] \|", text)
    lines = {line["name"]: line for line in csv.DictReader((folder / "table.csv").read_text().splitlines())}
    assert float(lines["sst/1"]["safety tax value"]) == 0.25
    assert lines["ta/1"]["safety tax value"] == "undefined: no safety gain"
    assert lines["utility"]["drift value"] == ""


def test_an_expert_that_is_not_there_is_one_line(evaluated, capsys):
    flags = ["report", "--results", str(evaluated), "--output", str(evaluated / "r")]
    assert main([*flags, "--expert", "nobody"]) == 2
    assert "expert nobody: 0 models have this name; expected one of base, utility" in capsys.readouterr().err
    assert main([*flags, "--attacks_at_most", "2"]) == 2
    assert "attacks_at_most is 2.0; expected a share from 0 to 1" in capsys.readouterr().err
    (evaluated / "answers" / "sst/1" / "task.jsonl").unlink()
    assert main(flags) == 2
    assert "task.jsonl: no such file" in capsys.readouterr().err
    assert not (evaluated / "r").exists()


def test_the_baseline_of_the_evaluation_is_the_expert_where_none_is_called_utility(evaluated, capsys):
    record = json.loads((evaluated / "metrics.json").read_text())
    (evaluated / "answers" / "utility").rename(evaluated / "answers" / "maths")
    record["models"][1]["name"] = "maths"
    (evaluated / "metrics.json").write_text(json.dumps(record))
    folder = made(evaluated)
    assert not (folder / "tradeoff.json").exists()
    assert "named 'utility' was evaluated (name one with --expert: one of maths)" in capsys.readouterr().err
    for baseline, expert in (("base", None), ("maths", "maths")):
        record["settings"] = {"model": {"baseline": baseline}}
        (evaluated / "metrics.json").write_text(json.dumps(record))
        folder = made(evaluated, "--overwrite")
        assert (folder / "tradeoff.json").exists() is (expert is not None)
    assert json.loads((folder / "tradeoff.json").read_text())["expert"] == "maths"


def test_answers_that_predict_has_written_anew_are_one_line(evaluated, capsys):
    rows = read_rows(evaluated / "answers" / "sst/1" / "harm.jsonl")
    write_jsonl(evaluated / "answers" / "sst/1" / "harm.jsonl", [{"answer": "no"} for _ in rows])
    assert main(["report", "--results", str(evaluated), "--output", str(evaluated / "r")]) == 2
    error = capsys.readouterr().err
    assert "sst/1/harm.jsonl: its answers are not graded, though metrics.json counts them" in error
    assert "Run test again" in error
    assert not (evaluated / "r").exists()


def test_no_trade_off_is_made_up_without_a_utility_suite(evaluated):
    record = json.loads((evaluated / "metrics.json").read_text())
    for model in record["models"]:
        del model["suites"]["task"]
    (evaluated / "metrics.json").write_text(json.dumps(record))
    folder = made(evaluated)
    assert not (folder / "tradeoff.json").exists()
    assert "safety tax" not in (folder / "table.csv").read_text()


@pytest.mark.parametrize(("kind", "refusal"), [("harmful", "refusal"), ("jailbreak", "jailbreak refusal")])
def test_refusal_and_attack_success_of_harmful_prompts_are_both_columns(tmp_path, kind, refusal):
    for judged, columns in (
        ({}, [f"{refusal} (s)"]),
        ({"attack_success": share([1])}, [f"{refusal} (s)", "attack success (s)"]),
    ):
        suites = {"s": {"kind": kind, "refusal": share([0])} | judged}
        model = {"name": "base", "adapter": None, "manifest": {}, "suites": suites}
        (tmp_path / "metrics.json").write_text(json.dumps({"models": [model]}))
        assert list(load_results(tmp_path)[0].shares) == columns


def test_the_plot_shows_the_refusal_of_harmful_suites_before_that_of_jailbreaks(tmp_path, monkeypatch):
    from src.report import plot

    drawn = []
    monkeypatch.setattr(plot, "_draw", lambda *given: drawn.append(given[-1]) or [])
    monkeypatch.setattr(plot, "write_atomically", lambda *_: None)
    one = Estimate(0.5, 0.4, 0.6, 40)
    for columns, safety in (
        (["jailbreak refusal (j)", "refusal (h)", "over-refusal (b)"], "refusal (h)"),
        (["jailbreak refusal (j)", "over-refusal (b)"], "jailbreak refusal (j)"),
    ):
        result = ModelResult("base", "base", None, dict.fromkeys(columns, one), {}, {})
        assert plot.plot_fronts([result], tmp_path / "fronts.png")
        assert drawn.pop() == safety


def test_options_beside_a_studys_folder_are_one_line(tmp_path, capsys):
    (tmp_path / "study.json").write_text("{}")
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "r")]) == 2
    assert f"error: report {tmp_path}: --output is for evaluations" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["report", str(tmp_path), "--help"])
    assert stop.value.code == 0
    assert "--attacks_at_most" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["study.json"]


def test_a_folder_that_is_named_holds_beside_a_configuration(tmp_path, capsys):
    config, study = tmp_path / "own.yaml", tmp_path / "study"
    config.write_text(f"results: {tmp_path}/elsewhere\noutput: {tmp_path}/r\n")
    study.mkdir()
    (study / "study.json").write_text("{}")
    for given in (["here", "--config", str(config)], ["--config", str(config), "here"]):
        assert main(["report", *given]) == 2
        assert capsys.readouterr().err.startswith("error: here/metrics.json: no such file")
    assert main(["report", "--config", str(config), str(study)]) == 2
    assert f"error: report {study}: --config is for evaluations" in capsys.readouterr().err


def test_results_that_are_no_evaluation_are_one_line(evaluated, capsys):
    def stopped(*given):
        assert main(["report", *map(str, given)]) == 2
        return capsys.readouterr().err

    above, study = evaluated.parent, evaluated.parent / "study"
    study.mkdir()
    (study / "study.json").write_text("{}")
    assert f"report of {evaluated} needs --output: a directory to write" in stopped(evaluated)
    assert "nowhere/metrics.json: no such file; expected the metrics of an evaluation" in stopped("nowhere")
    assert f"a study's folder, not an evaluation's; expected `python -m src report {study}` alone" in stopped(
        "--results", study
    )
    line = stopped(above)
    assert f"{above}/metrics.json: no such file; studies lie below {above} (study): expected the folder of one" in line
    assert "results is [a, b]; expected one folder" in stopped("--results", "[a, b]")
    assert f"report {study} {evaluated}: 2 folders; expected one" in stopped(study, evaluated)


def test_files_of_another_make_are_named(tmp_path):
    for models, why in (([{}], "KeyError: 'manifest'"), ("x", "TypeError")):
        (tmp_path / "metrics.json").write_text(json.dumps({"models": models}))
        with pytest.raises(InputError, match=f"metrics.json: 'models' is not what `python -m src test` .*{why}"):
            load_results(tmp_path)
    (tmp_path / "metrics.json").unlink()
    (tmp_path / "study.json").write_text('{"title": "t"}')
    with pytest.raises(InputError, match=r"study.json: no key 'summary'; expected a study"):
        write_report(tmp_path)
    (tmp_path / "study.json").write_text("{}")
    with pytest.raises(InputError, match=r"study.json: no key 'key'; expected the result of a cell"):
        Store(tmp_path, tmp_path).rates(None)
