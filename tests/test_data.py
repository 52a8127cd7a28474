import copy
import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from src.data.calibration import CalibrationData
from src.data.chat import Encoder, text_ids
from src.data.choice_prompts import FewShot
from src.data.choice_rows import ChoiceRow
from src.data.code_rows import load_code
from src.data.demo.build_tasks import build
from src.data.modules import ExpertData, has_table
from src.data.row_source import RowSource, as_sources
from src.data.rows import Row, read_json, rows_sha256
from src.data.sources import load_rows
from src.data.suite import Suite
from src.data.suite_tokens import encode_choices
from src.data.suites import EvaluationData
from src.errors import InputError
from src.metrics.refusal import is_refusal
from src.models.generation import own_ends
from tests.tiny import make_model, make_tokenizer

DEMO = Path("src/data/demo")
SPLITS = ("train", "calib", "eval")


def demo_rows(split):
    return [row for path in sorted(DEMO.glob(f"*.{split}.jsonl")) for row in load_rows(str(path), need_response=True)]


def grams(text):
    words = "".join(c if c.isalnum() else " " for c in text.casefold()).split()
    return {tuple(words[i : i + 3]) for i in range(len(words) - 2)} or {tuple(words)}


def test_demo_splits_share_no_prompt():
    seen: dict[str, str] = {}
    for split in SPLITS:
        for row in demo_rows(split):
            assert row.prompt_hash not in seen, (row.id, seen.get(row.prompt_hash))
            seen[row.prompt_hash] = row.id
    assert len(seen) > 1800


def test_demo_prompts_of_different_splits_are_no_near_duplicates():
    """Word 3-gram Jaccard under .5; task prompts are templates, so their items are compared instead (next test)."""
    where = defaultdict(set)
    rows = [(split, row, grams(row.prompt)) for split in SPLITS for row in demo_rows(split) if "task/" not in row.id]
    for number, (_, _, found) in enumerate(rows):
        for gram in found:
            where[gram].add(number)
    for number, (split, row, found) in enumerate(rows):
        for other in {n for gram in found for n in where[gram] if n > number}:
            other_split, other_row, other_found = rows[other]
            if split != other_split:
                assert len(found & other_found) / len(found | other_found) < 0.5, (row.id, other_row.id)


def test_demo_task_items_of_different_splits_differ():
    items = defaultdict(set)
    for split in SPLITS:
        for row in load_rows(str(DEMO / f"task.{split}.jsonl"), need_response=True):
            # What a prompt is about: the quoted word or phrase, or everything after the template's colon.
            item = row.prompt.split("'")[1] if "'" in row.prompt else row.prompt.rpartition(":")[2]
            if row.category in ("plural", "past", "acronym", "review", "record"):
                items[row.category, item.strip(" .")].add(split)
    assert all(len(splits) == 1 for splits in items.values())


def test_shipped_tasks_are_what_the_generator_writes():
    for split, rows in build().items():
        shipped = [json.loads(line) for line in (DEMO / f"task.{split}.jsonl").read_text().splitlines()]
        assert shipped == rows


def test_every_harmful_row_is_answered_by_a_refusal_and_no_benign_one_is():
    for split in SPLITS:
        for row in demo_rows(split):
            assert is_refusal(row.response) == row.id.startswith("harmful/"), (row.id, row.response)


@pytest.mark.skipif(not Path("../shared/data").is_dir(), reason="the research data set ../shared/data is not here")
def test_demo_rows_are_not_those_of_the_research_data():
    shipped = {row.prompt_hash for split in SPLITS for row in demo_rows(split)}
    for path in sorted(Path("../shared/data").glob("[ce][av]*/*.jsonl")):
        for line in path.read_text().splitlines():
            prompt = json.loads(line).get("prompt") or json.loads(line)["question"]
            assert Row("x", prompt).prompt_hash not in shipped, (path, prompt)


@pytest.mark.skipif(not Path("../shared/data").is_dir(), reason="the research data set ../shared/data is not here")
@pytest.mark.parametrize("name", ["overrefusal_xstest_safe", "harmful_xstest_unsafe"])
def test_studies_may_calibrate_on_the_demos_borderline_prompts(name):
    """Studies evaluate on XSTest: no prompt of either is a near-duplicate of the other's, not even at .4 for .5."""
    tested = [grams(row.prompt) for row in load_rows(f"../shared/data/eval/{name}.jsonl", need_response=False)]
    for row in (
        row for split in SPLITS for row in load_rows(str(DEMO / f"borderline.{split}.jsonl"), need_response=True)
    ):
        own = grams(row.prompt)
        assert max(len(own & other) / len(own | other) for other in tested) < 0.4, row.prompt


