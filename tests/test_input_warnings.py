"""What stands beside what a user names, and does not fit it: the demo's rows, other chat templates, rows learnt."""

import json
import logging
import shutil
from copy import deepcopy

import pytest

from src.adapters.chat_template import TEMPLATE, TOKENIZER, read_template
from src.adapters.peft_files import SEEN, read_adapter
from src.cli import main
from src.data.calibration import CalibrationData
from src.data.demo_rows import DEMO
from src.data.modules import ExpertData
from src.data.rows import Row, text_hash
from src.errors import InputError
from src.models.adapter_warnings import warn_of_learnt, warn_of_templates
from src.models.base import BaseSpec, check_trained_on, load_model, load_tokenizer
from src.models.checkpoints import OF_SHARDED, check_checkpoint
from tests.commands import fisher_flags
from tests.evaluations import flags as evaluation_flags
from tests.evaluations import read_rows
from tests.tiny import TEMPLATE as OF_BASE
from tests.tiny import write_rows

TASK, VAL = "src/data/demo/task.train.jsonl", {"path": str(DEMO / "task.calib.jsonl"), "limit": 5}
OTHER = "{% for message in messages %}[INST] {{ message.content }} [/INST]{% endfor %}"


@pytest.fixture
def said(caplog):
    """Warnings since the last call."""

    def take():
        found = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        caplog.clear()
        return found

    return take


def own_rows(tmp_path, name, count=4):
    return str(write_rows(tmp_path / f"{name}.jsonl", count, what=name))


def test_the_demos_rows_beside_own_ones_are_said(tmp_path, said):
    own, held, demo = own_rows(tmp_path, "own"), own_rows(tmp_path, "held"), json.dumps(VAL)
    ExpertData(train=own, val=demo)
    (line,) = said()
    assert line.startswith("data.val: the rows are the demo's (task.calib.jsonl), those of data.train are not; name it")
    ExpertData(train=TASK, val=held)
    (line,) = said()
    assert line.startswith("data.train: the rows are the demo's (task.train.jsonl), those of data.val are not")
    for train, val in ((own, held), (TASK, demo), ([own, TASK], demo), (own, [held, demo])):
        ExpertData(train=train, val=val)
        assert not said()


def test_only_rows_that_are_measured_are_said(tmp_path, said):
    harmful, benign = str(DEMO / "harmful.calib.jsonl"), [own_rows(tmp_path, "a"), own_rows(tmp_path, "b")]
    data = CalibrationData(safety=harmful, utility=benign)
    passes = {"safety": "safety", "utility": "utility"}
    data.bind_passes(passes, [])
    (line,) = said()
    assert line.startswith("data.safety: the rows are the demo's (harmful.calib.jsonl), those of data.utility are not")
    data.bind_passes(passes, ["safety"])
    assert not said()
    CalibrationData(safety=harmful, utility=[*benign, str(DEMO / "borderline.calib.jsonl")]).bind_passes(passes, [])
    assert not said()


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({TEMPLATE: OTHER}, OTHER),
        ({TEMPLATE: OTHER, TOKENIZER: json.dumps({"chat_template": "old"})}, OTHER),
        ({TOKENIZER: json.dumps({"chat_template": OTHER})}, OTHER),
        ({TOKENIZER: json.dumps({"chat_template": [{"name": "tool_use", "template": "no"}]})}, None),
        (
            {
                TOKENIZER: json.dumps(
                    {"chat_template": [{"name": "rag", "template": "no"}, {"name": "default", "template": OTHER}]}
                )
            },
            OTHER,
        ),
        ({TOKENIZER: "{}"}, None),
        ({TOKENIZER: "[]"}, None),
        ({}, None),
    ],
)
def test_a_template_is_found_where_tokenizers_are_saved(adapters, tmp_path, files, found):
    shutil.copytree(adapters["utility"], tmp_path / "a")
    for name, text in files.items():
        (tmp_path / "a" / name).write_text(text)
    assert read_template(tmp_path / "a") == found
    assert read_adapter(tmp_path / "a").template == found


