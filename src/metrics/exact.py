"""Exact match of an answer with its reference, or of the last number in each."""

import re
from typing import Literal

AnswerForm = Literal["text", "number"]
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


def normalised(text: str) -> str:
    """Case folded, white space collapsed, quotes and the final full stop taken off."""
    return " ".join(text.casefold().split()).strip("\"'`").rstrip(".").strip()


def last_number(text: str) -> str | None:
    """The last number of a text in plain form (``1,200.50`` becomes ``1200.5``), or nothing."""
    found = NUMBER.findall(text)
    if not found:
        return None
    value = float(found[-1].replace(",", ""))
    return str(int(value)) if value.is_integer() else str(value)


def is_exact(answer: str, reference: str, form: AnswerForm = "text") -> bool:
    """True where the answer equals the reference after normalisation; an empty answer never does."""
    if form == "number":
        value = last_number(answer)
        return value is not None and value == last_number(reference)
    return bool(normalised(answer)) and normalised(answer) == normalised(reference)
