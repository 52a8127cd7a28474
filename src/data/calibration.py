"""Rows that Fisher matrices are measured on."""

import logging
from collections.abc import Collection, Mapping
from itertools import chain

from torch.utils.data import DataLoader

from src.data.batches import Batch
from src.data.chat import Encoded, Template
from src.data.demo_rows import warn_of_demo_rows
from src.data.modules import TokenizedData
from src.data.row_source import Sources, as_sources
from src.data.rows import Row, copies
from src.data.sources import load_rows
from src.errors import InputError
from src.fisher.labels import random_token_rows

log = logging.getLogger(__name__)


class CalibrationData(TokenizedData):
    """Rows that the Fisher matrices are measured on.

    Args:
        safety: Harmful prompts with refusals (F_s).
        utility: Benign prompts with good answers (F_u): task rows, general instructions and borderline-safe prompts.
        utility_weights: Weight of each source of ``utility`` in the mean F_u = Σ w_k F_k / Σ w_k; unset weighs each by
            its number of rows, or of answer tokens where ``granularity`` is ``token``, times their ``weight``.
        random_rows: Number of rows of random tokens, where labels are ``random_tokens``.
        random_prompt: Least and greatest number of random tokens in a prompt.
        random_answer: Least and greatest number of random tokens in an answer.
        random_seed: Seed of the random rows.
        batch_size: Rows per batch and process.
        template: How prompts are wrapped (``auto``, ``chat`` or ``raw``).
        max_length: Tokens per row; longer rows are cut.
    """

    def __init__(
        self,
        safety: Sources | None = None,
        utility: Sources | None = None,
        utility_weights: list[float] | None = None,
        random_rows: int = 256,
        random_prompt: tuple[int, int] = (16, 64),
        random_answer: tuple[int, int] = (8, 32),
        random_seed: int = 0,
        batch_size: int = 8,
        template: Template = "auto",
        max_length: int = 512,
    ) -> None:
        super().__init__(batch_size, template, max_length)
        self.sources: dict[str, list[list[Row]]] = {
            "safety": [load_rows(source, need_response=True) for source in as_sources(safety)],
            "utility": [load_rows(source, need_response=True) for source in as_sources(utility)],
        }
        given = len(self.sources["utility"])
        sound = utility_weights is None or all(0 < weight < float("inf") for weight in utility_weights)
        if not sound or (utility_weights is not None and len(utility_weights) != given):
            raise InputError(
                f"data.utility_weights is {utility_weights}; expected {given} numbers above 0, finite, one a source"
            )
        self.named: dict[str, Sources | None] = {"data.safety": safety, "data.utility": utility}
        self.weights_per_row = {"safety": _weights_per_row(safety), "utility": _weights_per_row(utility)}
        if utility_weights is not None and set(self.weights_per_row["utility"]) != {1.0}:
            raise InputError("data.utility_weights weigh whole sources; expected them or weights of rows, not both")
        self.source_weights = {"safety": None, "utility": utility_weights}
        if random_rows < 1:
            raise InputError(f"data.random_rows is {random_rows}; expected at least 1")
        self.random_rows, self.random_seed = random_rows, random_seed
        self.random_prompt, self.random_answer = random_prompt, random_answer
        self.rows: dict[str, list[Row]] = {}
        self.encoded: dict[str, list[Encoded]] = {}
        self._passes: dict[str, str] = {}
        self._random: frozenset[str] = frozenset()

    def bind_passes(self, passes: Mapping[str, str], random: Collection[str]) -> None:
        """Settle which rows each pass is over.

        Args:
            passes: For each pass, ``safety`` or ``utility``: whose rows.
            random: Passes over random tokens instead.

        Raises:
            InputError: a pass has no rows.
        """
        self._passes, self._random = dict(passes), frozenset(random)
        for name, rows in passes.items():
            if name not in self._random and not self.sources[rows]:
                raise InputError(f"data.{rows} names no rows; expected a source of rows (or labels random_tokens)")
        if "utility" in passes.values() and "utility" not in self._random and len(self.sources["utility"]) == 1:
            log.warning(
                "data.utility has one source only: without general instructions and borderline-safe prompts beside the "
                "task rows, the merged model refuses more harmless prompts (docs/your_model.md, Calibration)"
            )
        if self.source_weights["utility"] is not None and not any(
            rows == "utility" and name not in self._random for name, rows in passes.items()
        ):
            log.warning("data.utility_weights has no effect here: passes over random tokens have no sources")
        warn_of_demo_rows({option: self.named[option] for option in self.measured})
        for option, over in self.measured.items():
            if repeated := _repeated(over):
                log.warning(
                    "%s: %d prompts stand in several rows, whose halves go by their ids: shares measured on "
                    "held-out rows come out too high (unique: true keeps one row a prompt in one source; leave out of "
                    "one what stands in two)",
                    option,
                    repeated,
                )
            elif again := copies(over):
                log.warning(
                    "%s: %d of %d rows are copies of others, and weigh as often as they stand there",
                    option,
                    again,
                    len(over),
                )

    @property
    def measured(self) -> dict[str, list[Row]]:
        """The rows that passes are over, by the option that names them; those of random tokens have none."""
        over = {rows for name, rows in self._passes.items() if name not in self._random}
        return {f"data.{rows}": list(chain.from_iterable(self.sources[rows])) for rows in sorted(over)}

    def setup(self, stage: str) -> None:
        """Tokenise."""
        for name, of in self._passes.items():
            if name in self.encoded:
                continue
            if name in self._random:
                self.encoded[name] = self._draw()
                self.rows[name] = [encoded.row for encoded in self.encoded[name]]
                continue
            self.rows[name] = [row for rows in self.sources[of] for row in rows]
            self.encoded[name] = self.encode(self.rows[name], name)

    def _draw(self) -> list[Encoded]:
        try:
            drawn = random_token_rows(
                self.random_rows,
                vocab_size=len(self.encoder.tokenizer),
                avoid=self.encoder.tokenizer.all_special_ids,
                prompt_tokens=self.random_prompt,
                answer_tokens=self.random_answer,
                seed=self.random_seed,
            )
        except ValueError as error:
            raise InputError(f"data.random_…: {error}") from None
        return [Encoded(Row(id=row.id, prompt=""), list(row.ids), row.answer_start) for row in drawn]

    def predict_dataloader(self) -> list[DataLoader[Batch]]:
        """One loader per pass; every row exactly once, filled up by batches of weight 0 to equal numbers of steps."""
        return [self.loader(self.encoded[name]) for name in self._passes]


def _repeated(rows: list[Row]) -> int:
    """Number of prompts in rows of more than one id."""
    ids: dict[str, set[str]] = {}
    for row in rows:
        ids.setdefault(row.prompt_hash, set()).add(row.id)
    return sum(len(found) > 1 for found in ids.values())


def _weights_per_row(sources: Sources | None) -> list[float]:
    """Of each source, what one of its rows counts."""
    return [float(source.weight) for source in as_sources(sources)]
