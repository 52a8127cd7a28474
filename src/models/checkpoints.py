"""Training checkpoints that are whole or absent: a full disk or a kill leaves the one before as it was."""

import pickle
import time
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from src.errors import InputError
from src.files import write_atomically


class AtomicCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it once it is on the disk."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Raises:
            InputError: the disk is full or refuses.
        """
        try:
            write_atomically(Path(path), lambda temporary: torch.save(checkpoint, temporary))
        except RuntimeError as error:
            # torch reports a failed write of its archive as a RuntimeError.
            raise InputError(f"{path}: the checkpoint cannot be written ({str(error).splitlines()[0]})") from None


class RecentCheckpoint(Callback):
    """Keeps one checkpoint of the last minutes of a training, and of the step at which SIGTERM ends it.

    It is no ``ModelCheckpoint``: those of the configuration alone say which checkpoint is the best.

    Args:
        path: File to write.
        every: Seconds from one time to the next.
    """

    TOGETHER = 64
    """Batches after which several processes ask the first whether it is time: each answer makes them wait for it."""

    def __init__(self, path: Path, every: float = 600.0) -> None:
        self.path, self.every = path, every
        self._saved = 0.0

    def on_train_start(self, *_args: Any) -> None:
        """Start the clock."""
        self._saved = time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Save where it is time to; a collective operation."""
        if trainer.world_size > 1 and (args[-1] + 1) % self.TOGETHER:
            return
        loop: Any = trainer.fit_loop
        # A run that goes on from here would leave out the validation that comes next.
        validates = trainer.is_last_batch or loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
        # Several processes learn of a signal at different batches, and cannot write together then.
        stopped = trainer.received_sigterm and trainer.world_size == 1
        due = stopped or time.monotonic() - self._saved >= self.every
        if trainer.strategy.broadcast(due and not validates):
            trainer.save_checkpoint(self.path)
            self._saved = time.monotonic()


def rewind_to_step(checkpoint: dict[str, Any], accumulated: int) -> None:
    """Count the batches after the last optimiser step as not done: their gradients are not in a checkpoint.

    Args:
        checkpoint: Of a training, as loaded; its progress is changed.
        accumulated: Batches per optimiser step.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    pending = 0 if progress["is_last_batch"] else progress["current"]["processed"] % accumulated
    if pending:
        for counts in (progress["current"], progress["total"]):
            counts.update(dict.fromkeys(counts, counts["processed"] - pending))


def check_checkpoint(path: str) -> None:
    """Check that a named checkpoint can be read, before anything is loaded or written.

    Raises:
        InputError: it is missing, or no checkpoint of ``fit``.
    """
    place = Path(path)
    if not place.exists():
        raise InputError(f"--ckpt_path {path}: no such file; expected a checkpoint that fit wrote (…/run/checkpoints/)")
    if place.is_dir():  # a sharded one
        return
    if not zipfile.is_zipfile(place):
        raise InputError(f"--ckpt_path {path}: not a readable checkpoint (no archive of torch.save)")
    try:
        found = torch.load(place, map_location="cpu", weights_only=False, mmap=True)
    except (RuntimeError, pickle.UnpicklingError) as error:
        raise InputError(f"--ckpt_path {path}: not a readable checkpoint ({type(error).__name__})") from None
    if not isinstance(found, dict) or "state_dict" not in found:
        raise InputError(f"--ckpt_path {path}: holds no state_dict; expected a checkpoint that fit wrote")
