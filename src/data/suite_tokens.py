"""Token ids of a suite's rows, by its kind.

A multiple-choice row becomes one sequence where every choice is a single token (all are read off one position), else
one sequence per choice. A programming row becomes one sequence per sample. Other rows become one sequence each.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from src.data.chat import Encoded, Encoder, text_ids
from src.data.choice_prompts import FewShot, continuations
from src.data.choice_rows import ChoiceRow
from src.data.code_rows import CodeRow
from src.data.rows import Row
from src.errors import InputError

log = logging.getLogger(__name__)

LongRows = Literal["cut", "error"]
CODE_REQUEST = (
    "Complete the following Python function. Reply with the whole function in one code block.\n\n```python\n{prompt}```"
)


@dataclass
class SuiteTokens:
    """Sequences of a suite.

    Attributes:
        encoded: The sequences.
        units: For each row, its sequences, in order.
        letters: Token of each letter, where a multiple-choice row is one sequence.
        cut: Number of rows whose prompt was cut from the left.
        cut_references: Number of rows whose reference answer was cut at its end.
        encoder: What made them.
    """

    encoded: list[Encoded]
    units: list[tuple[int, ...]]
    encoder: Encoder
    letters: list[int] = field(default_factory=list)
    cut: int = 0
    cut_references: int = 0


def encode_prompts(
    encoder: Encoder, suite: str, rows: Sequence[Row], on_long: LongRows, *, scored: bool = True
) -> SuiteTokens:
    """Prompts in the template, with their reference answers where these are scored: others need no room."""
    encoded = []
    for row in rows:
        before = encoder.truncated
        encoded.append(encoder.encode(row, with_answer=scored))
        if encoder.truncated > before and on_long == "error":
            raise _too_long(suite, row, encoder.max_length)
    found = SuiteTokens(encoded, [(i,) for i in range(len(rows))], encoder, cut=encoder.cut_prompts)
    found.cut_references = encoder.cut_answers
    return _reported(found, suite)


def encode_code(encoder: Encoder, suite: str, rows: Sequence[CodeRow], samples: int, on_long: LongRows) -> SuiteTokens:
    """Functions to complete: a request in the chat template, or the bare beginning of the function."""
    found = SuiteTokens([], [], encoder)
    for row in rows:
        text = encoder.prompt_text(CODE_REQUEST.format(prompt=row.prompt)) if encoder.chat else row.prompt
        ids = _cut(found, suite, row, _tokens(encoder, text), 0, on_long)
        start = len(found.encoded)
        found.encoded += [Encoded(row, ids, len(ids)) for _ in range(samples)]
        found.units.append(tuple(range(start, start + samples)))
    return _reported(found, suite)


def encode_choices(
    encoder: Encoder, suite: str, rows: Sequence[ChoiceRow], few: FewShot, on_long: LongRows
) -> SuiteTokens:
    """Questions with their choices; as in lm-evaluation-harness, question and choice are tokenised as one text."""
    found = SuiteTokens([], [], encoder)
    lead: list[int] = []
    if few.style == "letters":
        lead, found.letters = _letters(encoder, max(len(row.choices) for row in rows))
    space = "" if encoder.chat else " "
    for row in rows:
        text = few.context(row)
        text = encoder.prompt_text(text) if encoder.chat else text
        context = _tokens(encoder, text)
        if found.letters:
            answers = [[found.letters[0]]]
            context = context + lead
        else:
            wholes = [_tokens(encoder, f"{text}{space}{choice}") for choice in continuations(row, few.style)]
            answers = [whole[len(context) :] for whole in wholes]
        context = _cut(found, suite, row, context, max(map(len, answers)), on_long)
        start = len(found.encoded)
        found.encoded += [Encoded(row, context + answer, len(context)) for answer in answers]
        found.units.append(tuple(range(start, len(found.encoded))))
    return _reported(found, suite)


def _tokens(encoder: Encoder, text: str) -> list[int]:
    return text_ids(encoder.tokenizer, text, special=not encoder.chat)


def _letters(encoder: Encoder, count: int) -> tuple[list[int], list[int]]:
    """Tokens that all letters behind ``Answer:`` begin with (a space of its own), and the one token that tells each.

    No letter is given where they differ in more than one token.
    """
    text = encoder.prompt_text("Answer:") if encoder.chat else "Answer:"
    before = _tokens(encoder, text)
    wholes = [_tokens(encoder, f"{text}{'' if encoder.chat else ' '}{chr(65 + i)}") for i in range(count)]
    lead = wholes[0][len(before) : -1]
    single = all(whole[:-1] == before + lead for whole in wholes)
    return (lead, [whole[-1] for whole in wholes]) if single else ([], [])


def _cut(found: SuiteTokens, suite: str, row: Row, ids: list[int], answer: int, on_long: LongRows) -> list[int]:
    room = found.encoder.max_length - answer
    if len(ids) <= room:
        return ids
    if room < 1:
        raise InputError(f"suite {suite}: a choice of {row.id} alone is longer than {found.encoder.max_length} tokens")
    if on_long == "error":
        raise _too_long(suite, row, found.encoder.max_length)
    found.cut += 1
    return ids[-room:]


def _too_long(suite: str, row: Row, length: int) -> InputError:
    return InputError(f"suite {suite}: {row.id} is longer than {length} tokens; pass --data.on_long cut to cut it")


def _reported(found: SuiteTokens, suite: str) -> SuiteTokens:
    count, length = len(found.units), found.encoder.max_length
    if found.cut:
        log.warning(
            "%s: %d of %d rows are longer than %d tokens and were cut from the left", suite, found.cut, count, length
        )
    if found.cut_references:
        log.warning(
            "%s: %d of %d reference answers are too long for %d tokens and were cut at their end",
            suite,
            found.cut_references,
            count,
            length,
        )
    return found
