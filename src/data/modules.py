"""LightningDataModules: what all share, and rows for training (:mod:`src.data.calibration`: for Fisher passes)."""

import logging
import re
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Sampler

from src.data.batches import WINDOW, Batch, EncodedRows, LengthBatches
from src.data.chat import Encoded, Encoder, Template
from src.data.demo_rows import warn_of_demo_rows
from src.data.row_source import Sources
from src.data.rows import Row, copies
from src.data.sources import load_rows, refuse_options
from src.errors import InputError

log = logging.getLogger(__name__)
TABLE = re.compile(r"(?:^|\.)(?:wpe|[a-z_]*pos[a-z_]*)$")
"""Names of tables of positions: wpe, embed_positions, position_embeddings, positions_embed."""
SPARE = 8
"""Rows of such a table beside its positions, at most."""


def process_share(trainer: Any) -> tuple[int, int]:
    """This process's rank among those that divide the rows, and their number; (0, 1) without a Trainer."""
    share = getattr(trainer.strategy, "distributed_sampler_kwargs", None) if trainer else None
    return (share["rank"], share["num_replicas"]) if share else (0, 1)


class TokenizedData(LightningDataModule):
    """What all data modules share: an encoder and this process's share of batches.

    Args:
        batch_size: Rows per batch and process.
        template: How prompts are wrapped: ``chat`` (the tokenizer's template), ``raw`` (prompt and a new line), or
            ``auto`` (``chat`` where the tokenizer has a template).
        max_length: Tokens of prompt and answer together; longer rows are cut, and counted in a warning.
    """

    def __init__(self, batch_size: int, template: Template, max_length: int) -> None:
        super().__init__()
        if batch_size < 1:
            raise InputError(f"data.batch_size is {batch_size}; expected at least 1 row")
        self.batch_size, self.template, self.max_length = batch_size, template, max_length
        self.encoder: Encoder
        self._warned = False

    def bind(self, tokenizer: Any) -> None:
        """Take the tokenizer of the model that the rows are for."""
        self.encoder = Encoder(tokenizer, template=self.template, max_length=self.max_length)

    def encode(self, rows: list[Row], what: str) -> list[Encoded]:
        """Token ids of rows; says how many had to be cut, and in which form prompts go in where nothing chose it."""
        if self.template == "auto" and not self.encoder.chat:
            log.warning(
                "%s: this tokenizer has no chat template; prompts go in as they are, each with a new line", what
            )
        before = self.encoder.truncated
        encoded = [self.encoder.encode(row) for row in rows]
        if cut := self.encoder.truncated - before:
            log.warning(
                "%s: %d of %d rows are longer than %d tokens and were cut", what, cut, len(rows), self.max_length
            )
        return encoded

    def rows_per_batch(self, world: int) -> int:
        """Rows per batch of each of so many processes."""
        return self.batch_size

    def loader(self, rows: list[Encoded], **options: Any) -> DataLoader[Batch]:
        """Batches of this process (options: see :class:`src.data.batches.LengthBatches`).

        Raises:
            InputError: a row has more tokens than the model has learned positions.
        """
        self._check_positions(max((len(row.ids) for row in rows), default=0))
        rank, world = process_share(self.trainer)
        lengths = [len(row.ids) for row in rows]
        sampler = LengthBatches(lengths, self.rows_per_batch(world), rank=rank, world_size=world, **options)
        return DataLoader(EncodedRows(rows, self.encoder.tokenizer.pad_token_id), sampler=sampler, batch_size=None)

    def _check_positions(self, longest: int) -> None:
        """Stop where the longest row does not fit a table of positions; warn where it was not trained for as many."""
        model: Any = getattr(getattr(self.trainer, "lightning_module", None), "model", None)
        positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        if not positions or longest <= positions:
            return
        if has_table(model, positions):
            # Rows of random tokens have lengths of their own.
            drawn = longest > self.max_length
            row = "a row of random tokens (data.random_prompt, data.random_answer)"
            raise InputError(
                f"{row if drawn else f'data.max_length is {self.max_length} and a row'} has {longest} tokens; "
                f"expected at most the model's {positions} positions"
            )
        if not self._warned:
            self._warned = True
            log.warning("a row has %d tokens, more than the %d positions of the model's config", longest, positions)


def has_table(model: torch.nn.Module, positions: int) -> bool:
    """Whether a model has a table of so many learned positions, or of few more for padding (GPT-2's wpe, OPT's)."""
    return any(
        isinstance(module, torch.nn.Embedding)
        and TABLE.search(name)
        and positions <= module.num_embeddings <= positions + SPARE
        for name, module in model.named_modules()
    )


