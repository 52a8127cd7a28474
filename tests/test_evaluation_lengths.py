"""Rows that are too long: prompts are cut from the left and references at their end, and counted apart."""

import pytest

from src.cli import main
from src.data.chat import Encoder
from src.data.rows import Row
from tests.evaluations import answers, evaluate, flags, write_jsonl

ROWS = [
    {"prompt": "short", "response": "short"},
    {"prompt": "x" * 400, "response": "short"},
    {"prompt": "short", "response": "y" * 600},
    {"prompt": "x" * 400, "response": "y" * 600},
]


@pytest.mark.parametrize(
    ("prompt", "answer", "cut"),
    [(3, 3, (0, 0)), (300, 3, (1, 0)), (40, 300, (1, 1)), (3, 60, (0, 1)), (300, 300, (1, 1))],
)
def test_what_is_cut_of_a_row_is_counted_apart(tokenizer, prompt, answer, cut):
    raw = Encoder(tokenizer, template="raw", max_length=64)
    encoded = raw.encode(Row("a", "p" * prompt, "r" * answer))
    kept = encoded.answer_start, len(encoded.ids) - encoded.answer_start
    whole = prompt + 1, answer + 1  # a new line behind the prompt, an end behind the answer
    assert (raw.cut_prompts, raw.cut_answers) == cut == (int(kept[0] < whole[0]), int(kept[1] < whole[1]))
    assert raw.truncated == int(any(cut))


def test_references_and_prompts_that_are_too_long_are_reported_apart(base, tmp_path, capsys):
    rows = str(write_jsonl(tmp_path / "long.jsonl", ROWS))
    suite = {"name": "long", "kind": "benign", "rows": rows, "max_new_tokens": 2}
    found = evaluate(base, tmp_path, [suite], output="scored", max_length=200)["long"]
    assert (found["cut"], found["cut_references"]) == (2, 2)
    error = capsys.readouterr().err
    assert "long: 2 of 4 rows are longer than 200 tokens and were cut from the left" in error
    assert "long: 2 of 4 reference answers are too long for 200 tokens and were cut at their end" in error
    only = str(write_jsonl(tmp_path / "only.jsonl", ROWS[::2]))
    found = evaluate(base, tmp_path, [suite | {"rows": only}], output="only", max_length=200)["long"]
    assert "cut" not in found
    assert found["cut_references"] == 1
    assert "cut from the left" not in capsys.readouterr().err
    found = evaluate(base, tmp_path, [suite | {"score": False}], output="unscored", max_length=200)["long"]
    assert found["cut"] == 2
    assert "cut_references" not in found  # nothing is measured on them
    assert "reference answers" not in capsys.readouterr().err
    given = flags(base, tmp_path, [suite | {"rows": only}], tmp_path / "error", max_length=200, on_long="error")
    assert main(given) == 2
    assert "suite long: only.jsonl/1 is longer than 200 tokens" in capsys.readouterr().err


def test_a_reference_that_nobody_scores_takes_no_room(base, tmp_path, capsys):
    row = {"id": "r", "prompt": "x" * 150, "response": "y" * 300}
    rows = str(write_jsonl(tmp_path / "rows.jsonl", [row]))
    bare = str(write_jsonl(tmp_path / "bare.jsonl", [row | {"response": ""}]))
    suite = {"name": "s", "kind": "harmful", "max_new_tokens": 4, "score": False, "template": "raw"}
    found = evaluate(base, tmp_path, [suite | {"rows": rows}], output="one", max_length=200, on_long="error")["s"]
    evaluate(base, tmp_path, [suite | {"rows": bare}], output="two", max_length=200)
    assert "cut" not in found
    assert "cut" not in capsys.readouterr().err
    one, two = (answers(tmp_path / name, "s")[0]["answer"] for name in ("one", "two"))
    assert one == two
