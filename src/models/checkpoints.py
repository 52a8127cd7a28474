"""Training checkpoints that are whole or absent: a full disk or a kill leaves the one before as it was."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
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