class RemainingBatches(Sampler[Any]):
    """An epoch's batches without those that were done before a training was interrupted.

    Args:
        batches: All batches of an epoch; it has this length, too.
        done: Number of batches done; asked when the first batch is drawn, as Lightning knows it only then.
    """

    def __init__(self, batches: Any, done: Callable[[], int]) -> None:
        self.batches, self.done = batches, done

    def __iter__(self) -> Iterator[Any]:
        yield from islice(self.batches, self.done(), None)

    def __len__(self) -> int:
        return len(self.batches)


class ResumableLoader(DataLoader[Batch]):
    """A loader that Lightning takes for one that can go on within an epoch; it needs no state for that.

    Where to go on is Lightning's own count of batches (see :class:`RemainingBatches`), which is right also where a
    signal has a checkpoint written in the middle of a batch.
    """

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to do."""


class ExpertData(TokenizedData):
    """Rows to train a LoRA expert on, and rows to choose its best checkpoint by.

    Args:
        train: Training rows: a JSONL file, a hub data set or a YAML mapping, or a list of them.
        val: Validation rows, disjoint from the training rows.
        batch_size: Rows per step and process.
        template: How prompts are wrapped (``auto``, ``chat`` or ``raw``).
        max_length: Tokens per row; longer rows are cut.
        seed: Seed of the order of batches; unset is ``seed_everything``.
        window: Number of batches over whose rows the sorting by length goes; 1 draws every batch at random.
        shared_batch: Whether ``batch_size`` is that of all processes together, each of which takes its part: as many
            rows per step, and as many steps, as one process has.
    """

    def __init__(
        self,
        train: Sources,
        val: Sources,
        batch_size: int = 8,
        template: Template = "auto",
        max_length: int = 512,
        seed: int | None = None,
        window: int = WINDOW,
        shared_batch: bool = False,
    ) -> None:
        super().__init__(batch_size, template, max_length)
        self.shared_batch = shared_batch
        if window < 1:
            raise InputError(f"data.window is {window}; expected at least 1 batch")
        self.train, self.val, self.seed, self.window = train, val, seed, window
        for sources in (train, val):
            refuse_options(sources, "Fisher passes", "weight")
        warn_of_demo_rows({"data.train": train, "data.val": val})
        self.rows = {
            "train": load_rows(train, need_response=True),
            "val": load_rows(val, need_response=True),
        }
        if again := copies(self.rows["train"]):
            log.warning(
                "data.train: %d of %d rows are copies of others, each learnt as often as it stands there (unique: true "
                "keeps one row a prompt in one source)",
                again,
                len(self.rows["train"]),
            )
        train_prompts = {row.prompt_hash for row in self.rows["train"]}
        for row in self.rows["val"]:
            if row.prompt_hash in train_prompts:
                raise InputError(f"data.val: the prompt of {row.id} ({row.source}) is also a training prompt")
        self.encoded: dict[str, list[Encoded]] = {}

    @property
    def seen(self) -> frozenset[str]:
        """Hashes of every prompt that training or checkpoint choice looks at."""
        return frozenset(row.prompt_hash for rows in self.rows.values() for row in rows)

    def rows_per_batch(self, world: int) -> int:
        """Rows per batch of each of so many processes.

        Raises:
            InputError: ``batch_size`` is that of all processes and cannot be shared out evenly.
        """
        if not self.shared_batch:
            return self.batch_size
        if self.batch_size % world:
            raise InputError(
                f"data.batch_size is {self.batch_size}; expected a multiple of the {world} processes that share it"
            )
        return self.batch_size // world

    def setup(self, stage: str) -> None:
        """Tokenise."""
        if not self.encoded:
            self.encoded = {split: self.encode(rows, split) for split, rows in self.rows.items()}

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffled batches of like length, the same number for every process."""
        rows = self.encoded["train"]
        tokens = {"answers": [len(row.ids) - row.answer_start for row in rows], "accumulate": self._accumulated}
        whole = self.loader(rows, seed=self.seed or 0, window=self.window, epoch=self._epoch, **tokens)
        return ResumableLoader(whole.dataset, sampler=RemainingBatches(whole.sampler, self._done), batch_size=None)

    def _done(self) -> int:
        return self.trainer.fit_loop.epoch_loop.batch_progress.current.ready if self.trainer else 0

    def _accumulated(self) -> int:
        return self.trainer.accumulate_grad_batches if self.trainer else 1

    def _epoch(self) -> int:
        return self.trainer.current_epoch if self.trainer else 0

    def val_dataloader(self) -> DataLoader[Batch]:
        """Every validation row once."""
        return self.loader(self.encoded["val"])