def write(path, *rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_columns_map_to_fields(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        {"instruction": "Add", "input": "1 2", "output": "3", "safe": True, "kind": {"x": False, "y": True}},
        {"instruction": "Say hi", "input": "", "output": "hi", "safe": True, "kind": {}},
        {"instruction": "bad", "input": "", "output": "no", "safe": False, "kind": {}},
    )
    columns = {"prompt": "{instruction}\n\n{input}", "response": "output", "category": "kind"}
    rows = load_rows(RowSource(path, columns=columns, where={"safe": True}), need_response=True)
    assert [(r.prompt, r.response, r.category) for r in rows] == [("Add\n\n1 2", "3", "y"), ("Say hi", "hi", "")]


def test_categories_in_a_template_are_written_as_they_are_alone(tmp_path):
    path = write(
        tmp_path / "a.jsonl", {"prompt": "p", "flags": {"x, y": True, "n": False, "z": True}, "kinds": ["a", "b"]}
    )
    for template, category in (("{flags}", "x, y + z"), ("{kinds}", "a + b"), ("of {kinds}", "of a + b")):
        columns = {"response": "", "category": template}
        (row,) = load_rows(RowSource(path, columns=columns), need_response=False)
        assert row.category == category


def test_programming_rows_refuse_columns_of_no_field(tmp_path):
    with pytest.raises(InputError, match=r"a\.jsonl: columns maps unknown field 'promt'; expected task_id, prompt, "):
        load_code(RowSource(str(tmp_path / "a.jsonl"), columns={"promt": "x"}))


def test_sources_are_written_out_on_the_command_line():
    one, two = as_sources('[a.jsonl, {"path": "b.csv", "limit": 3}]')
    assert (one, two) == (RowSource("a.jsonl"), RowSource("b.csv", limit=3))
    assert as_sources('{"path": "b.csv", "limit": 3}') == [two]
    with pytest.raises(InputError, match="unknown key 'colour'"):
        as_sources('[{"path": "b.csv", "colour": "red"}]')
    with pytest.raises(InputError, match="nor YAML"):
        as_sources("[a.jsonl")


def test_a_broken_table_says_what_is_broken(tmp_path):
    (tmp_path / "rows").mkdir()
    write(tmp_path / "rows" / "rows.json", '{"prompt": ')
    with pytest.raises(InputError, match=r"rows: .*\(.*JSON"):
        load_rows(str(tmp_path / "rows"), need_response=True)
    for text, message in (
        ('{"prompt": ', "rows.json:1: not valid JSON"),
        ('[{"prompt": "a"},\n{"prompt": ]', "rows.json:2: not valid JSON .*column 12"),
        ('[{"prompt": "a"}, 5]', "rows.json: entry 1 is a int; expected a JSON object"),
        ('[{"prompt": "\\ud800"}]', "rows.json: entry 0: half of a surrogate pair"),
    ):
        with pytest.raises(InputError, match=message):
            load_rows(write(tmp_path / "rows.json", text), need_response=False)


@pytest.mark.parametrize(("sign", "count", "reason"), [("1", 5000, "Exceeds"), ("[", 100000, "maximum recursion")])
@pytest.mark.parametrize(
    "form", ['[{"prompt": %s}]', '{"prompt": %s}', '{\n"prompt": %s\n}'], ids="list line walk".split()
)
def test_json_that_pythons_decoder_cannot_hold_is_one_line(tmp_path, form, sign, count, reason):
    path = write(tmp_path / "rows.json", form % (sign * count))
    with pytest.raises(InputError, match=rf"^\S*rows\.json: not valid JSON \({reason}"):
        load_rows(path, need_response=False)


@pytest.mark.parametrize("folder", ["run [x]", "run ?"])
@pytest.mark.parametrize("name", ["rows[1].csv", "r*.csv"])
def test_a_path_is_no_pattern(tmp_path, monkeypatch, folder, name):
    for place in (folder, "run x"):
        (tmp_path / place).mkdir()
        for each in (name, "rows1.csv"):
            (tmp_path / place / each).write_text(f"prompt\n{place}/{each}\n")
    monkeypatch.chdir(tmp_path / folder)
    for given in (name, f"../{folder}/{name}", str(tmp_path / folder / name)):
        assert [row.prompt for row in load_rows(given, need_response=False)] == [f"{folder}/{name}"]
    with pytest.raises(InputError, match=r"^\.: the path .*/run .* has one of \* \? \[; expected another name"):
        load_rows(".", need_response=False)


def test_a_number_that_is_none_is_no_text(tmp_path):
    import pandas

    lines = ('{"prompt": "a", "response": "b", "id": NaN, "category": NaN}\n', '{"prompt": "c", "category": 1}\n')
    path = write(tmp_path / "a.jsonl", *lines)
    (row,) = load_rows(RowSource(path, answered=True), need_response=True)
    assert (row.id, row.category, row.response) == ("a.jsonl/0", "", "b")
    (row, _) = load_rows(RowSource(path, columns={"prompt": "{prompt}{category}"}, limit=2), need_response=False)
    assert row.prompt == "a"
    pandas.DataFrame({"prompt": ["a", "b"], "response": [1.5, float("nan")]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(InputError, match="row 1: the row has no answer"):
        load_rows(str(tmp_path / "a.parquet"), need_response=True)


def test_values_of_json_files_stay_as_they_are_written(tmp_path):
    lines = [{"prompt": "day", "response": "2021-03-04"}, {"prompt": "next", "response": "2021-03-05"}]
    for text in (json.dumps(lines), "\ufeff" + json.dumps(lines, indent=1), "\n".join(map(json.dumps, lines))):
        rows = load_rows(write(tmp_path / "rows.json", text), need_response=True)
        assert [row.response for row in rows] == ["2021-03-04", "2021-03-05"]


def test_json_files_that_datasets_reads_are_read(tmp_path):
    ragged = [{"prompt": "a"}, {"prompt": "b", "response": "c"}]
    for text in (
        json.dumps(ragged),
        "\n".join(map(json.dumps, ragged)),
        "\n" + "\n".join(json.dumps(row, indent=1) for row in ragged),
    ):
        assert read_json(Path(write(tmp_path / "rows.json", text))) == [ragged[0] | {"response": None}, ragged[1]]
        columns = {"response": "response"}
        rows = load_rows(RowSource(str(tmp_path / "rows.json"), columns=columns), need_response=False)
        assert [row.response for row in rows] == ["", "c"]
    assert read_json(Path(write(tmp_path / "rows.json", '["a", "b"]'))) == [{"text": "a"}, {"text": "b"}]
    for text, message in (
        ('{\n "prompt": "a"\n}\n5', "rows.json: entry 1 is a int; expected a JSON object"),
        ('{\n "prompt": a\n}', "rows.json:2: not valid JSON .*column 12"),
        ('{"prompt": "a"}\n{\n', "rows.json:2: not valid JSON"),
        ("", "rows.json: no rows"),
    ):
        with pytest.raises(InputError, match=message):
            read_json(Path(write(tmp_path / "rows.json", text)))


def test_texts_that_were_made_times_are_refused(tmp_path):
    write(tmp_path / "a.jsonl", {"prompt": "day", "response": "2021-03-04"})
    with pytest.raises(InputError, match=r"row 0: the response was read as a datetime; .*: name JSON files one by one"):
        load_rows(str(tmp_path), need_response=True)


def test_templates_name_columns_of_any_name(tmp_path):
    path = write(tmp_path / "a.jsonl", {"Question": "Why?", "Correct Answer": "So.", "a-b": "{Question}", "n.n": 3})
    columns = {"prompt": "Q: {Question} {a-b} {n.n}", "response": "The answer is {Correct Answer}"}
    (row,) = load_rows(RowSource(path, columns=columns), need_response=True)
    assert (row.prompt, row.response) == ("Q: Why? {Question} 3", "The answer is So.")
    # Braces of JSON, LaTeX and sets.
    literal = r"""{"answer": {Question}} {"x": 1} {} {\frac} {1, 2}"""
    (row,) = load_rows(RowSource(path, columns={"prompt": literal}), need_response=False)
    assert row.prompt == literal.replace("{Question}", "Why?")
    for name in ("Correct Anser", "choices.text", "my-col", "question"):
        with pytest.raises(InputError, match=rf"a\.jsonl:1: no column '{name}'; the row has 'Question'"):
            load_rows(RowSource(path, columns={"prompt": f"{{{name}}}"}), need_response=False)


def test_groups_of_latex_in_a_template_stay_as_they_are(tmp_path):
    path = write(tmp_path / "a.jsonl", {"a": "Why?", "b": "7"})
    literal = r"{a} \boxed{your answer} \text{Final Answer: {b}} \frac{n}{m + 1} x^{n+1} x_{i} { }"
    (row,) = load_rows(RowSource(path, columns={"prompt": literal, "id": r"{a}_{b}\_{b}"}), need_response=False)
    assert row.prompt == literal.replace("{a}", "Why?").replace("{b}", "7")
    assert row.id == r"Why?_7\_7"


def test_text_columns_of_templates_are_text_in_a_csv_file(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,Best Answer\n1,0.10\n")
    source = RowSource(str(tmp_path / "a.csv"), columns={"response": "It is {Best Answer}"})
    assert [row.response for row in load_rows(source, need_response=True)] == ["It is 0.10"]


def test_parts_of_a_template_are_texts(tmp_path):
    path = write(tmp_path / "a.jsonl", {"q": "Why?", "choices": {"text": ["a"], "label": ["A"]}, "turns": ["b"]})
    for column, kind in (("choices", "dict"), ("turns", "list")):
        with pytest.raises(InputError, match=f"a.jsonl:1: column '{column}' of the prompt is a {kind}; expected text"):
            load_rows(RowSource(path, columns={"prompt": f"{{q}}\n{{{column}}}"}), need_response=False)


def test_a_file_has_no_slice_of_a_split(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "a"}, {"prompt": "b"})
    assert len(load_rows(RowSource(path, split="validation"), need_response=False)) == 2
    with pytest.raises(InputError, match=r"a\.jsonl: split is 'train\[:1\]', and a file has none; use skip and limit"):
        load_rows(RowSource(path, split="train[:1]"), need_response=False)


def test_what_remove_leaves_is_stripped(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "a", "response": "<think>x</think>\n\nyes #"})
    source = RowSource(path, remove="<think>.*</think>|#")
    assert [row.response for row in load_rows(source, need_response=True)] == ["yes"]


def test_a_mapping_that_is_not_utf8_is_one_line(tmp_path):
    (tmp_path / "m.yaml").write_bytes("path: é.jsonl\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"m\.yaml: not valid YAML"):
        as_sources(str(tmp_path / "m.yaml"))


@pytest.mark.parametrize(
    ("mapping", "record", "expected"),
    [
        (
            "beavertails",
            {"prompt": "p", "response": "r", "category": {"hate": False, "theft": True}, "is_safe": True},
            ("p", "r", "theft"),
        ),
        ("alpaca", {"instruction": "i", "input": "x", "output": "o", "text": "t"}, ("i\n\nx", "o", "")),
        ("gsm8k", {"question": "q", "answer": "2+3=<<2+3=5>>5\n#### 5"}, ("q", "2+3=5\n#### 5", "")),
    ],
)
def test_shipped_mappings_read_their_hub_schema(tmp_path, mapping, record, expected):
    (source,) = as_sources(f"{mapping}.yaml")
    source.path = write(tmp_path / "local.jsonl", record)
    (row,) = load_rows(source, need_response=True)
    assert (row.prompt, row.response, row.category) == expected


@pytest.mark.parametrize("suffix", ["csv", "json", "parquet"])
def test_other_file_forms_are_read(tmp_path, suffix):
    import pandas

    frame = pandas.DataFrame([{"prompt": "p1", "response": "r1"}, {"prompt": "p2", "response": "r2"}])
    path = tmp_path / f"rows.{suffix}"
    if suffix == "csv":
        frame.to_csv(path, index=False)
    elif suffix == "json":
        frame.to_json(path, orient="records")
    else:
        frame.to_parquet(path)
    assert [row.response for row in load_rows(str(path), need_response=True)] == ["r1", "r2"]


def test_selection_is_shuffled_by_seed_and_cut(tmp_path):
    path = write(tmp_path / "a.jsonl", *({"prompt": str(i)} for i in range(10)))
    one = [r.prompt for r in load_rows(RowSource(path, seed=1, skip=2, limit=3), need_response=False)]
    two = [r.prompt for r in load_rows(RowSource(path, seed=1, skip=2, limit=3), need_response=False)]
    assert one == two != ["2", "3", "4"]
    assert len(one) == 3


def test_one_answer_for_every_row_stands_in_place_of_the_column(tmp_path):
    lines = ({"prompt": "a"}, {"prompt": "b", "response": "Sure."}, {"prompt": "c", "response": [{"role": "user"}]})
    path = write(tmp_path / "a.jsonl", *lines)
    rows = load_rows(RowSource(path, response=" I can't help with that. "), need_response=True)
    assert [(row.prompt, row.response) for row in rows] == [(p, "I can't help with that.") for p in "abc"]
    named = write(tmp_path / "goals.jsonl", {"goal": "a", "target": "Sure."})
    mapping = tmp_path / "goals.yaml"
    mapping.write_text(f"path: {named}\ncolumns: {{prompt: goal}}\nresponse: I can't help with that.\n")
    assert [(row.prompt, row.response) for row in load_rows(str(mapping), need_response=True)] == [
        ("a", "I can't help with that.")
    ]


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        (['{"prompt": "a", "response": "b"}\n', "{oops\n"], {}, r"a\.jsonl:2: not valid JSON"),
        (["[1]\n"], {}, r"a\.jsonl:1: expected a JSON object"),
        (["\n", "\n"], {}, "no rows"),
        (['{"prompt": ' + "1" * 5000 + "}\n"], {}, r"a\.jsonl:1: not valid JSON \(Exceeds the limit"),
        (['{"prompt": ' + "[" * 100000 + "\n"], {}, r"a\.jsonl:1: not valid JSON \(maximum recursion"),
        ([{"prompt": "a", "response": float("nan")}], {}, r"a\.jsonl:1: the row has no answer"),
        ([{"prompt": float("-inf"), "response": "b"}], {}, r"a\.jsonl:1: the prompt is empty"),
        ([{"prompt": "a", "response": ""}], {}, r"a\.jsonl:1: the row has no answer"),
        ([{"prompt": "a"}], {}, r"no answer; expected text in 'response'; the row has 'prompt' \(columns: {response: "),
        ([{"prompt": " ", "response": "b"}], {}, r"a\.jsonl:1: the prompt is empty"),
        (
            [{"question": "a", "response": "b"}],
            {},
            r"a\.jsonl:1: no column 'prompt'; the row has 'question', 'response' \(columns: {prompt: NAME} names one",
        ),
        ([{"prompt": "a"}], {"columns": {"response": "x"}}, r"a\.jsonl:1: no column 'x'"),
        ([{"prompt": "a"}], {"columns": {"reply": "x"}}, "unknown field 'reply'"),
        ([{"prompt": "a"}], {"where": {"safe": True}}, r"a\.jsonl:1: no column 'safe'"),
        ([{"prompt": "a", "response": "b"}], {"remove": "("}, "remove is not a regular expression"),
        ([{"prompt": "a"}], {"response": " "}, r"a\.jsonl: response is ' '; expected a text"),
        ([{"prompt": "a"}], {"response": "no", "remove": "n"}, r"a\.jsonl: response is 'no'; .* neither remove"),
        ([{"prompt": "a"}], {"response": "no", "columns": {"response": "x"}}, r"neither remove nor columns\.response"),
        ([{"prompt": "a", "response": "b"}], {"skip": 4}, "no rows left of 1"),
        (
            [{"prompt": "a", "response": "b", "part": "train"}] * 3,
            {"where": {"part": "trian"}, "unique": True},
            r"no rows left of 3 after where {'part': 'trian'}, unique \(0 left\) and skip 0",
        ),
        ([{"prompt": "a", "response": "b"}], {"limit": 0}, "limit at least 1"),
        ([{"prompt": "a", "response": "b"}], {"answer_tokens": 0}, r"a\.jsonl: answer_tokens is 0; expected a whole"),
        ([{"prompt": "a", "response": "b"}], {"answer_tokens": "5"}, r"answer_tokens is .5.; expected a whole"),
        ([{"prompt": "a", "response": "b"}], {"weight": 0}, r"a\.jsonl: weight is 0; expected a number above 0"),
        ([{"prompt": "a", "response": "b"}], {"weight": "2"}, r"weight is .2.; expected a number above 0"),
        ([{"prompt": "a", "response": "b"}], {"weight": float("nan")}, "weight is nan; expected a number above 0"),
    ],
)
def test_bad_rows_name_file_line_and_key(tmp_path, lines, options, message):
    path = write(tmp_path / "a.jsonl", *lines)
    with pytest.raises(InputError, match=message):
        load_rows(RowSource(path, **options), need_response=True)


def test_rows_without_an_answer_are_left_out_where_a_source_says_so(tmp_path, caplog):
    (source,) = as_sources("alpaca.yaml")
    lines = ({"instruction": f"i{n}", "input": "", "output": output} for n, output in enumerate(["a", "", "b"]))
    source.path = write(tmp_path / "a.jsonl", *lines)
    with caplog.at_level("INFO"):
        assert [row.response for row in load_rows(source, need_response=True)] == ["a", "b"]
    assert "a.jsonl: 1 rows without an answer left out" in caplog.text
    # A suite of prompts draws from the same rows: what training takes and the rest are all of them.
    path = write(tmp_path / "b.jsonl", *({"prompt": f"{n}", "response": "a" * (n % 2)} for n in range(20)))
    one = load_rows(RowSource(path, answered=True, seed=0, limit=5), need_response=True)
    two = load_rows(RowSource(path, answered=True, seed=0, skip=5), need_response=False)
    assert sorted(int(row.prompt) for row in one + two) == list(range(1, 20, 2))


def test_a_source_may_say_more_than_the_mapping_that_it_names(tmp_path):
    rows = [{"q": f"q{n}", "a": f"a{n}", "kind": "xy"[n % 2]} for n in range(6)]
    path = write(tmp_path / "rows.jsonl", *rows)
    mapping = tmp_path / "m.yaml"
    mapping.write_text(f"path: {path}\ncolumns: {{prompt: q, response: a}}\nwhere: {{kind: x}}\nlimit: 3\n")
    for given in (
        RowSource(str(mapping), limit=2),
        f"{{path: {mapping}, limit: 2}}",
        [RowSource(str(mapping), limit=2)],
    ):
        assert [(row.prompt, row.response) for row in load_rows(given, need_response=True)] == [
            ("q0", "a0"),
            ("q2", "a2"),
        ]
    (same,) = as_sources([RowSource(str(mapping))])
    assert (same.path, same.limit) == (path, 3)


@pytest.mark.parametrize("template", ["auto", "raw"])
def test_a_tokenizer_without_a_template_is_said_where_nothing_chose_the_form(tmp_path, caplog, template):
    one, two = (write(tmp_path / f"{name}.jsonl", {"prompt": name, "response": "a"}) for name in "ab")
    data = ExpertData(one, two, template=template)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    data.bind(tokenizer)
    data.encode(load_rows(one, need_response=True), "data.train")
    assert ("data.train: this tokenizer has no chat template" in caplog.text) == (template == "auto")


def test_text_of_a_csv_file_is_text(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,response,level\n1,0.10,1\n02,None,2\nn/a,2.50,2\n")
    rows = load_rows(str(tmp_path / "a.csv"), need_response=True)
    assert [(row.prompt, row.response) for row in rows] == [("1", "0.10"), ("02", "None"), ("n/a", "2.50")]
    chosen = load_rows(RowSource(str(tmp_path / "a.csv"), where={"level": 2}), need_response=True)
    assert [row.response for row in chosen] == ["None", "2.50"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        # An unquoted comma: pandas takes the first field for the row's name and moves the others to the left.
        ("a.csv", "prompt,response\nHow?,I'm sorry, but no.\n", r"a\.csv, line 2: 3 fields under a header of 2"),
        ("a.csv", "prompt,response\nHow?,No.\nWhy?,So, so.\n", r"a\.csv, line 3: 3 fields under a header of 2"),
        ("a.tsv", "prompt\tresponse\nHow?\ta\tb\n", r"a\.tsv, line 2: 3 fields"),
        ("d/a.csv", "prompt,response\nHow?,I'm sorry, but no.\n", r"a\.csv, line 2: 3 fields under a header of 2"),
        ("d/a.tsv", "prompt\tresponse\nHow?\tNo.\n", r"a\.tsv: tables with tabs in a directory are not read"),
        ("a.csv", "prompt;response\nHow?;No.\n", r"a\.csv: one column, 'prompt;response'; expected ',' .* not ';'"),
        ("a.csv", "prompt\tresponse\nHow?\tNo.\n", r"a\.csv: one column, .* is named \.tsv"),
        ("a.csv", "prompt,response\nO\udcf9?,Non.\n", r"a\.csv: not UTF-8 text .*; save it as UTF-8"),
        ("a.csv", "prompt,response\n", r"a\.csv: no rows"),
        ("a.csv", "", r"a\.csv: no rows"),
        (
            "a.txt",
            "prompt",
            r"a\.txt: the name ends in '\.txt'; expected one of \.jsonl, \.jsonl\.gz, \.csv, \.tsv, \.parquet",
        ),
    ],
)
def test_files_that_are_no_table_of_rows_are_one_line(tmp_path, name, text, message):
    (tmp_path / "d").mkdir()
    (tmp_path / name).write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(InputError, match=message):
        load_rows(str(tmp_path / name.split("/")[0]), need_response=True)


def test_quoted_separators_long_fields_and_short_rows_of_a_csv_file_are_read(tmp_path):
    long = "word, " * 40_000
    (tmp_path / "a.csv").write_text(f'\ufeff\nprompt,response,level\n"How, and why?","{long}end",1\n"two\nlines",b\n')
    rows = load_rows(str(tmp_path / "a.csv"), need_response=True)
    assert [(row.prompt, row.response) for row in rows] == [("How, and why?", f"{long}end"), ("two\nlines", "b")]


def test_text_of_csv_files_in_a_directory_is_text(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "train.csv").write_text("prompt,response\n1,0.10\n02,None\n")
    rows = load_rows(str(tmp_path / "d"), need_response=True)
    assert [(row.prompt, row.response) for row in rows] == [("1", "0.10"), ("02", "None")]


def test_bytes_are_no_text(tmp_path):
    pd.DataFrame({"prompt": [b"a"], "response": [b"b"]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(InputError, match="the prompt is a bytes; expected text"):
        load_rows(str(tmp_path / "a.parquet"), need_response=True)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0].content }", "its chat template cannot be rendered"),
        ("{{ raise_exception('needs a system message') }}", r"cannot be rendered \(needs a system message\)"),
        (
            "{% for m in messages %}{% for part in m.content if part.text %}{{ part.text }}{% endfor %}{% endfor %}",
            "leaves out what the user says",
        ),
    ],
)
def test_a_template_that_renders_no_prompt_is_one_line(tokenizer, template, message):
    broken = copy.deepcopy(tokenizer)
    broken.chat_template = template
    with pytest.raises(InputError, match=message):
        Encoder(broken)


