"""The data module of an evaluation: suites of prompts, their tokens, and the order of the work."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils.data import DataLoader

from src.data.chat import SHORTEST, Encoder, Template
from src.data.choice_rows import ChoiceRow
from src.data.modules import TokenizedData, process_share
from src.data.rows import Row, copies
from src.data.schedule import Step, SuiteBatch, SuiteBatches, deal, even_batches, shared_beginning
from src.data.suite import Suite
from src.data.suite_tokens import LongRows, SuiteTokens, encode_choices, encode_code, encode_prompts
from src.errors import InputError

log = logging.getLogger(__name__)


class EvaluationData(TokenizedData):
    """Suites of prompts to evaluate on.

    Args:
        suites: The suites, each with its rows.
        batch_size: Most rows per batch and process.
        template: How prompts are wrapped (``auto``, ``chat`` or ``raw``).
        max_length: Tokens of prompt and reference answer.
        max_tokens: Most tokens per batch and process, padding and answers included.
        on_long: A row longer than ``max_length`` or the model is ``cut`` and counted (its prompt from the left, its
            reference answer at the end), or an ``error``.
    """

    def __init__(
        self,
        suites: list[Suite],
        batch_size: int = 256,
        template: Template = "auto",
        max_length: int = 4096,
        max_tokens: int = 16384,
        on_long: LongRows = "cut",
    ) -> None:
        super().__init__(batch_size, template, max_length)
        self.max_tokens, self.on_long = max_tokens, on_long
        if not suites:
            raise InputError("data.suites is empty; expected at least one suite")
        if max_tokens < 1:
            raise InputError(f"data.max_tokens is {max_tokens}; expected at least 1 token")
        names = [suite.name for suite in suites]
        if len(set(names)) < len(names):
            raise InputError(f"data.suites: names must differ, found {', '.join(names)}")
        for suite in suites:
            suite.check()
        self.suites = suites
        self.rows: dict[str, Sequence[Row]] = {suite.name: suite.load() for suite in suites}
        for name, rows in self.rows.items():
            if again := copies(rows):
                log.warning(
                    "suite %s: %d of %d rows are copies of others, and count as often as they stand there (unique: "
                    "true keeps one row a prompt in one source)",
                    name,
                    again,
                    len(rows),
                )
        self.few = {s.name: s.worked(self.rows[s.name]) for s in suites if s.kind == "choice"}
        self.tokens: dict[str, SuiteTokens] = {}
        self._steps: list[list[Step]] = []
        self._in_step = False

    def template_of(self, suite: Suite) -> Template:
        """How the prompts of a suite are wrapped."""
        return suite.template or ("raw" if suite.kind == "choice" else self.template)

    def encode_suites(self, positions: int | None, ends: Sequence[int] = ()) -> None:
        """Tokenise for a model of so many positions, which names some tokens as ends of what it says.

        Raises:
            InputError: a row is too long and ``on_long`` is ``error``.
        """
        for suite in self.suites:
            answer = suite.max_new_tokens if suite.generates else 0
            length = min(self.max_length, positions - answer) if positions else self.max_length
            if length < SHORTEST:
                raise InputError(
                    f"suite {suite.name}: max_new_tokens {answer} leave {length} of {positions} positions for prompts; "
                    f"expected at least {SHORTEST}"
                )
            template = self.template_of(suite)
            encoder = Encoder(self.encoder.tokenizer, template=template, max_length=length, ends=ends)
            if template == "auto" and not encoder.chat:
                log.warning(
                    "suite %s: this tokenizer has no chat template; prompts go in as they are, each with a new line",
                    suite.name,
                )
            self.tokens[suite.name] = self._encode(suite, encoder)

    def _encode(self, suite: Suite, encoder: Encoder) -> SuiteTokens:
        rows: Any = self.rows[suite.name]
        if suite.kind == "choice":
            return encode_choices(encoder, suite.name, rows, self.few[suite.name], self.on_long)
        if suite.kind == "code":
            return encode_code(encoder, suite.name, rows, suite.samples, self.on_long)
        return encode_prompts(encoder, suite.name, rows, self.on_long, scored=self.scored(suite))

    def content(self, suite: Suite) -> str:
        """SHA-256 of everything that a suite asks: rows, token ids and how answers are decoded."""
        digest = hashlib.sha256()
        for row in self.rows[suite.name]:
            digest.update(json.dumps(vars(row), sort_keys=True).encode())
        tokens = self.tokens[suite.name]
        for each in tokens.encoded:
            digest.update(json.dumps([each.ids, each.answer_start]).encode())
        keys = (
            "kind",
            "max_new_tokens",
            "generate",
            "score",
            "style",
            "samples",
            "temperature",
            "seed",
            "collapse_nll",
        )
        stops = tokens.encoder.stop_ids if suite.generates else tokens.letters
        digest.update(json.dumps([{key: getattr(suite, key) for key in keys}, stops]).encode())
        return digest.hexdigest()

    def plan(self, models: int, done: Mapping[tuple[int, int], set[int]], *, sharded: bool = False) -> None:
        """Lay out the steps of so many models, without batches whose rows are all done.

        Args:
            models: Number of models.
            done: Rows that are done of each model and suite.
            sharded: Whether processes hold parts of the weights: then all work on the same suite at a time, and what
                rows begin with is computed for each of them.
        """
        self._in_step = sharded
        # While answers are generated, keys and values of a beginning lie in memory once for each row.
        blocks = [self._batches(suite, shared=not (sharded or suite.generates)) for suite in self.suites]
        self._steps = [
            [
                Step(model, number, tuple(rows))
                for rows in blocks[number]
                if not done.get((model, number), set()).issuperset(rows)
            ]
            for model in range(models)
            for number in range(len(self.suites))
        ]
        if not any(self._steps):
            self._steps = [[Step(0, 0, tuple(blocks[0][0]), 0.0)]]

    @property
    def steps(self) -> list[Step]:
        """This process's share of the steps."""
        return deal(self._steps, *process_share(self.trainer), in_step=self._in_step)

    def scored(self, suite: Suite) -> bool:
        """Whether the suite's reference answers are scored: every row must have one, in words."""
        return suite.score and suite.kind != "code" and all(row.response for row in self.rows[suite.name])

    def measures(self, suite: Suite) -> bool:
        """Whether more than answers is computed: likelihoods of references, or of the answers themselves."""
        return suite.kind != "choice" and (self.scored(suite) or (suite.generates and suite.collapse_nll is not None))

    def _batches(self, suite: Suite, *, shared: bool) -> list[list[int]]:
        tokens = self.tokens[suite.name]
        extra = suite.max_new_tokens if suite.generates else 0
        lengths = [(e.answer_start if suite.generates else len(e.ids)) + extra for e in tokens.encoded]
        groups: dict[str, list[tuple[int, ...]]] = {}
        # Choices of a row are compared, so they share a batch; samples of a program do not.
        units = tokens.units if suite.kind == "choice" else [(i,) for i in range(len(tokens.encoded))]
        for unit in units:
            row = tokens.encoded[unit[0]].row
            grouped = isinstance(row, ChoiceRow) and suite.style == "letters"
            groups.setdefault(row.category if grouped else "", []).append(unit)
        found: list[list[int]] = []
        for group in groups.values():
            prompts = [tokens.encoded[i].prompt_ids for unit in group for i in unit]
            beginning = shared_beginning(prompts) if shared else 0
            found += even_batches(
                group, lengths, beginning=beginning, max_rows=self.batch_size, max_tokens=self.max_tokens
            )
        return found

    def test_dataloader(self) -> DataLoader[SuiteBatch]:
        """Every step of this process; every row once over all processes."""
        data = SuiteBatches(
            [self.tokens[suite.name].encoded for suite in self.suites], self.encoder.tokenizer.pad_token_id
        )
        return DataLoader(data, sampler=self.steps, batch_size=None)

    def predict_dataloader(self) -> DataLoader[SuiteBatch]:
        """As for testing."""
        return self.test_dataloader()
