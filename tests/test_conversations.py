"""Rows that are conversations, and what the system says before them, from the file to the tokens."""

import gzip
import json

import pytest

from src.data.chat import Encoder
from src.data.conversations import spoken
from src.data.row_source import RowSource
from src.data.rows import learnt_sha256, rows_sha256
from src.data.sources import load_rows
from src.errors import InputError
from src.models.answer_files import write_answers
from tests.tiny import make_tokenizer

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Name a colour."},
    {"role": "assistant", "content": "Red."},
    {"role": "user", "content": " Another one. "},
    {"role": "assistant", "content": "Blue."},
]
BEFORE = (("system", "Be brief."), ("user", "Name a colour."), ("assistant", "Red."))


def read(tmp_path, *records, need_response=True, **options):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return load_rows(RowSource(str(path), **options), need_response=need_response)


def shared_gpt(turns):
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[turn["role"]], "value": turn["content"]} for turn in turns]


@pytest.mark.parametrize(
    ("record", "options"),
    [
        ({"messages": TURNS}, {}),
        ({"conversations": shared_gpt(TURNS)}, {"columns": {"prompt": "conversations"}}),
        ({"prompt": "not this", "chosen": TURNS}, {"columns": {"prompt": "chosen"}}),
        ({"prompt": TURNS[:-1], "response": "Blue."}, {}),
        ({"prompt": TURNS[:-1], "completion": TURNS[-1:]}, {"columns": {"response": "completion"}}),
        ({"messages": [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in TURNS]}, {}),
        ({"messages": TURNS}, {"response": "Blue."}),
        ({"messages": TURNS[:-1], "response": "Blue."}, {}),
        ({"messages": TURNS, "prompt": None, "response": None}, {}),
        ({"chosen": TURNS, "response": "Green."}, {"columns": {"prompt": "chosen", "response": "chosen"}}),
    ],
)
def test_the_last_question_is_the_prompt_its_answer_the_response_and_the_rest_stands_before(tmp_path, record, options):
    (row,) = read(tmp_path, record, **options)
    assert (row.prompt, row.response, row.before) == ("Another one.", "Blue.", BEFORE)


def test_a_text_that_is_called_messages_is_a_prompt_where_it_is_named_as_one(tmp_path):
    (row,) = read(tmp_path, {"messages": "Hi", "response": "Hello"}, columns={"prompt": "messages"})
    assert (row.prompt, row.before) == ("Hi", ())
    (row,) = read(tmp_path, {"messages": TURNS}, columns={"response": ""}, need_response=False)
    assert (row.prompt, row.response) == ("Another one.", "")


def test_prompts_alone_need_no_answer(tmp_path):
    (row,) = read(tmp_path, {"messages": TURNS[:-1]}, need_response=False)
    assert (row.prompt, row.response) == ("Another one.", "")
    with pytest.raises(InputError, match=r"rows\.jsonl:1: the row has no answer"):
        read(tmp_path, {"messages": TURNS[:-1]})


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([{"role": "tool", "content": "x"}], "a message's role is 'tool'; expected system, user or assistant"),
        ([{"role": ["user"], "content": "x"}], r"a message's role is \['user'\]; expected system"),
        ([{"text": "x"}], "a message's role is None; expected"),
        ([{"role": "user", "content": " "}], "the content of a message of user is ' '; expected text"),
        ([{"role": "user", "content": [{"type": "image"}]}], "the content of a message of user is .* expected text"),
        (TURNS[:3], None),
        (TURNS[:1], "the messages end without one of the user's"),
        ([TURNS[1], TURNS[2], TURNS[2]], "the messages end without one of the user's"),
        ([TURNS[1], TURNS[0], TURNS[4]], "a message of the system stands among the others"),
        ([TURNS[1], TURNS[0], TURNS[3]], "a message of the system stands among the others"),
        ([TURNS[0], TURNS[0], TURNS[3]], "a message of the system stands among the others"),
        ([TURNS[4]], "the messages end without one of the user's"),
    ],
)
def test_other_lists_of_messages_are_one_line(tmp_path, messages, said):
    if said is None:
        assert read(tmp_path, {"messages": messages})[0].response == "Red."
        return
    with pytest.raises(InputError, match=rf"rows\.jsonl:1: {said}"):
        read(tmp_path, {"messages": messages}, need_response=False)


def test_two_answers_are_one_too_many(tmp_path):
    with pytest.raises(InputError, match="both the messages and the column 'response' have an answer"):
        read(tmp_path, {"messages": TURNS, "response": "Green."})
    with pytest.raises(InputError, match="the response has messages of user, assistant; expected one"):
        read(tmp_path, {"prompt": "p", "response": TURNS[1:3]})


def test_what_the_system_says_is_said_before_every_row(tmp_path):
    rows = read(tmp_path, {"prompt": "Hi", "response": "Hello"}, {"messages": TURNS}, system=" You are kind. ")
    assert [row.before for row in rows] == [(("system", "You are kind."),), (("system", "You are kind."), *BEFORE[1:])]
    with pytest.raises(InputError, match="system is ' '; expected a text"):
        read(tmp_path, {"prompt": "Hi", "response": "Hello"}, system=" ")