def test_a_template_that_leaves_out_answers_ends_them_with_the_end_token(tokenizer):
    asking = copy.deepcopy(tokenizer)
    asking.chat_template = "<|im_start|>{{ messages[0].content }}<|im_end|>"
    assert Encoder(asking).end_id == asking.eos_token_id


def test_a_data_set_that_is_a_script_is_one_line(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "x.py").write_text("raise SystemExit\n")
    with pytest.raises(InputError, match=r"x: neither a readable file nor a data set .* no longer supported"):
        load_rows(str(tmp_path / "x"), need_response=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("limit: ten", "limit is 'ten'; expected a whole number"),
        ("limit: 2e3", "limit is '2e3'; expected a whole number"),
        ("seed: true", "seed is True; expected a whole number"),
        ("where:", "where is None; expected a mapping"),
        ("columns:", "columns is None; expected a mapping"),
        ("columns: {prompt: 3}", "columns is {'prompt': 3}; expected a mapping"),
        ("unique: 1", "unique is 1; expected true or false"),
        ("weight: much", "weight is 'much'; expected a number"),
        ("split: [a]", r"split is \['a'\]; expected text"),
    ],
)
def test_options_of_a_source_that_are_of_another_type_are_one_line(tmp_path, text, message):
    (tmp_path / "m.yaml").write_text(f"path: a.jsonl\n{text}\n")
    with pytest.raises(InputError, match=rf"m\.yaml: {message}"):
        as_sources(str(tmp_path / "m.yaml"))
    with pytest.raises(InputError, match=message):
        as_sources(f"{{path: a.jsonl, {text}}}" if text[-1] != ":" else f"{{path: a.jsonl, {text} }}")