def test_a_template_that_transformers_saved_is_found(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert read_template(tmp_path) == OF_BASE


@pytest.mark.parametrize(("name", "text"), [(TEMPLATE, b"\xff\xfe"), (TOKENIZER, b"{")])
def test_a_template_that_cannot_be_read_is_a_warning(tmp_path, said, name, text):
    (tmp_path / name).write_bytes(text)
    assert read_template(tmp_path) is None
    (line,) = said()
    assert f"{name}: not" in line


def test_other_templates_beside_adapters_are_said(adapters, tokenizer, tmp_path, said):
    for name, text in (("same", f"{OF_BASE}\n"), ("other", OTHER)):
        shutil.copytree(adapters["utility"], tmp_path / name)
        (tmp_path / name / TEMPLATE).write_text(text)
    read = [read_adapter(adapters["safety"]), *(read_adapter(tmp_path / name) for name in ("same", "other"))]
    warn_of_templates(read, ["raw", "auto"], tokenizer)
    (line,) = said()
    assert line.startswith(f"{tmp_path / 'other'}: the chat template beside it is not read, and prompts go in by")
    warn_of_templates(read, ["raw"], tokenizer)
    assert not said()
    several = deepcopy(tokenizer)  # the fixture serves all tests
    several.chat_template = {"default": OF_BASE, "tool_use": OTHER}
    warn_of_templates(read, ["auto"], several)
    assert len(said()) == 1
    bare = deepcopy(tokenizer)
    bare.chat_template = None
    warn_of_templates(read, ["auto"], bare)
    assert [line.count("and the base has none: prompts go in as they are; where") for line in said()] == [1, 1]


def test_learnt_rows_are_said(adapters, tmp_path, said):
    shutil.copytree(adapters["safety"], tmp_path / "learnt")
    (tmp_path / "learnt" / SEEN).write_text(f"{text_hash('How?')}\n{text_hash('another')}\n")
    read = [read_adapter(adapters["utility"]), read_adapter(tmp_path / "learnt")]
    warn_of_learnt(read, {"data.safety": [Row("1", "how? "), Row("2", "b"), Row("3", "How?")], "data.utility": []})
    (line,) = said()
    assert line.startswith(f"data.safety: 2 of 3 prompts were used to train or calibrate {tmp_path / 'learnt'}, whose")


def test_commands_say_both(base, adapters, rows, tmp_path, capsys):
    beside = {}
    for name, folder in adapters.items():
        beside[name] = tmp_path / name
        shutil.copytree(folder, beside[name])
    (beside["utility"] / TEMPLATE).write_text(OTHER)
    seen = [text_hash(row["prompt"]) for row in read_rows(rows["benign"])[:3]]
    (beside["safety"] / SEEN).write_text("\n".join(seen) + "\n")
    assert main(fisher_flags(base, beside, rows, tmp_path / "fisher")) == 0
    shown = capsys.readouterr().err
    count = len(read_rows(rows["benign"])) + len(read_rows(rows["task"]))
    assert f"data.utility: 3 of {count} prompts were used to train or calibrate {beside['safety']}" in shown
    template = f"{beside['utility']}: the chat template beside it is not read"
    assert template in shown
    assert f"{beside['safety']}: the chat template" not in shown
    suites = [{"name": "one", "kind": "utility", "rows": str(rows["eval_task"]), "max_new_tokens": 2}]
    adapter = ["--model.adapters", str(beside["utility"])]
    assert main(evaluation_flags(base, tmp_path, suites, tmp_path / "test", *adapter)) == 0
    assert template in capsys.readouterr().err
    assert main(evaluation_flags(base, tmp_path, suites, tmp_path / "raw", *adapter, template="raw")) == 0
    assert template not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["./nope", "/nope/a/b", "out/a/b", "~/x/y"])
def test_a_mistyped_path_of_a_base_is_said_to_be_none(name):
    for read in (load_tokenizer, load_model):
        with pytest.raises(InputError, match=f"^base.name {name}: no such directory; expected one with a model"):
            read(BaseSpec(name))


def test_what_is_neither_here_nor_on_the_hub_is_said_to_be_no_directory(monkeypatch):
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **__: {}["why"])
    with pytest.raises(InputError, match=r"base.name out/mine: .*\(out/mine is no directory here; 'why'\)"):
        load_tokenizer(BaseSpec("out/mine"))


def test_adapters_of_two_bases_are_refused_before_one_is_loaded(base, adapters, tmp_path):
    for name in ("one", "two"):
        shutil.copytree(adapters["utility"], tmp_path / name)
        manifest = {"base": {"name": "x", "fingerprint": name}}
        (tmp_path / name / "manifest.json").write_text(json.dumps(manifest))
    read = [read_adapter(tmp_path / name) for name in ("one", "two")]
    check_trained_on(read[:1], BaseSpec(str(base)))
    with pytest.raises(InputError, match=f"two: .*; that of {tmp_path / 'one'} is .* with other weights"):
        check_trained_on(read, BaseSpec(str(base)))


def test_a_directory_that_is_no_sharded_checkpoint_is_one_line(tmp_path):
    with pytest.raises(InputError, match=f"--ckpt_path {tmp_path}: a directory, and no sharded checkpoint"):
        check_checkpoint(str(tmp_path), goes_on=False)
    (tmp_path / OF_SHARDED).touch()
    check_checkpoint(str(tmp_path), goes_on=True)


def test_a_file_in_place_of_an_evaluation_is_one_line(tmp_path, capsys):
    (tmp_path / "metrics.json").write_text("{}")
    found = tmp_path / "metrics.json"
    assert main(["report", "--results", str(found), "--output", str(tmp_path / "out")]) == 2
    shown = capsys.readouterr().err
    assert f"error: {found}/metrics.json: no such file; expected the metrics of an evaluation" in shown
    assert not (tmp_path / "out").exists()