def test_a_column_of_what_the_system_says_is_read_and_may_be_left_out(tmp_path):
    record = {"prompt": "Hi", "response": "Hello", "system": " Be kind. "}
    assert read(tmp_path, record)[0].before == (("system", "Be kind."),)
    assert read(tmp_path, record | {"system": None})[0].before == ()
    assert read(tmp_path, record, columns={"system": ""})[0].before == ()
    assert read(tmp_path, record, system="Be brief.")[0].before == (("system", "Be brief."),)
    named = {"prompt": "Hi", "response": "Hello", "system_prompt": "Be kind."}
    assert read(tmp_path, named, columns={"system": "system_prompt"})[0].before == (("system", "Be kind."),)
    assert read(tmp_path, {"messages": TURNS, "system": "Be kind."})[0].before == (("system", "Be kind."), *BEFORE[1:])


@pytest.mark.parametrize("messages", [[], '[{"role": "user", "content": "x"}]'])
def test_messages_that_are_no_list_of_messages_are_said(tmp_path, messages):
    with pytest.raises(InputError, match=r"rows\.jsonl:1: messages is .*; expected a list of messages"):
        read(tmp_path, {"messages": messages})


@pytest.mark.parametrize("name", ["", "null"])
def test_an_empty_name_is_no_source(name):
    with pytest.raises(InputError, match=f"a source of rows is '{name}'; expected a file"):
        load_rows(name, need_response=True)


def test_hashes_tell_conversations_apart_and_leave_those_of_single_prompts(tmp_path):
    bare, system, turns = read(
        tmp_path,
        {"id": "a", "prompt": "Another one.", "response": "Blue."},
        {"id": "a", "messages": [TURNS[0], *TURNS[3:]]},
        {"id": "a", "messages": TURNS},
    )
    # A prompt is the same prompt whatever the system says; behind other turns it is another.
    assert bare.prompt_hash == system.prompt_hash != turns.prompt_hash
    assert len({rows_sha256([row]) for row in (bare, system, turns)}) == 3
    assert len({learnt_sha256([row]) for row in (bare, system, turns)}) == 3
    assert spoken((), "Hi") == "Hi"
    assert turns.asked == "user: Name a colour.\nassistant: Red.\nuser: Another one."
    write_answers(tmp_path / "a.jsonl", [turns], [{"answer": "Green.", "index": 0}])
    assert json.loads((tmp_path / "a.jsonl").read_text())["prompt"] == turns.asked


def test_tokens_are_those_of_the_chat_template(tmp_path):
    tokenizer = make_tokenizer()
    (row,) = read(tmp_path, {"messages": TURNS})
    found = Encoder(tokenizer, max_length=200).encode(row)
    asked = tokenizer.apply_chat_template(
        [turn | {"content": turn["content"].strip()} for turn in TURNS[:-1]], tokenize=False, add_generation_prompt=True
    )
    assert found.prompt_ids == tokenizer(asked, add_special_tokens=False).input_ids
    assert tokenizer.decode(found.ids[found.answer_start : -1]) == "Blue."
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="rows with a system's message or earlier turns need a chat template"):
        Encoder(tokenizer, max_length=200).encode(row)


def test_files_of_rows_may_be_packed(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'\xef\xbb\xbf{"prompt": "p", "response": "r"}\r\n'))
    assert load_rows(str(path), need_response=True)[0].prompt == "p"
    for broken in (b"not packed", path.read_bytes()[:-9]):
        path.write_bytes(broken)
        with pytest.raises(InputError, match=r"rows\.jsonl\.gz: not a whole gzip file"):
            load_rows(str(path), need_response=True)


def test_an_answer_of_several_lines_keeps_the_indentation_of_its_first(tmp_path):
    code = "\n \n    c = a + b\n    return c  \n"
    messages = [{"role": "user", "content": "    Go on:\n  x"}, {"role": "assistant", "content": code}]
    found = read(tmp_path, {"prompt": "def add(a, b):\n", "response": code}, {"messages": messages})
    assert [row.response for row in found] == ["    c = a + b\n    return c"] * 2
    assert [row.prompt for row in found] == ["def add(a, b):", "Go on:\n  x"]
    plain = ["   Blue.\n", " Blue.\nIt is.", "\n\nBlue.", "\tx\n\ty"]
    found = read(tmp_path, *({"prompt": f"p{i}", "response": text} for i, text in enumerate(plain)))
    assert [row.response for row in found] == ["Blue.", "Blue.\nIt is.", "Blue.", "\tx\n\ty"]


def test_windows_ends_of_lines_inside_a_field_are_ends_of_lines(tmp_path):
    table = tmp_path / "rows.csv"
    table.write_bytes(b'prompt,response\r\n"one\r\ntwo","a\r\n  b"\r\n')
    turns = [{"role": "user", "content": "one\r\ntwo"}, {"role": "assistant", "content": "a\r\n  b"}]
    found = [*load_rows(str(table), need_response=True), *read(tmp_path, {"messages": turns})]
    assert [(row.prompt, row.response) for row in found] == [("one\ntwo", "a\n  b")] * 2