def test_missing_files_and_mappings_are_named(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        load_rows(str(tmp_path / "x.jsonl"), need_response=True)
    with pytest.raises(InputError, match="no such file"):
        load_rows(str(tmp_path / "x.csv"), need_response=True)
    with pytest.raises(InputError, match="no such file here or under configs/data"):
        load_rows("nowhere.yaml", need_response=True)
    (tmp_path / "m.yaml").write_text("path: a.jsonl\ncolums: {}\n")
    with pytest.raises(InputError, match="unknown key 'colums'"):
        load_rows(str(tmp_path / "m.yaml"), need_response=True)
    with pytest.raises(InputError, match="no rows: name at least one"):
        load_rows(None, need_response=True)


def test_only_the_answer_and_its_end_are_scored(tokenizer):
    encoder = Encoder(tokenizer)
    encoded = encoder.encode(Row("a", "hello", "yes"))
    text = tokenizer.decode(encoded.ids)
    assert text == encoder.prompt_text("hello") + "yes<|im_end|>"
    assert tokenizer.decode(encoded.ids[encoded.answer_start :]) == "yes<|im_end|>"
    assert encoder.encode(Row("a", "hello")).ids == encoded.prompt_ids


@pytest.mark.parametrize(
    ("tokens", "answer"), [(1, "y"), (3, "yes"), (4, "yes<|im_end|>"), (9, "yes<|im_end|>"), (None, "yes<|im_end|>")]
)
def test_an_answer_may_be_cut_to_its_first_tokens(tokenizer, tmp_path, tokens, answer):
    path = write(tmp_path / "a.jsonl", {"prompt": "hello", "response": "yes"})
    (row,) = load_rows(RowSource(path, answer_tokens=tokens), need_response=True)
    assert row.response == "yes"
    encoded = Encoder(tokenizer).encode(row)
    assert tokenizer.decode(encoded.ids[encoded.answer_start :]) == answer
    assert encoded.prompt_ids == Encoder(tokenizer).encode(Row("a", "hello")).ids


def test_an_end_of_turn_that_only_the_vocabulary_calls_special_ends_answers(tokenizer):
    from tokenizers import AddedToken

    phi = copy.deepcopy(tokenizer)
    phi.add_tokens([AddedToken("<|turn|>", special=True)])
    phi.chat_template = phi.chat_template.replace("<|im_end|>", "<|turn|>")
    end = phi.convert_tokens_to_ids("<|turn|>")
    assert end not in phi.all_special_ids
    encoder = Encoder(phi)
    assert encoder.encode(Row("a", "hello", "yes")).ids[-1] == end
    assert encoder.stop_ids == sorted({end, phi.eos_token_id})


def test_prompts_of_a_template_with_a_date_are_those_of_another_day(tokenizer):
    dated = copy.deepcopy(tokenizer)
    dated.chat_template = "Today is {{ strftime_now('%d %b %Y') }}.\n" + dated.chat_template
    assert Encoder(dated).prompt_text("hello").startswith("Today is 26 Jul 2024.\n")


def test_templates_of_models_that_think_are_told_not_to_and_thoughts_are_no_answer(tokenizer):
    thinking = copy.deepcopy(tokenizer)
    thinking.chat_template += (
        "{% if add_generation_prompt and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
    )
    encoder = Encoder(thinking)
    assert encoder.prompt_text("hello").endswith("assistant\n<think>\n\n</think>\n\n")
    for said in ("<think>\n\n</think>\n\nI can't.", " <think>They ask <b>.\n</think>I can't.<|im_end|>", "I can't."):
        assert encoder.decode(thinking(said, add_special_tokens=False).input_ids) == "I can't."
    # DeepSeek's distilled models open a thought whatever they are told.
    thinking.chat_template = thinking.chat_template.replace("enable_thinking is false", "true").split("<think>")[0]
    thinking.chat_template += "<think>\n{% endif %}"
    assert Encoder(thinking).prompt_text("hello").endswith("assistant\n<think>\n\n</think>\n\n")
    # A thought that did not end is no answer, and one that the template opened has its end alone.
    for said, left in (("<think>They ask", ""), ("They ask\n</think>\n\nI can't.", "I can't.")):
        assert encoder.decode(thinking(said).input_ids) == left
    for tagged in ("Write <think> and </think> around it.", "Step 1: end with a </think> tag. Step 2."):
        assert encoder.decode(thinking(tagged).input_ids) == tagged


def test_what_stands_between_the_opening_of_a_turn_and_its_answer_is_of_the_prompt(tokenizer):
    """gpt-oss's template opens the turn, and names the channel with the answer only."""
    channelled = copy.deepcopy(tokenizer)
    channelled.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}{% if m.role == 'assistant' %}<|im_start|>final{% endif %}:"
        "{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
    )
    encoder = Encoder(channelled)
    row = encoder.encode(Row("r", "hello", "yes"))
    assert channelled.decode(row.ids) == (
        "<|im_start|>user:hello<|im_end|><|im_start|>assistant<|im_start|>final:yes<|im_end|>"
    )
    assert channelled.decode(row.ids[row.answer_start :]) == "yes<|im_end|>"
    # A thought that is opened whatever was asked, and stands empty before an answer, is closed once.
    thinking = copy.deepcopy(tokenizer)
    thinking.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    thinking.chat_template = (
        "{{ messages[0].content }}:<think>\n"
        "{% if messages|length > 1 %}\n</think>\n\n{{ messages[1].content }}{% endif %}"
    )
    assert Encoder(thinking).prompt_text("hello") == "hello:<think>\n\n</think>\n\n"
    # White space that only the whole turn has is the tokenizer's own affair (Llama 2).
    spaced = copy.deepcopy(tokenizer)
    spaced.chat_template = (
        "[{{ messages[0].content }}]{% if messages|length > 1 %} {{ messages[1].content }}<|im_end|>{% endif %}"
    )
    assert Encoder(spaced).prompt_text("hello") == "[hello]"


