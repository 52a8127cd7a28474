"""Bad input to an evaluation: one clear line each, and none that gives a number without a meaning."""

import math
import shutil

import pytest

from src.cli import main
from src.data.choice_rows import load_choices
from src.data.row_source import RowSource
from src.data.sources import load_rows
from src.data.suite import Suite
from src.errors import InputError
from src.judges.causal import Causal
from src.judges.classifier import Classifier
from src.judges.endpoint import Endpoint
from src.models.base import BaseSpec
from src.models.discovery import named_adapters
from src.models.evaluation import EvaluationModule
from tests.evaluations import PASSES, choice_rows, flags, write_jsonl
from tests.tiny import write_rows


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": math.nan, "kind": "code"}, "temperature is nan; expected 0 (greedy) or at least 0.0001"),
        ({"temperature": math.inf, "kind": "code"}, "temperature is inf; expected 0"),
        ({"temperature": 1e-320, "kind": "code"}, "expected 0 (greedy) or at least 0.0001"),
        ({"collapse_nll": math.nan}, "collapse_nll is nan; expected nats per token above 0"),
        ({"collapse_nll": -1.0}, "collapse_nll is -1.0; expected nats per token above 0"),
        ({"kind": "code", "generate": False}, "kind code needs generated answers; leave out generate"),
        ({"generate": False, "score": False}, "generate and score are both off; nothing would be measured"),
        ({"rouge": True}, "rouge needs generated answers of kind utility, not harmful"),
        ({"kind": "utility", "generate": False, "rouge": True}, "rouge needs generated answers"),
        ({"answer": "number"}, "answer: number needs generated answers of kind utility"),
        ({"kind": "choice", "collapse_nll": 3.0}, "collapse_nll needs generated answers, not choices or code"),
        ({"kind": "code", "collapse_nll": 3.0}, "collapse_nll needs generated answers, not choices or code"),
        ({"generate": False, "collapse_nll": 3.0}, "collapse_nll needs generated answers"),
        ({"k": [5]}, "k is [5]; it needs kind code, not harmful"),
        ({"kind": "utility", "style": "primed"}, "style primed needs kind choice, not utility"),
        ({"kind": "choice", "temperature": 0.7}, "max_new_tokens and temperature need generated answers"),
        ({"kind": "choice", "max_new_tokens": 99}, "max_new_tokens and temperature need generated answers"),
        ({"generate": False, "max_new_tokens": 99}, "max_new_tokens and temperature need generated answers"),
    ],
)
def test_settings_that_give_no_meaningful_number_are_refused(settings, message):
    with pytest.raises(InputError) as error:
        Suite(**{"name": "a", "kind": "harmful", "rows": "r.jsonl"} | settings).check()
    assert message in str(error.value)
    assert str(error.value).startswith("suite a: ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": [0, 1]}, "2 marks for 4 choices"),
        ({"labels": ["A"]}, r"labels are \['A'\]; expected 4 different ones"),
        ({"labels": ["A", "A", "B", "C"]}, r".*expected 4 different ones"),
        ({"labels": ["A", "B", "C", "D", "E"], "answer": "E"}, r".*expected 4 different ones"),
    ],
)
def test_labels_and_marks_belong_to_the_choices(tmp_path, change, message):
    path = write_jsonl(tmp_path / "mc.jsonl", [choice_rows(1)[0] | change])
    with pytest.raises(InputError, match=rf"mc\.jsonl:1: {message}"):
        load_choices(str(path))
    write_jsonl(path, [choice_rows(1)[0] | {"labels": ["1", "2", "3", "4"], "answer": "3"}])
    assert load_choices(str(path))[0].answer == 2


def test_choices_are_those_that_their_source_names(tmp_path):
    path = write_jsonl(tmp_path / "mc.jsonl", choice_rows(5))
    kept = load_choices(RowSource(str(path), where={"subject": "big_things"}))
    assert [row.id for row in kept] == ["c/1", "c/3"]


