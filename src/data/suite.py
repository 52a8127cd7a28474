"""One suite of an evaluation: what is asked, how answers are made and what is counted on them."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf, isfinite
from typing import Any, Literal

from src.data.chat import Template
from src.data.choice_prompts import ChoiceStyle, FewShot
from src.data.choice_rows import load_choices
from src.data.code_rows import load_code
from src.data.row_source import Sources
from src.data.rows import Row
from src.data.sources import load_rows, refuse_options
from src.errors import InputError
from src.metrics.exact import AnswerForm, final_number
from src.metrics.judging import Judge

log = logging.getLogger(__name__)

NAME = re.compile(r"[\w.-][\w. -]*")
COLDEST = 1e-4
"""Lowest temperature but 0: below, logits leave the range of numbers."""
LONGEST_NAME = 200
"""Bytes of a name, which is part of a file's name: file systems have 255."""
HARMFUL, BENIGN, CHECKED = ("harmful", "jailbreak"), ("borderline", "benign"), ("utility", "choice", "code")
"""Kinds of suite: prompts to refuse, prompts to answer, and those whose answers are right or wrong."""
SuiteKind = Literal["harmful", "jailbreak", "borderline", "benign", "utility", "choice", "code"]


def check_name(name: str) -> None:
    """Stop where files cannot have the name of a suite.

    Raises:
        InputError: it holds other characters than a name has, or too many.
    """
    if not NAME.fullmatch(name):
        raise InputError(f"suite {name!r}: expected a name of letters, digits, spaces and _ . - (no path)")
    if len(name.encode()) > LONGEST_NAME:
        raise InputError(f"suite {name[:20]}…: expected a name of at most {LONGEST_NAME} bytes")