@pytest.mark.parametrize("first", [[], ["<|im_start|>"]])
def test_an_end_that_a_tokenizer_puts_behind_texts_does_not_close_a_prompt(tokenizer, first):
    from tokenizers.processors import TemplateProcessing

    closing = copy.deepcopy(tokenizer)
    closing.chat_template = None
    ids = [(token, closing.convert_tokens_to_ids(token)) for token in ("<|im_start|>", "<|im_end|>")]
    closing.backend_tokenizer.post_processor = TemplateProcessing(
        single=" ".join([*first, "$A", "<|im_end|>"]), special_tokens=ids
    )
    assert closing.decode(closing("x").input_ids).endswith("<|im_end|>")
    start = "".join(first)
    encoded = Encoder(closing).encode(Row("a", "hello", "yes"))
    assert closing.decode(encoded.prompt_ids) == f"{start}hello\n"
    assert closing.decode(encoded.ids) == f"{start}hello\nyes<|im_end|>"
    # An end that the text itself has stays.
    assert closing.decode(text_ids(closing, "a<|im_end|>", special=True)).startswith(f"{start}a<|im_end|>")
    row = ChoiceRow("c", "Q", "", choices=("one", "two"), answer=0)
    found = encode_choices(Encoder(closing, template="raw"), "mc", [row], FewShot([], 0, "question", "mc"), "cut")
    assert all(closing.decode(one.ids).count("<|im_end|>") == 0 for one in found.encoded)
    assert [closing.decode(one.ids[one.answer_start :]) for one in found.encoded] == [" one", " two"]


