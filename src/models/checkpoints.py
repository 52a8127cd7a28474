"""Training checkpoints that are whole or absent: a full disk or a kill leaves the one before as it was."""

import logging
import pickle
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from src.adapters.peft_files import is_trained
from src.errors import InputError
from src.files import write_atomically
from src.run_folder import RUN

log = logging.getLogger(__name__)

GOING_ON = frozenset({"optimizer_states", "loops"})
"""What a checkpoint holds beside weights."""
OF_SHARDED = "meta.pt"
"""What Lightning puts beside the parts of a sharded checkpoint."""
ADAPTER = "adapter"
"""Entry of a checkpoint: shapes of the trained weights by name, their scaling, and what they stand on."""


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


def opened(path: Path) -> Any:
    """What ``torch.save`` wrote to a file, its tensors left on the disk; ``None`` where it cannot be read."""
    try:
        return torch.load(path, map_location="cpu", weights_only=False, mmap=True)
    except (OSError, RuntimeError, pickle.UnpicklingError):
        return None


def check_adapter(path: str, checkpoint: dict[str, Any], facts: dict[str, Any]) -> None:
    """Check that a checkpoint is of the adapter that is built: torch would leave out what has another name.

    Args:
        path: Its name, for the message.
        checkpoint: As loaded; one of an earlier version tells shapes alone, and nothing where it was sharded.
        facts: What the model has as :data:`ADAPTER`.

    Raises:
        InputError: a weight has another name or shape, or what both tell is not the same.
    """
    weights = checkpoint.get("state_dict", {})
    there = checkpoint.get(ADAPTER) or {key: list(value.shape) for key, value in weights.items()}
    for key in facts | there if there else ():
        one, two = ("absent" if value in (None, "") else value for value in (there.get(key), facts.get(key)))
        if one != two and (is_trained(key) or "absent" not in (one, two)):
            raise InputError(
                f"{path}: {key} is {one} there, {two} in the model; expected a checkpoint of the same model.base, "
                "model.lora and model.core"
            )


def check_processes(path: str, checkpoint: dict[str, Any], processes: int, *, same_steps: bool) -> None:
    """Check that a training goes on with as many processes as it had; an earlier version's checkpoint does not tell.

    Others would deal the rest of an epoch's rows anew, and go through the schedule in another number of steps.

    Args:
        path: Its name, for the message.
        checkpoint: Of a training, rewound to its last optimiser step.
        processes: Those of this run.
        same_steps: Whether the learning rate stays right from one epoch's end on, however many processes there are.

    Raises:
        InputError: it had another number.
    """
    before = checkpoint.get("world_size", processes)
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    within = progress["current"]["processed"] > 0 and not progress["is_last_batch"]
    if before != processes and (within or not same_steps):
        why = "the rows of its epoch are dealt out" if within else "the learning rate follows the number of steps"
        raise InputError(f"{path}: processes of its training: {before}, here: {processes}; expected {before}, as {why}")


def goes_on_with(path: Path, processes: int, *, same_steps: bool) -> bool:
    """Whether :func:`check_processes` lets a training go on; a file that is no such checkpoint is judged elsewhere."""
    found = opened(path)
    if not isinstance(found, dict) or not set(found) >= GOING_ON:
        return True
    try:
        check_processes(str(path), found, processes, same_steps=same_steps)
    except InputError:
        return False
    except KeyError:
        return True
    return True


def lies_with(path: Path, output: Path, trainer: Trainer) -> bool:
    """Whether a checkpoint is a run's own: in its output or ``run/`` there, or where its callbacks write."""
    given = path.resolve()
    in_output = given.parent == output.resolve() or given.is_relative_to(output.resolve() / RUN)
    return in_output or given.parent in [folder.resolve() for folder in _folders(trainer)]


def _folders(trainer: Trainer) -> list[Path]:
    """Where the callbacks of a trainer put their checkpoints."""
    found = [getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks]
    return [Path(folder) for folder in found if folder]


def keeps_schedule(module: Any, data: Any) -> bool:
    """Whether the learning rate stays right from an epoch's end on, however many processes there are."""
    return bool(data.shared_batch) or (module.schedule == "constant" and not module.warmup)


def rewind_to_step(checkpoint: dict[str, Any], accumulated: int, *, limited: bool = False) -> None:
    """Count the batches after the last optimiser step as not done: their gradients are not in a checkpoint.

    Args:
        checkpoint: Of a training, as loaded; its progress is changed.
        accumulated: Batches per optimiser step.
        limited: Whether the training has a ``max_steps``. Lightning (2.6) then goes back into any epoch, also one that
            is over, and would count that one twice.
    """
    loop = checkpoint["loops"]["fit_loop"]
    epoch, progress = loop["epoch_progress"], loop["epoch_loop.batch_progress"]
    if limited and epoch["current"]["ready"] == epoch["current"]["processed"] > 0:
        for counts in (epoch["current"], epoch["total"]):
            counts.update(dict.fromkeys(("processed", "completed"), counts["ready"] - 1))
    pending = 0 if progress["is_last_batch"] else progress["current"]["processed"] % accumulated
    if pending:
        for counts in (progress["current"], progress["total"]):
            counts.update(dict.fromkeys(counts, counts["processed"] - pending))


