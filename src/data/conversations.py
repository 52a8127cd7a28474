"""Conversations: columns that hold lists of messages, in the two forms that data sets on the hub have.

``{"role": "user", "content": …}`` as transformers' chat templates take them, ``{"from": "human", "value": …}`` as
ShareGPT's exports have them.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from src.errors import InputError

Message = tuple[str, str]
"""Role (system, user, assistant) and text."""
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
BLANK_LINES = re.compile(r"\A(?:[ \t]*\n)+")
INDENTED = re.compile(r"\t|  ")
"""How code is indented; a single space in front of an answer is its data set's habit."""


@dataclass(frozen=True)
class Conversation:
    """What stands before the last thing that the user says, that, and the answer to it; empty where there is none."""

    before: tuple[Message, ...]
    prompt: str
    response: str


def plain_text(text: str) -> str:
    """A text without white space around it, and without Windows' ends of lines."""
    return text.replace("\r\n", "\n").strip()


def answer_text(text: str) -> str:
    """An answer without white space around it, but for what indents the first of several lines: it may be code."""
    found = plain_text(text)
    first = BLANK_LINES.sub("", text.replace("\r\n", "\n"))
    indented = "\n" in found and INDENTED.match(first)
    return first.rstrip() if indented else found


def is_conversation(value: Any) -> bool:
    """Whether a column's value is a list of messages rather than text."""
    return isinstance(value, list) and bool(value) and all(isinstance(one, Mapping) for one in value)


def read_conversation(value: Any, place: str) -> Conversation:
    """Divide a list of messages; ``place`` says where it stands.

    Raises:
        InputError: a message has another form, another role, or no text; the user says nothing in the end.
    """
    messages = [_message(one, place) for one in value]
    if any(role == "system" for role, _ in messages[1:]):
        raise InputError(f"{place}: a message of the system stands among the others; expected it in front")
    answer = messages.pop()[1] if messages[-1][0] == "assistant" else ""
    if not messages or messages[-1][0] != "user":
        raise InputError(f"{place}: the messages end without one of the user's; expected one, and at most an answer")
    *before, (_, prompt) = messages
    return Conversation(tuple(before), prompt, answer)


def answer_of(value: Any, place: str) -> str:
    """The text of a column that holds an answer as a list of one message.

    Raises:
        InputError: it holds anything else.
    """
    messages = [_message(one, place) for one in value]
    if [role for role, _ in messages] != ["assistant"]:
        said = ", ".join(role for role, _ in messages)
        raise InputError(f"{place}: the response has messages of {said}; expected one of the assistant's")
    return messages[0][1]


def spoken(before: tuple[Message, ...], prompt: str) -> str:
    """A prompt with the turns before it, as one text; what the system says is left out."""
    turns = [(role, text) for role, text in before if role != "system"]
    return "\n".join(f"{role}: {text}" for role, text in [*turns, ("user", prompt)]) if turns else prompt


def _message(value: Mapping[str, Any], place: str) -> Message:
    role, text = value.get("role", value.get("from")), value.get("content", value.get("value"))
    if not isinstance(role, str) or role not in ROLES:
        raise InputError(f"{place}: a message's role is {role!r}; expected system, user or assistant")
    if isinstance(text, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in text):
        text = "".join(str(part.get("text", "")) for part in text)
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{place}: the content of a message of {role} is {text!r}; expected text")
    return ROLES[role], answer_text(text) if ROLES[role] == "assistant" else plain_text(text)
