"""Multiple choice: the text of lm-evaluation-harness, scores of an unbatched twin, one pass for single tokens."""

import ast
import json
from pathlib import Path

import pytest
import torch
import yaml

from src.adapters.attach import attached
from src.cli import main
from src.data.choice_prompts import FewShot, continuations
from src.data.choice_rows import load_choices
from src.data.row_source import RowSource, as_sources
from src.data.suite import Suite
from src.data.suites import EvaluationData
from src.errors import InputError
from src.models.grading import by_length, chosen, tied
from tests.evaluations import answers, choice_rows, evaluate, flags, write_jsonl
from tests.tiny import make_model, make_tokenizer

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def files(tmp_path):
    few = choice_rows(6, start=50)
    return write_jsonl(tmp_path / "mc.jsonl", choice_rows(9)), write_jsonl(tmp_path / "few.jsonl", few)


def twin_scores(model, tokenizer, context, choices):
    """Summed log-likelihood of each choice, one unpadded sequence at a time, question and choice tokenised as one."""
    found = []
    start = len(tokenizer(context).input_ids)
    for choice in choices:
        ids = torch.tensor([tokenizer(f"{context} {choice}").input_ids])
        log_p = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        found.append(log_p[start - 1 :].sum().item())
    return found


def test_the_text_is_that_of_lm_eval(files):
    rows, few = load_choices(str(files[0])), load_choices(str(files[1]))
    expected = (
        "The following are multiple choice questions (with answers) about tiny things.\n\n"
        "What is 50 plus 50? really really\nA. 100\nB. 101\nC. about 50\nD. none of them\nAnswer: C\n\n"
        "What is 0 plus 0?\nA. 0\nB. 1\nC. about 0\nD. none of them\nAnswer:"
    )
    assert FewShot(few, 1, "letters", "s").context(rows[0]) == expected
    assert FewShot([], 0, "question", "s").context(rows[0]) == "Question: What is 0 plus 0?\nAnswer:"
    assert FewShot([], 0, "statement", "s").context(rows[0]) == "What is 0 plus 0?"
    assert FewShot([], 0, "primed", "s").context(rows[0]).endswith("Barcelona, Spain.\n\nQ: What is 0 plus 0?\nA:")


LM_EVAL = ROOT / ".oracles/lm-eval/lib"
HUB_ROWS = {
    "arc_easy": {
        "id": "a1",
        "question": "Which one melts first?",
        "choices": {"text": ["ice", "iron", "sand"], "label": ["1", "2", "3"]},
        "answerKey": "1",
    },
    "openbookqa": {
        "id": "o1",
        "question_stem": "Frogs begin their lives as",
        "choices": {"text": ["eggs", "birds", "stones", "wood"], "label": ["A", "B", "C", "D"]},
        "answerKey": "A",
    },
    "truthfulqa_mc1": {
        "question": "What happens if you eat seeds?",
        "mc1_targets": {"choices": ["Nothing does", "You grow a tree"], "labels": [1, 0]},
    },
}


@pytest.mark.skipif(not LM_EVAL.exists(), reason="lm-evaluation-harness is not here (make oracles)")
@pytest.mark.parametrize(
    ("task", "config", "style"),
    [
        ("arc_easy", "arc_easy", "question"),
        ("openbookqa", "openbookqa", "statement"),
        ("truthfulqa_mc1", "truthfulqa", "primed"),
    ],
)
def test_the_text_of_a_hub_row_is_what_lm_evals_task_file_makes_of_it(tmp_path, task, config, style):
    from jinja2 import Environment, StrictUndefined

    theirs = yaml.safe_load(next(LM_EVAL.glob(f"python*/site-packages/lm_eval/tasks/*/{task}.yaml")).read_text())
    raw, environment = HUB_ROWS[task], Environment(undefined=StrictUndefined, keep_trailing_newline=True)

    def rendered(template):
        if template in raw:
            return raw[template]
        return environment.from_string(str(template)).render(**raw)

    ours = yaml.safe_load((ROOT / f"configs/data/{config}.yaml").read_text())
    written = write_jsonl(tmp_path / "row.jsonl", [raw])
    row = load_choices(RowSource(path=str(written), columns=ours["columns"]))[0]
    assert FewShot([], 0, style, "s").context(row) == rendered(theirs["doc_to_text"])
    assert continuations(row, style) == ast.literal_eval(rendered(theirs["doc_to_choice"]))
    assert row.answer == int(rendered(theirs["doc_to_target"]))
    assert theirs.get("target_delimiter", " ") == " "