def bring_home(checkpoint: dict[str, Any], trainer: Trainer) -> bool:
    """Keep what callbacks know of their checkpoints where a run goes on in its own output; forget those of another run.

    Args:
        checkpoint: Of a training, as loaded; the state of its callbacks is changed.
        trainer: That of the run.

    Returns:
        Whether it is the run's own checkpoint.
    """
    own = lies_with(Path(str(trainer.ckpt_path)), Path(trainer.default_root_dir), trainer)
    if own:
        for folder in _folders(trainer):
            _find_moved(checkpoint, folder)
    else:
        # Lightning would keep the best of them, and its weights would be written as those of this run.
        states = checkpoint.get("callbacks", {}).items()
        checkpoint["callbacks"] = {key: state for key, state in states if "best_model_path" not in state}
    return own


def _find_moved(checkpoint: dict[str, Any], folder: Path) -> None:
    """Let callbacks find their checkpoints in a folder that was moved, or is named otherwise now.

    Lightning forgets which one is the best where the folder has another name than before; here it forgets only those
    that have not come along.

    Args:
        checkpoint: Of a training, as loaded; the state of its callbacks is changed.
        folder: Where its checkpoints lie now.
    """
    for state in checkpoint.get("callbacks", {}).values():
        before = Path(str(state.get("dirpath", ""))) if isinstance(state, dict) else Path()
        if before.parts[-2:] != folder.parts[-2:] or before == folder:
            continue

        def here(path: str, before: Path = before) -> str:
            """A file's place now; empty where it is not there."""
            inside = Path(path).is_relative_to(before)
            place = folder / Path(path).relative_to(before) if inside else Path(path)
            return str(place) if path and place.exists() else ""

        kept = {here(path): score for path, score in (state.get("best_k_models") or {}).items() if here(path)}
        if not here(state.get("best_model_path") or "") or len(kept) < len(state.get("best_k_models") or {}):
            continue
        for key in ("best_model_path", "last_model_path", "kth_best_model_path"):
            state[key] = here(state.get(key) or "")
        state["dirpath"], state["best_k_models"] = str(folder), kept


def can_go_on(path: Path) -> bool:
    """Whether a checkpoint holds what a training goes on from, and not weights alone, as far as it can be read."""
    found = opened(path)
    # What is wrong with another file is said where it is checked.
    return not isinstance(found, dict) or set(found) >= GOING_ON


def newest_checkpoint(paths: Iterable[Path], *, weights_too: bool) -> Path | None:
    """The newest of these files that a training can go on from, for which weights alone are too little, however new.

    Args:
        paths: The files; any may be absent.
        weights_too: Take the newest of weights alone where there is nothing else.
    """
    found = sorted(filter(Path.is_file, paths), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    broken = [path for path in found if opened(path) is None]
    if len(broken) < len(found):
        for path in broken:
            log.warning("%s: not a readable checkpoint; left out", path)
        found = [path for path in found if path not in broken]
    return next(filter(can_go_on, found), found[0] if found and weights_too else None)


def check_checkpoint(path: str, *, goes_on: bool) -> None:
    """Check that a checkpoint can be read, before anything is loaded or written.

    Args:
        path: The file.
        goes_on: Whether a training goes on from it, for which it must hold more than weights.

    Raises:
        InputError: it is missing, or no checkpoint of ``fit``.
    """
    place = Path(path)
    if not place.exists():
        raise InputError(f"--ckpt_path {path}: no such file; expected a checkpoint that fit wrote (…/run/checkpoints/)")
    if place.is_dir():
        if not (place / OF_SHARDED).is_file():
            raise InputError(f"--ckpt_path {path}: a directory, and no sharded checkpoint; expected a file in it")
        return
    if not zipfile.is_zipfile(place):
        raise InputError(f"--ckpt_path {path}: not a readable checkpoint (no archive of torch.save)")
    found = opened(place)
    if found is None:
        raise InputError(f"--ckpt_path {path}: not a readable checkpoint (torch.load cannot read it)")
    if not isinstance(found, dict) or "state_dict" not in found:
        raise InputError(f"--ckpt_path {path}: holds no state_dict; expected a checkpoint that fit wrote")
    if goes_on and not set(found) >= GOING_ON:
        raise InputError(
            f"{path}: holds weights alone (save_weights_only); a training goes on from a checkpoint with its optimiser"
        )
