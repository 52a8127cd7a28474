import pytest
import yaml

from src.cli import main
from src.whole_values import after_empty

METHODS = """
study:
  class_path: Comparison
  init_args:
    ours: {ours}
    methods:
      - {{name: {ours}, method: {{class_path: TaskArithmetic}}, strength: {{option: alpha, values: [1.0]}}{more}}}
      - {{name: other, method: {{class_path: Ties}}, strength: {{option: alpha, values: [1.0]}}{more}}}
"""
SUITES = """
data:
  suites:
    - {{name: {name}, kind: harmful, rows: {rows}}}
    - {{name: other, kind: borderline, rows: b.jsonl}}
"""


@pytest.fixture
def resolved(tmp_path, capsys):
    """The configuration that a command makes of YAML texts and flags."""

    def resolve(command, *texts, flags=()):
        arguments = [command]
        for number, text in enumerate(texts):
            path = tmp_path / f"{number}.yaml"
            path.write_text(text)
            arguments += ["--config", str(path)]
        with pytest.raises(SystemExit) as stop:
            main([*arguments, *flags, "--print_config"])
        assert stop.value.code == 0
        return yaml.safe_load(capsys.readouterr().out)

    return resolve


def limits(value):
    return [one if isinstance(one, str) else (one["path"], one["limit"], one["seed"]) for one in value]


CUT = "data: {train: [{path: demo.jsonl, limit: 5, seed: 1}, b.jsonl], val: {path: demo.jsonl, limit: 3, seed: 1}}"


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ("[{path: mine.jsonl}, {path: c.jsonl, limit: 9}]", [("mine.jsonl", None, None), ("c.jsonl", 9, None)]),
        ("[mine.jsonl, {path: c.jsonl}]", ["mine.jsonl", ("c.jsonl", None, None)]),
    ],
)
@pytest.mark.parametrize("as_flag", [False, True])
def test_a_list_of_sources_takes_nothing_from_the_list_before_it(resolved, train, expected, as_flag):
    files = [CUT] if as_flag else [CUT, f"data: {{train: {train}}}"]
    data = resolved("fit", *files, flags=["--data.train", train] if as_flag else [])["data"]
    assert limits(data["train"]) == expected
    assert limits([data["val"]]) == [("demo.jsonl", 3, 1)]


@pytest.mark.parametrize("flags", [["--data.val={path: mine.jsonl}"], None])
def test_a_source_takes_nothing_from_the_source_before_it(resolved, flags):
    data = resolved("fit", CUT, *([] if flags else ["data: {val: {path: mine.jsonl}}"]), flags=flags or [])["data"]
    assert limits([data["val"]]) == [("mine.jsonl", None, None)]
    assert limits(data["train"]) == [("demo.jsonl", 5, 1), "b.jsonl"]


@pytest.mark.parametrize("flags", [["--data.val.limit", "7"], None])
def test_single_keys_change_what_stands_there(resolved, flags):
    data = resolved("fit", CUT, *([] if flags else ["data: {val: {limit: 7}}"]), flags=flags or [])["data"]
    assert limits([data["val"]]) == [("demo.jsonl", 7, 1)]


@pytest.mark.parametrize("short", [False, True])
def test_a_later_list_of_methods_takes_no_settings_from_the_earlier_one(resolved, short):
    first = METHODS.format(ours="a", more=", rank: 64, first: {method: {class_path: TaskArithmetic}, alpha: 0.4}")
    later = METHODS.format(ours="b", more="")
    if short:  # a class's options may stand without init_args where the class is known
        later = yaml.safe_dump({"study": yaml.safe_load(later)["study"]["init_args"]})
    study = resolved("experiment", first, later)["study"]["init_args"]
    assert [(one["name"], one["rank"], one["first"]) for one in study["methods"]] == [
        ("b", None, None),
        ("other", None, None),
    ]


def test_a_later_list_of_suites_takes_no_limit_from_the_earlier_one(resolved):
    first = SUITES.format(name="first", rows="{path: a.jsonl, limit: 48, seed: 0}")
    suites = resolved("test", first, SUITES.format(name="second", rows="[x.jsonl, {path: y.jsonl}]"))["data"]["suites"]
    assert suites[0]["name"] == "second"
    assert limits(suites[0]["rows"]) == ["x.jsonl", ("y.jsonl", None, None)]


def test_only_values_that_could_inherit_are_emptied_first():
    untouched = ["--alpha", "[1, 2]", "--data.train", "a.jsonl", "--model.base.name=x", "--data.train+", "{path: a}"]
    assert after_empty([*untouched, "--broken", "[{"]) == [*untouched, "--broken", "[{"]
    assert after_empty(["--data.val", "{path: a}"]) == ["--data.val=[]", "--data.val", "{path: a}"]
    assert after_empty(["--suites=[{name: a}]"]) == ["--suites=[]", "--suites=[{name: a}]"]