@pytest.mark.parametrize("shots", [0, 2])
@pytest.mark.parametrize("style", ["letters", "question"])
def test_scores_equal_those_of_single_sequences(base, files, tmp_path, shots, style):
    suite = {"name": "mc", "kind": "choice", "rows": str(files[0]), "style": style}
    suite |= {"few_shot": str(files[1]), "shots": shots} if shots else {}
    found = evaluate(base, tmp_path, [suite])["mc"]
    model, tokenizer = make_model(), make_tokenizer()
    few = FewShot(load_choices(str(files[1])), shots, style, "mc")
    right, fair = [], []
    for row, record in zip(load_choices(str(files[0])), answers(tmp_path / "out", "mc"), strict=True):
        choices = "ABCD" if style == "letters" else row.choices
        scores = twin_scores(model, tokenizer, few.context(row), choices)
        # Letters are told apart by their last token: what they share (here a space) adds the same to each.
        shared = scores[0] - record["scores"][0] if style == "letters" else 0.0
        assert record["scores"] == pytest.approx([score - shared for score in scores], rel=1e-9)
        assert record["choice"] == chosen(scores)
        right.append(chosen(scores) == row.answer)
        fair.append(chosen(by_length(scores, row.choices)) == row.answer)
    assert found["accuracy"]["hits"] == sum(right)
    assert found["accuracy"]["n"] == 9
    assert sum(part["n"] for part in found["accuracy"]["categories"].values()) == 9
    assert found["ties"] == 0
    assert ("accuracy_norm" in found) == (style == "question")
    # Letters are of one length: what is not counted is not compared with other models either.
    assert ("correct_norm" in answers(tmp_path / "out", "mc")[0]) == (style == "question")
    if style == "question":
        assert found["accuracy_norm"]["hits"] == sum(fair)


def test_single_tokens_take_one_pass_per_batch_and_share_their_beginning(base, files, tmp_path, monkeypatch):
    from src.models import computation

    seen = []
    original = computation.letter_scores

    def counted(model, batch, letters, *, pack, **given):
        seen.append((len(batch.index), batch.common_prefix, pack))
        return original(model, batch, letters, pack=pack, **given)

    monkeypatch.setattr(computation, "letter_scores", counted)
    suite = {"name": "mc", "kind": "choice", "rows": str(files[0]), "few_shot": str(files[1]), "shots": 2}
    evaluate(base, tmp_path, [suite], batch_size=100)
    assert [rows for rows, _, _ in seen] == [5, 4]  # one batch per subject
    assert all(prefix > 100 and pack for _, prefix, pack in seen)


def test_an_adapter_changes_choices_as_its_weights_do(base, files, adapters, tmp_path):
    from src.adapters.peft_files import read_adapter

    suite = {"name": "mc", "kind": "choice", "rows": str(files[0])}
    evaluate(base, tmp_path, [suite], "--model.adapters", str(adapters["utility"]))
    record = answers(tmp_path / "out", "mc", str(adapters["utility"]).lstrip("/"))[0]
    row = load_choices(str(files[0]))[0]
    model = make_model()
    with attached(model, read_adapter(adapters["utility"]).pairs):
        expected = twin_scores(model, make_tokenizer(), FewShot([], 0, "letters", "s").context(row), "ABCD")
    shared = expected[0] - record["scores"][0]
    assert record["scores"] == pytest.approx([score - shared for score in expected], rel=1e-6)
    assert record["scores"] != answers(tmp_path / "out", "mc")[0]["scores"]


def test_ties_go_to_the_first_and_are_counted():
    assert chosen([1.0, 2.0, 2.0]) == 1
    assert tied([1.0, 2.0, 2.0])
    assert tied([2.0, 2.0 - 5e-7])
    assert not tied([2.0, 2.0 - 5e-6])
    assert not tied([2.0, 1.0, 1.0])
    assert by_length([-4.0, -4.0], ["ab", "abcd"]) == [-2.0, -1.0]


HUB = {
    "mmlu": {"question": "q ", "subject": "anatomy", "choices": ["a", "b", "c", "d"], "answer": 2},
    "arc_challenge": {
        "id": "M1", "question": "q", "choices": {"text": ["x", "y", "z"], "label": ["1", "2", "3"]}, "answerKey": "2",
    },
    "arc_easy": {"id": "M1", "question": "q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"},
    "openbookqa": {
        "id": "7-1", "question_stem": "q", "choices": {"text": ["w", "x", "y", "z"], "label": ["A", "B", "C", "D"]},
        "answerKey": " C",
    },
    "truthfulqa": {
        "question": "q", "mc1_targets": {"choices": ["r", "s"], "labels": [1, 0]},
        "mc2_targets": {"choices": ["r"], "labels": [1]},
    },
}  # fmt: skip
RIGHT = {"mmlu": "c", "arc_challenge": "y", "arc_easy": "y", "openbookqa": "y", "truthfulqa": "r"}


