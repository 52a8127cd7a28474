"""Options of Lightning's Trainer that it takes without complaint or ends in a traceback over; the record of a run."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from math import inf
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning import LightningModule, Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.cli import SaveConfigCallback

from src.errors import InputError, one_line
from src.files import write_text
from src.run_folder import CONFIG_RECORD, RUN

log = logging.getLogger(__name__)


def check_training_length(trainer: Namespace) -> None:
    """Stop at numbers of the Trainer that train nothing or that it takes without complaint or with a traceback.

    Raises:
        InputError: an option of the Trainer is out of range.
    """
    for key in ("max_epochs", "max_steps"):
        value = trainer.get(key)
        if value is not None and value != -1 and value < 1:
            raise InputError(f"trainer.{key} is {value}; expected at least 1, or -1 for no limit")
    no_epochs = trainer.max_epochs == -1 or (trainer.max_epochs is None and trainer.max_time is not None)
    if no_epochs and trainer.max_steps in (None, -1):
        raise InputError("trainer: neither max_epochs nor max_steps limits the run; the schedule needs one of them")
    for key in ("accumulate_grad_batches", "check_val_every_n_epoch"):
        value = trainer.get(key)
        if value is not None and value < 1:
            raise InputError(f"trainer.{key} is {value}; expected at least 1")
    every = trainer.get("val_check_interval")
    if isinstance(every, int) and every < 1:
        none = "limit_val_batches 0 leaves validation out"
        raise InputError(f"trainer.val_check_interval is {every}; expected at least 1 batch ({none})")
    if trainer.get("limit_train_batches") == 0:
        raise InputError("trainer.limit_train_batches is 0; expected something to train on")
    if trainer.get("overfit_batches"):
        raise InputError("trainer.overfit_batches: batches hold rows of like length here; set data.train.limit instead")
    if (trainer.get("gradient_clip_val") or 0.0) < 0:
        raise InputError(f"trainer.gradient_clip_val is {trainer.gradient_clip_val}; expected 0 (off) or more")


def check_callbacks(trainer: Trainer) -> None:
    """Stop at callbacks that average weights by copying the whole module; say where none chooses a checkpoint.

    Raises:
        InputError: there is one that averages.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, StochasticWeightAveraging | WeightAveraging):
            raise InputError(
                f"trainer.callbacks: {type(callback).__name__} copies the base model, too; expected to do without it "
                "(merge averages adapters)"
            )
    chosen = [one for one in trainer.checkpoint_callbacks if isinstance(one, ModelCheckpoint)]
    if chosen and all(one.monitor is None for one in chosen):
        log.warning(
            "no callback chooses a checkpoint by val_loss: the adapter will be that of the last one (a list of "
            "trainer.callbacks replaces the list before it; --trainer.callbacks+= adds to it)"
        )


def follow_seed(config: Namespace) -> None:
    """Initial weights and order of batches take the command's seed where they have none of their own."""
    for part in (config.model, config.data):
        if part.seed is None:
            part.seed = int(config.seed_everything or 0)


def warn_of_narrow_adapter(trainer: Trainer) -> None:
    """Say that Lightning's ``bf16-true`` and the like make the adapter's own weights and optimiser state narrow."""
    if trainer.precision in ("bf16-true", "16-true"):
        log.warning(
            "trainer.precision %s trains the adapter itself in %s, which loses small steps; for a base in it and an "
            "adapter in float32 take --model.base.dtype with --trainer.precision 32-true",
            trainer.precision,
            "bfloat16" if trainer.precision == "bf16-true" else "float16",
        )


def warn_of_early_end(trainer: Trainer) -> None:
    """Say where a training ended before the steps that were asked for."""
    planned = trainer.estimated_stepping_batches
    asked = trainer.max_steps if trainer.max_steps > 0 else planned
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        log.warning("fast_dev_run: trained on one batch, so this adapter is for trying the command only")
    elif trainer.global_step < asked < inf:
        over = trainer.global_step >= planned
        why = f" (trainer.max_epochs is {trainer.max_epochs}; -1 for no limit)" if over else ""
        log.warning("the training ended after %d of %d steps%s", trainer.global_step, asked, why)


def warn_of_unmeasured_steps(trainer: Trainer, kept: int) -> None:
    """Say where a training went on behind its last validation: what came then could not be chosen."""
    validated = getattr(trainer.lightning_module, "validated", {})
    if validated and kept < trainer.global_step > max(validated):
        log.warning(
            "the last %d of %d steps were not validated, so they are not in the adapter; see "
            "trainer.check_val_every_n_epoch and trainer.val_check_interval",
            trainer.global_step - max(validated),
            trainer.global_step,
        )


@contextmanager
def making_trainer() -> Iterator[None]:
    """Say in one line what the Trainer cannot be made of: devices or a strategy that there are not.

    Raises:
        InputError: it was refused.
    """
    try:
        yield
    except (TypeError, ValueError, MisconfigurationException) as error:
        raise InputError(f"trainer: {one_line(error)}") from None


@contextmanager
def fitting() -> Iterator[None]:
    """Say in one line what Lightning finds wrong with its options only while it trains.

    Raises:
        InputError: validations are further apart than an epoch is long, or a callback watches what is not logged.
    """
    try:
        yield
    except ValueError as error:
        if "val_check_interval" not in str(error):
            raise
        raise InputError(f"trainer.val_check_interval: {one_line(error)}") from None
    except MisconfigurationException as error:
        raise InputError(f"trainer: {one_line(error)}") from None
    except RuntimeError as error:
        if not str(error).startswith("Early stopping conditioned on metric"):
            raise
        raise InputError(f"trainer.callbacks: {one_line(error)}") from None


class RunRecord(SaveConfigCallback):
    """Keeps the configuration of a run in its output, wherever a logger writes, before anything is computed."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the file, once."""
        if self.already_saved:
            return
        self.already_saved = True
        if trainer.is_global_zero:
            config: Any = self.config
            text = self.parser.dump(self.config, skip_none=False, skip_validation=True)
            write_text(Path(config.output) / RUN / CONFIG_RECORD, text)
