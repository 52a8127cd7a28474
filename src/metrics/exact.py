"""Exact match of an answer with its reference, or of the last number in each."""

import re
from decimal import Decimal
from typing import Literal

from src.metrics.refusal import plain as plain_text

AnswerForm = Literal["text", "number"]
# A minus behind a digit, a letter or a bracket is an operator or a hyphen; one before a currency mark is a sign. Commas
# or underscores part groups of three.
NUMBER = re.compile(
    r"(?:(?<![\w)\].\-\u2212])[-\u2212][$£€]?)?"
    r"(?:(?:[1-9]\d{0,2}(?:(?:,\d{3})+(?!\d|,\d)|(?:_\d{3})+(?!\d|_\d))|\d+)(?:\.\d+)?|(?<![\d.])\.\d+)"
    r"(?:[eE][+-]?\d{1,3}\b)?"
)


LATEX = (
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"(?<=\d)\\[,!] ?(?=\d{3}(?!\d))"), ""),
    (re.compile(r"(?<=\d)((?:\\?[ ~])*(?:\\(?:text|mathrm)\{\s*[A-Za-z]+\s*\}|[A-Za-z]+))\^\{?[23]\}?(?!\d)"), r"\1"),
)
"""Commas and thin spaces between groups of digits, and powers of units, with what stands for them."""
MARKED = re.compile(rf"^#### *[$£€]?({NUMBER.pattern})[ .%]*$", re.MULTILINE)
"""A line of GSM8K's form for a result (``#### 18``); a heading has words."""
EMPHASIS = re.compile(r"(\*{1,3}|__?)(\S(?:.*\S)?)\1")


def normalised(text: str) -> str:
    """Case folded, white space collapsed; Markdown's emphasis, quotes around it and full stops at its end taken off."""
    plain, before = plain_text(text).rstrip("."), ""
    while plain != before:
        before = plain
        whole = EMPHASIS.fullmatch(plain)
        plain = (whole[2] if whole else plain).strip("\"' ").rstrip(". ")
    return plain


def final_number(text: str) -> str | None:
    """The last number of a text in plain form, digit for digit (``1,200.50`` becomes ``1200.5``), or nothing.

    A model that does not stop goes on with questions of its own: the first line of the form ``#### 18`` is the result.
    """
    for form, plain in LATEX:
        text = form.sub(plain, text)
    marked = MARKED.search(text)
    found = NUMBER.findall(text if marked is None else marked[1])
    if not found:
        return None
    value = format(Decimal(re.sub("[,_$£€]", "", found[-1]).replace("\u2212", "-")), "f")
    whole = value.rstrip("0").rstrip(".") if "." in value else value
    return "0" if whole == "-0" else whole


def is_exact(answer: str, reference: str, form: AnswerForm = "text") -> bool:
    """True where the answer equals the reference after normalisation; an empty answer never does."""
    if form == "number":
        value = final_number(answer)
        return value is not None and value == final_number(reference)
    return bool(normalised(answer)) and normalised(answer) == normalised(reference)