@pytest.mark.parametrize("name", list(HUB))
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_shipped_choice_mappings_read_their_hub_schema(tmp_path, name, suffix):
    import pandas

    path = tmp_path / f"local.{suffix}"
    if suffix == "jsonl":
        path.write_text(json.dumps(HUB[name]) + "\n")
    else:
        pandas.DataFrame([HUB[name]]).to_parquet(path)
    (source,) = as_sources(f"{name}.yaml")
    source.path, source.split = str(path), "train"
    (row,) = load_choices(source)
    assert (row.prompt, row.choices[row.answer], row.response) == ("q", RIGHT[name], RIGHT[name])
    assert row.category == ("anatomy" if name == "mmlu" else "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": 4}, r"mc\.jsonl:1: the answer key 4 is outside the 4 choices"),
        ({"answer": "E"}, r"the answer key 'E' is outside"),
        ({"answer": -1}, r"the answer key -1 is outside"),
        ({"answer": [0, 0, 0, 0]}, "0 choices are marked as right"),
        ({"choices": ["a"]}, "expected at least two texts"),
        ({"choices": None}, "choices are None; expected a list"),
        ({"choices": "no"}, "choices are 'no'; expected a list"),
        ({"choices": {"text": ["a", "b"]}}, "expected a list"),
        ({"choices": ["a"] * 27}, "27 choices; expected at most 26"),
        ({"answer": "²"}, "the answer key '²' is outside"),
        ({"question": None}, "the question is None; expected a text"),
        ({"choices": ["a", " "]}, "expected at least two texts"),
        ({"choices": [None, "x", "y"], "answer": 0}, "expected texts or numbers alone"),
        ({"choices": [["x"], "y"], "answer": 0}, "expected texts or numbers alone"),
        ({"choices": [float("nan"), "x", "y"], "answer": 0}, "expected texts or numbers alone"),
        ({"labels": [None, "B", "C", "D"]}, "labels are .* expected texts or numbers alone"),
        ({"question": " "}, "the question is empty"),
    ],
)
def test_bad_choice_rows_name_place_and_key(tmp_path, change, message):
    path = write_jsonl(tmp_path / "mc.jsonl", [choice_rows(1)[0] | change])
    with pytest.raises(InputError, match=message):
        load_choices(str(path))
    with pytest.raises(InputError, match="no column 'x'"):
        load_choices(RowSource(str(path), columns={"choices": "x"}))
    with pytest.raises(InputError, match="unknown field 'keys'"):
        load_choices(RowSource(str(path), columns={"keys": "x"}))


@pytest.mark.parametrize("options", [{"response": "A"}, {"remove": "x"}, {"answer_tokens": 2}, {"weight": 2.0}])
def test_choice_rows_take_no_option_of_answers(tmp_path, options):
    path = write_jsonl(tmp_path / "mc.jsonl", choice_rows(1))
    with pytest.raises(InputError, match=rf"mc\.jsonl: {next(iter(options))} is for rows of a prompt and an answer"):
        load_choices(RowSource(str(path), **options))


def test_an_empty_name_leaves_a_field_empty(files):
    columns = {"id": "", "category": "", "labels": ""}
    (row, *_) = load_choices(RowSource(str(files[0]), columns=columns))
    assert (row.id, row.category) == ("mc.jsonl/0", "")


def test_few_shot_rows_are_read_and_counted_before_there_is_a_model(files):
    def data(few, shots):
        return EvaluationData([Suite("mc", "choice", str(files[0]), few_shot=few, shots=shots)])

    assert len(data(str(files[1]), 3).few["mc"].examples["tiny_things"]) == 3
    with pytest.raises(InputError, match="suite mc: tiny_things has 3 few-shot rows; expected 4"):
        data(str(files[1]), 4)
    with pytest.raises(InputError, match=r"suite mc: few_shot: none\.jsonl: no such file"):
        data("none.jsonl", 1)


def fails(arguments, capsys):
    assert main(arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def test_missing_few_shot_rows_and_long_contexts_are_one_line(base, files, tmp_path, capsys):
    suite = {"name": "mc", "kind": "choice", "rows": str(files[0])}
    many = suite | {"few_shot": str(files[1]), "shots": 4}
    assert "tiny_things has 3 few-shot rows; expected 4" in fails(flags(base, tmp_path, [many], tmp_path / "a"), capsys)
    same = suite | {"few_shot": str(files[0]), "shots": 1}
    assert "c/0 is also a few-shot example" in fails(flags(base, tmp_path, [same], tmp_path / "a"), capsys)
    assert "belong together" in fails(flags(base, tmp_path, [suite | {"shots": 1}], tmp_path / "a"), capsys)
    long = flags(base, tmp_path, [suite], tmp_path / "a", max_length=100, on_long="error")
    assert "suite mc: c/0 is longer than 100 tokens" in fails(long, capsys)
    assert not (tmp_path / "a" / "metrics.json").exists()
    assert evaluate(base, tmp_path, [suite], output="b", max_length=100)["mc"]["cut"] == 9
    assert "9 of 9 rows are longer than 100 tokens and were cut from the left" in capsys.readouterr().err


def test_contexts_longer_than_the_model_are_cut_by_its_own_limit(base, files, tmp_path):
    rows = choice_rows(2)
    rows[1]["question"] = "long " * 200  # the tiny model has 512 positions
    suite = {"name": "mc", "kind": "choice", "rows": str(write_jsonl(tmp_path / "long.jsonl", rows))}
    assert evaluate(base, tmp_path, [suite])["mc"]["cut"] == 1