def test_prompts_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "r.jsonl"
    for prompt, message in (
        (["x"], "the prompt is a list; expected text"),
        ({"a": 1}, "the prompt is a dict; expected text"),
    ):
        write_jsonl(path, [{"prompt": prompt}])
        with pytest.raises(InputError, match=rf"r\.jsonl:1: {message}"):
            load_rows(str(path), need_response=False)
    path.write_text('{"prompt": "ok \\ud83d\\ude00"}\n{"prompt": "\\ud800 x"}\n')
    with pytest.raises(InputError, match=r"r\.jsonl:2: half of a surrogate pair"):
        load_rows(str(path), need_response=False)
    write_jsonl(path, [{"prompt": 5, "category": {"theft": True, "other": False}}])
    (row,) = load_rows(str(path), need_response=False)
    assert (row.prompt, row.category) == ("5", "theft")


def test_a_name_that_no_file_can_have_is_refused_before_anything_is_generated():
    for name, fits in (("a" * 200, True), ("a" * 201, False), ("é" * 101, False)):
        suite = Suite(name, "harmful", "r.jsonl")
        if fits:
            suite.check()
        else:
            with pytest.raises(InputError, match="expected a name of at most 200 bytes"):
                suite.check()


def test_two_rows_of_one_id_in_one_source_are_said(tmp_path, caplog):
    rows = write_jsonl(tmp_path / "r.jsonl", [{"id": "x", "prompt": "a"}, {"id": "x", "prompt": "b"}])
    assert len(Suite("s", "harmful", str(rows)).load()) == 2
    assert "suite s: two rows of" in caplog.text
    assert "have the id 'x'; map another column to id" in caplog.text
    caplog.clear()
    assert len(Suite("s", "harmful", RowSource(str(rows), columns={"id": "prompt"})).load()) == 2
    # Rows without ids are named by their file's name and number: those of two folders are no mistake.
    for name in ("algebra", "anatomy"):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "test.jsonl", [{"prompt": "a"}])
    both = [str(tmp_path / name / "test.jsonl") for name in ("algebra", "anatomy")]
    assert len(Suite("s", "harmful", both).load()) == 2
    assert not caplog.text


def test_an_output_that_is_a_file_is_one_line(base, tmp_path, capsys):
    suite = {"name": "a", "kind": "harmful", "rows": str(write_rows(tmp_path / "a.jsonl", 2, what="a"))}
    (tmp_path / "out").write_text("mine")
    for more in ([], ["--overwrite", "true"]):
        line = stops(flags(base, tmp_path, [suite], tmp_path / "out", *more), capsys)
        assert line == f"error: --output {tmp_path / 'out'}: a file; name a directory"
    assert (tmp_path / "out").read_text() == "mine"


def test_a_reference_without_a_number_can_never_be_matched(tmp_path):
    rows = write_jsonl(tmp_path / "r.jsonl", [{"prompt": "p", "response": "5"}, {"prompt": "q", "response": "five"}])
    suite = Suite("s", "utility", str(rows), answer="number")
    with pytest.raises(InputError, match=r"suite s: r\.jsonl/1: the reference 'five' has no number; set answer: text"):
        suite.load()
    suite.answer = "text"
    assert len(suite.load()) == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Classifier("c", text="{prompt}"), r"judge c: its template has no \{answer\}"),
        (lambda: Classifier("c", threshold=7.0), "threshold is 7.0; expected a probability from 0 to 1"),
        (lambda: Causal("c", yes=""), "yes is '' and no is 'no'; expected two different words"),
        (lambda: Causal("c", dtype="float99"), "dtype is 'float99'; expected auto"),
        (lambda: Endpoint("http://localhost", "m", yes="No"), "yes is 'No' and no is 'no'; expected two different"),
        *(
            (lambda url=url: Endpoint(url, "m"), "expected an address such as")
            for url in ("localhost:8000", "http://", "http://[::1/v1", "http://a b/v1", "http://h:99999/v1")
        ),
    ],
)
def test_settings_of_judges_are_checked(make, message):
    with pytest.raises(InputError, match=message):
        make()