def test_answers_end_at_every_token_that_tokenizer_template_or_model_call_an_end(tokenizer):
    first = copy.deepcopy(tokenizer)
    first.eos_token = first.convert_ids_to_tokens(0)
    assert first.eos_token_id == 0  # no reason to pass over it
    end = first.convert_tokens_to_ids("<|im_end|>")
    assert Encoder(first).stop_ids == [0, end]
    assert Encoder(first, ends=[5, end]).stop_ids == [0, 5, end]
    model = make_model()
    assert own_ends(model) == [256]
    model.generation_config.eos_token_id = [256, 3]
    assert own_ends(model) == [256, 3]
    model.generation_config.eos_token_id = None
    assert own_ends(model) == own_ends(object()) == []


def test_raw_prompts_need_no_template(tokenizer):
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    assert plain.decode(Encoder(plain).encode(Row("a", "hello", "yes")).ids) == "hello\nyes<|im_end|>"
    with pytest.raises(InputError, match="no chat template"):
        Encoder(plain, template="chat")


@pytest.mark.parametrize(("prompt", "answer"), [(300, 3), (3, 300), (300, 300)])
def test_long_rows_are_cut_and_counted(tokenizer, prompt, answer):
    encoder = Encoder(tokenizer, max_length=64)
    encoded = encoder.encode(Row("a", "p" * prompt, "r" * answer))
    assert len(encoded.ids) <= 64
    assert 0 < encoded.answer_start < len(encoded.ids)
    assert encoder.truncated == 1
    # The end of the prompt, where the answer begins, survives.
    assert tokenizer.decode(encoded.prompt_ids).endswith("<|im_start|>assistant\n")