@dataclass
class Suite:
    """One set of prompts and what is counted on it.

    Args:
        name: Name in tables and files.
        kind: ``harmful`` prompts should be refused, and ``jailbreak`` ones are harmful prompts in disguise;
            ``borderline`` and ``benign`` ones should be answered; ``utility`` ones have a checkable answer; ``choice``
            ones are multiple choice, by log-likelihood; ``code`` ones are functions to write, by running their tests.
        rows: Where the prompts come from, and the reference answers that ``score`` is about.
        max_new_tokens: Longest answer to generate, in tokens.
        generate: Generate answers; off scores the likelihood of the reference answers only.
        score: Score the likelihood of the reference answers, where every row has one; never those of code.
        answer: How a utility answer is compared: the whole ``text``, or the last ``number`` in it (GSM8K; that of
            the first line ``#### 18``, where there is one).
        rouge: Score utility answers by ROUGE-L as well; tables and studies then show it in place of the accuracy.
        template: How prompts are wrapped; unset takes that of the data, and ``raw`` for choice suites.
        style: How multiple-choice questions are written (:mod:`src.data.choice_prompts`).
        few_shot: Rows to take worked examples from, by category.
        shots: Number of worked examples.
        judge: Judge of the answers; a judge of harm gives the attack success rate, one of refusal takes the place of
            the project's list, whose share is then called ``matched_refusal``.
        collapse_nll: Mean negative log-likelihood (nats per token) under the bare base model from which an answer
            counts as collapsed; unset leaves this pass out.
        samples: Answers per prompt of a code suite; more than one are sampled.
        temperature: Temperature of sampled answers; 0 decodes greedily.
        seed: Seed of the samples, keyed by row and sample: the batch does not matter.
        k: The k of pass@k, each at most ``samples``.
    """

    name: str
    kind: SuiteKind
    rows: Sources
    max_new_tokens: int = 32
    generate: bool = True
    score: bool = True
    answer: AnswerForm = "text"
    rouge: bool = False
    template: Template | None = None
    style: ChoiceStyle = "letters"
    few_shot: Sources | None = None
    shots: int = 0
    judge: Judge | None = None
    collapse_nll: float | None = None
    samples: int = 1
    temperature: float = 0.0
    seed: int = 0
    k: list[int] = field(default_factory=lambda: [1])

    @property
    def generates(self) -> bool:
        """Whether answers are generated."""
        return self.generate and self.kind != "choice"

    def check(self) -> None:
        """Stop where settings contradict each other, or mean nothing for this kind."""
        check_name(self.name)
        for wrong, message in [*self._of_kind(), *self._without_effect(), *self._of_range()]:
            if wrong:
                raise InputError(f"suite {self.name}: {message}")

    def _of_kind(self) -> list[tuple[bool, str]]:
        """What some kinds must have and others must not: whether it is wrong, and what to say then."""
        choice, code, examples = self.kind == "choice", self.kind == "code", self.few_shot is not None
        fits = bool(self.k) and 1 <= min(self.k) <= max(self.k) <= self.samples
        return [
            (
                not choice and bool(self.shots or examples),
                f"worked examples (shots, few_shot) need kind choice, not {self.kind}",
            ),
            (code and self.judge is not None, "code is judged by its tests; leave out judge"),
            (code and not self.generate, "kind code needs generated answers; leave out generate"),
            (
                not (choice or code or self.generate or self.score),
                "generate and score are both off; nothing would be measured",
            ),
            (self.shots < 0, f"shots is {self.shots}; expected at least 0"),
            (
                choice and bool(self.shots) != examples,
                f"shots is {self.shots}; few_shot rows and shots belong together",
            ),
            (code and not fits, f"k is {self.k} with {self.samples} samples; expected 1 to samples"),
            (
                self.samples > 1 and (not code or not self.temperature > 0),
                f"{self.samples} samples need kind code and a temperature above 0",
            ),
            (self.judge is not None and not self.generates, "a judge needs generated answers"),
        ]

    def _without_effect(self) -> list[tuple[bool, str]]:
        """Options that nothing reads: whether one is set, and what to say then."""
        checked = self.kind == "utility" and self.generate
        text = self.kind not in ("choice", "code") and self.generate
        drawn = self.max_new_tokens != Suite.max_new_tokens or self.temperature != Suite.temperature
        return [
            (
                self.style != "letters" and self.kind != "choice",
                f"style {self.style} needs kind choice, not {self.kind}",
            ),
            (drawn and not self.generates, "max_new_tokens and temperature need generated answers; leave them out"),
            (self.rouge and not checked, f"rouge needs generated answers of kind utility, not {self.kind}"),
            (self.answer != "text" and not checked, f"answer: {self.answer} needs generated answers of kind utility"),
            (self.collapse_nll is not None and not text, "collapse_nll needs generated answers, not choices or code"),
            (self.kind != "code" and self.k != [1], f"k is {self.k}; it needs kind code, not {self.kind}"),
        ]

    def _of_range(self) -> list[tuple[bool, str]]:
        """Numbers out of their range."""
        heat, nll = self.temperature, self.collapse_nll
        return [
            (
                self.max_new_tokens < 1 or heat < 0,
                "expected max_new_tokens of at least 1 and temperature of at least 0",
            ),
            (
                not isfinite(heat) or 0 < heat < COLDEST,
                f"temperature is {heat:g}; expected 0 (greedy) or at least {COLDEST:g}",
            ),
            (nll is not None and not 0 < nll < inf, f"collapse_nll is {nll}; expected nats per token above 0"),
        ]

    def load(self) -> Sequence[Row]:
        """The suite's rows."""
        try:
            rows = self._rows()
            _warn_of_ids(self.name, rows)
            if self.kind == "utility" and self.answer == "number":
                _check_numbers(rows)
        except InputError as error:
            raise InputError(f"suite {self.name}: {error}") from None
        return rows

    def worked(self, rows: Sequence[Any]) -> FewShot:
        """The worked examples of a choice suite, none where it has no shots.

        Args:
            rows: The suite's rows.

        Raises:
            InputError: a row has too few examples, or is one of them.
        """
        try:
            examples = load_choices(self.few_shot) if self.few_shot is not None else []
        except InputError as error:
            raise InputError(f"suite {self.name}: few_shot: {error}") from None
        few = FewShot(examples, self.shots, self.style, self.name)
        for row in rows:
            few.context(row)
        return few

    def _rows(self) -> Sequence[Row]:
        if self.kind == "choice":
            return load_choices(self.rows)
        if self.kind == "code":
            return load_code(self.rows)
        refuse_options(self.rows, "training and Fisher passes", "answer_tokens")
        refuse_options(self.rows, "Fisher passes", "weight")
        return load_rows(self.rows, need_response=self.kind == "utility" or not self.generate)


def _warn_of_ids(name: str, rows: Sequence[Row]) -> None:
    """Say where a source gives two rows one id: what is told apart by it then goes by their order."""
    seen: set[tuple[str, str]] = set()
    for row in rows:
        if (row.source, row.id) in seen:
            log.warning("suite %s: two rows of %s have the id %r; map another column to id", name, row.source, row.id)
            return
        seen.add((row.source, row.id))


def _check_numbers(rows: Sequence[Row]) -> None:
    for row in rows:
        if final_number(row.response) is None:
            raise InputError(f"{row.id}: the reference {row.response[:40]!r} has no number; set answer: text")