def stops(arguments, capsys):
    """The one line that a command ends with."""
    assert main(arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def test_a_judge_that_a_suite_describes_wrongly_is_one_line(base, tmp_path, capsys):
    suite = {"name": "a", "kind": "harmful", "rows": str(write_rows(tmp_path / "a.jsonl", 2, what="a"))}
    endpoint = {"class_path": "src.judges.endpoint.Endpoint", "init_args": {"url": "localhost", "model": "m"}}
    for judge, line in (
        (endpoint, "error: judge: url is 'localhost'; expected an address such as http://localhost:8000/v1"),
        ({"class_path": "src.judges.nope.Nope"}, "class_path 'src.judges.nope.Nope': module 'src.judges' has no attr"),
        ("Nobody", "Nobody"),
        ({"class_path": "src.judges.classifier.Classifier"}, "the following arguments are required: name"),
    ):
        found = stops(flags(base, tmp_path, [suite | {"judge": judge}], tmp_path / "out"), capsys)
        assert line in found
        assert len(found.replace(str(tmp_path), "")) < 200


def test_a_judge_for_which_there_is_no_such_device_is_one_line(base, tmp_path, capsys):
    labels = write_jsonl(tmp_path / "l.jsonl", [{"prompt": "p", "answer": "a", "label": True}])
    for device in ("cuda:99", "nowhere"):
        given = ["--judge", "Causal", "--judge.name", str(base), "--device", device, "--output", str(tmp_path / "j")]
        line = stops(["judge", "--labels", str(labels), *given], capsys)
        assert line.startswith(f"error: judge {base}: it cannot run on {device} (")


def test_broken_weights_and_a_choice_that_never_fits_are_one_line(base, tmp_path, capsys):
    suite = {"name": "a", "kind": "harmful", "rows": str(write_rows(tmp_path / "a.jsonl", 2, what="a"))}
    broken = shutil.copytree(base, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"no weights")
    line = stops(flags(broken, tmp_path, [suite], tmp_path / "out"), capsys)
    assert f"base.name {broken}: the model cannot be loaded" in line
    long = [choice_rows(1)[0] | {"choices": ["w " * 600, "b", "c", "d"]}]
    choice = {
        "name": "mc",
        "kind": "choice",
        "rows": str(write_jsonl(tmp_path / "mc.jsonl", long)),
        "style": "statement",
    }
    line = stops(flags(base, tmp_path, [choice], tmp_path / "out"), capsys)
    assert line == "error: suite mc: a choice of c/0 alone is longer than 512 tokens"
    code = {"name": "c", "kind": "code", "rows": str(write_jsonl(tmp_path / "c.jsonl", [PASSES])), "generate": False}
    line = stops(flags(base, tmp_path, [code], tmp_path / "out"), capsys)
    assert line == "error: suite c: kind code needs generated answers; leave out generate"


def test_models_whose_answers_would_lie_in_one_folder_are_refused(base, adapters, tmp_path, monkeypatch):
    for name in ("base", "one"):
        shutil.copytree(adapters["utility"], tmp_path / name)
    monkeypatch.chdir(tmp_path)
    spec = BaseSpec(name=str(base), dtype="float64")
    with pytest.raises(InputError, match=r"\./base would be called base, as the base model is"):
        EvaluationModule(spec, ["./base"])
    with pytest.raises(InputError, match=r"\./one would be called one, as another adapter is"):
        EvaluationModule(spec, ["one", "./one"])
    # An adapter that is itself where to look is called by its folder.
    assert named_adapters([], "one") == {"one": "one"}
    monkeypatch.chdir("one")
    assert named_adapters([], ".") == {"one": "."}