def test_validation_rows_must_not_be_training_rows(rows):
    with pytest.raises(InputError, match="is also a training prompt"):
        ExpertData(train=[str(rows["task"]), str(rows["val"])], val=str(rows["val"]))


def test_calibration_on_one_benign_source_warns(rows, caplog):
    passes = {"safety": "safety", "utility": "utility"}
    CalibrationData(safety=str(rows["harmful"]), utility=str(rows["task"])).bind_passes(passes, [])
    assert "one source only" in caplog.text
    caplog.clear()
    both = [str(rows["task"]), str(rows["benign"])]
    CalibrationData(safety=str(rows["harmful"]), utility=both).bind_passes(passes, [])
    assert not caplog.text


def test_calibration_on_repeated_prompts_warns(rows, tmp_path, caplog):
    lines = [{"id": str(i), "prompt": p, "response": "No."} for i, p in enumerate(("a", "A ", "b", "a"))]
    path = write(tmp_path / "a.jsonl", *lines)
    utility = [str(rows["task"]), str(rows["task"])]  # the same rows, of one id each
    data = CalibrationData(safety=path, utility=utility)
    data.bind_passes({"safety": "safety", "utility": "utility"}, [])
    line, other = [record.getMessage() for record in caplog.records]
    assert line.startswith("data.safety: 1 prompts stand in several rows")
    assert line.endswith("one row a prompt in one source; leave out of one what stands in two)")
    assert other == "data.utility: 13 of 26 rows are copies of others, and weigh as often as they stand there"
    caplog.clear()
    data.bind_passes({"safety": "safety", "utility": "utility"}, ["safety"])
    assert [record.getMessage() for record in caplog.records] == [other]
    caplog.clear()
    weighed = CalibrationData(safety=path, utility=utility, utility_weights=[1.0, 2.0])
    weighed.bind_passes({"safety": "safety", "utility": "utility"}, ["safety", "utility"])
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == "data.utility_weights has no effect here: passes over random tokens have no sources"


def test_copies_are_told_where_rows_are_learnt_and_where_they_are_counted(rows, tmp_path, caplog):
    lines = [{"id": str(i), "prompt": p, "response": r} for i, (p, r) in enumerate(("ax", "ax", "ay", "bx", "ax"))]
    path = write(tmp_path / "a.jsonl", *lines)
    ExpertData(train=path, val=str(rows["val"]))
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("data.train: 2 of 5 rows are copies of others, each learnt as often as it stands there")
    caplog.clear()
    choices = [{"question": "q", "choices": list(c), "answer": 0} for c in ("ab", "ab", "ac")]
    suites = [
        Suite("a", "utility", path),
        Suite("b", "choice", write(tmp_path / "b.jsonl", *choices)),
        Suite("c", "utility", str(rows["val"])),
    ]
    EvaluationData(suites)
    told = [record.getMessage().partition(",")[0] for record in caplog.records]
    assert told == [f"suite {name} rows are copies of others" for name in ("a: 2 of 5", "b: 1 of 3")]


def with_positions(positions, *, table):
    """A model of so many positions, which stand in a table or do not."""
    model = torch.nn.Module()
    model.config = SimpleNamespace(max_position_embeddings=positions)
    model.wte = torch.nn.Embedding(positions, 1)
    if table:
        model.wpe = torch.nn.Embedding(positions, 1)
    return model


def test_rows_longer_than_the_models_positions_are_one_line(rows, tokenizer):
    data = CalibrationData(safety=str(rows["harmful"]), max_length=64)
    data.bind_passes({"safety": "safety"}, [])
    data.bind(tokenizer)
    data.setup("predict")
    longest = max(len(encoded.ids) for encoded in data.encoded["safety"])
    strategy = SimpleNamespace()
    for positions, fits in ((longest, True), (longest - 1, False)):
        model = with_positions(positions, table=True)
        data.trainer = SimpleNamespace(strategy=strategy, lightning_module=SimpleNamespace(model=model))
        if fits:
            assert data.predict_dataloader()
            continue
        with pytest.raises(
            InputError, match=rf"max_length is 64 and a row has {longest} tokens; .*{positions} positions"
        ):
            data.predict_dataloader()


def test_positions_that_are_not_learned_are_no_limit(caplog):
    data = CalibrationData(max_length=64)
    data.trainer = SimpleNamespace(lightning_module=SimpleNamespace(model=with_positions(48, table=False)))
    for longest in (48, 50, 60):
        data._check_positions(longest)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == "a row has 50 tokens, more than the 48 positions of the model's config"


def test_long_rows_of_random_tokens_name_the_settings_of_their_lengths():
    data = CalibrationData(max_length=64)
    data.trainer = SimpleNamespace(lightning_module=SimpleNamespace(model=with_positions(80, table=True)))
    with pytest.raises(InputError, match=r"\(data\.random_prompt, data\.random_answer\) has 90 tokens; .*80 positions"):
        data._check_positions(90)


@pytest.mark.parametrize(("kind", "learned"), [("GPT2", True), ("OPT", True), ("Llama", False)])
def test_tables_of_positions_are_recognised(kind, learned):
    import transformers

    sizes = {"n_positions": 24, "n_embd": 8, "n_layer": 1, "n_head": 2} if kind == "GPT2" else {
        "max_position_embeddings": 24, "hidden_size": 8, "word_embed_proj_dim": 8, "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(vocab_size=24, pad_token_id=1, **sizes)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert has_table(model, model.config.max_position_embeddings) == learned


def test_calibration_without_rows_is_one_error(rows):
    data = CalibrationData(utility=str(rows["task"]))
    with pytest.raises(InputError, match=r"data\.safety names no rows"):
        data.bind_passes({"safety": "safety", "utility": "utility"}, [])
    data.bind_passes({"safety": "safety", "utility": "utility"}, ["safety"])
    with pytest.raises(InputError, match="expected 1 numbers above 0"):
        CalibrationData(utility=str(rows["task"]), utility_weights=[0.0])


def test_another_seed_draws_other_random_rows(tokenizer):
    drawn = []
    for seed in (0, 1):
        data = CalibrationData(random_rows=3, random_seed=seed)
        data.bind_passes({"safety": "safety"}, ["safety"])
        data.bind(tokenizer)
        data.setup("predict")
        drawn.append([encoded.ids for encoded in data.encoded["safety"]])
    assert drawn[0] != drawn[1]


def test_the_hash_of_rows_tells_order_and_content_apart(rows):
    one, two = (load_rows(str(rows["task"]), need_response=True) for _ in range(2))
    assert rows_sha256(one) == rows_sha256(two)
    assert rows_sha256(one) != rows_sha256(list(reversed(one)))
    assert rows_sha256(one) != rows_sha256([*one[:-1], replace(one[-1], response="other")])
    assert rows_sha256(one) != rows_sha256([*one[:-1], replace(one[-1], answer_tokens=5)])


def test_rows_of_whole_answers_keep_their_hash():
    # Of the line {"category": "", "id": "a", "prompt": "b", "response": "c", "source": "d"}.
    expected = "963029c5efdc5a116f55afd663212fe1800bcb42b93d9d7c328c95116e6b8598"
    assert rows_sha256([Row("a", "b", "c", source="d")]) == expected


@pytest.mark.parametrize("tokens", [1, 2])
def test_evaluation_takes_whole_answers(rows, tokens):
    suite = Suite("a", "utility", RowSource(str(rows["task"]), answer_tokens=tokens))
    with pytest.raises(InputError, match=r"suite a: .*: answer_tokens is for training and Fisher passes; leave it out"):
        suite.load()


def test_weights_are_for_fisher_passes(rows):
    source = RowSource(str(rows["task"]), weight=2)
    with pytest.raises(InputError, match=r"suite a: .*: weight is for Fisher passes; leave it out"):
        Suite("a", "utility", source).load()
    with pytest.raises(InputError, match="weight is for Fisher passes; leave it out"):
        ExpertData(train=source, val=str(rows["val"]))
    with pytest.raises(InputError, match="expected them or weights of rows, not both"):
        CalibrationData(utility=source, utility_weights=[3.0])


def test_a_core_is_trained_on_rows_of_fisher_passes_without_their_weights(rows):
    from src.experiments.cell import Cell
    from src.experiments.grid import Grid
    from src.experiments.recipe import EvaluationSpec, ExpertSpec, FisherSpec, Recipe
    from src.experiments.settings import MethodSpec
    from src.experiments.trainings import tuned_core
    from src.models.base import BaseSpec

    expert = ExpertSpec(str(rows["task"]), str(rows["val"]))
    weighed = [RowSource(str(rows["harmful"]), weight=8, answer_tokens=5)]
    fisher = FisherSpec(safety=weighed, utility=str(rows["benign"]))
    grid = Grid(Recipe(BaseSpec("x"), expert, EvaluationSpec([]), expert, fisher))
    one = Cell("fit", "one", {}, {})
    cell = tuned_core(grid, MethodSpec("core", train="core"), one, one, 0)
    assert cell.settings["data"]["train"] == [
        {"path": str(rows["harmful"]), "answer_tokens": 5},
        {"path": str(rows["benign"])},
    ]


def test_suites_are_checked(rows):
    with pytest.raises(InputError, match="suites is empty"):
        EvaluationData(suites=[])
    suite = Suite("a", "harmful", str(rows["harmful"]))
    with pytest.raises(InputError, match="names must differ"):
        EvaluationData(suites=[suite, suite])
    with pytest.raises(InputError, match="batch_size is 0"):
        EvaluationData(suites=[suite], batch_size=0)
