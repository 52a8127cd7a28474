"""What a run of a Trainer leaves in its output beside its results, and what that tells of the run."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from src.adapters.peft_files import CONFIG, MANIFEST
from src.files import UNFINISHED, read_json

CONFIG_RECORD = "config.yaml"
RUN = "run"
"""Sub-directory of an output that holds the Trainer's own files: config.yaml, metrics.csv, checkpoints."""
CHECKPOINTS = f"{RUN}/checkpoints"
RECENT = "recent.ckpt"
"""Checkpoint of an unfinished training, beside those that the configuration asks for."""
OF_SLURM = "hpc_ckpt_*.ckpt"
"""Checkpoints that Lightning writes into the output before it queues a SLURM job again."""
HALF_WRITTEN = ".*.????????.tmp"
"""Files that a kill leaves in the middle of :func:`src.files.write_atomically`."""
SAME = ("model", "data", "seed_everything")
"""Settings in which a run that goes on and the run before it agree."""
OF_TRAINER = ("accumulate_grad_batches", "precision", "gradient_clip_val", "gradient_clip_algorithm")
"""Settings of the Trainer among them: they make the steps."""
FINISHED, OTHER_SETTINGS = "that was finished", "with other settings"


def unfinished_checkpoints(output: Path) -> list[Path]:
    """Checkpoints that only a training that has not come to its end has."""
    return [path for path in (output / CHECKPOINTS / RECENT, *output.glob(OF_SLURM)) if path.exists()]


def other_run(output: Path, settings: Mapping[str, Any]) -> str:
    """Why the training in an output is none to go on with; empty where it had this model, these data and this seed.

    Args:
        output: The output.
        settings: Those of the run that is to go on, as plain values.
    """
    record = output / RUN / CONFIG_RECORD
    if not record.is_file():
        return "that has left no configuration"
    before, now = _shared(yaml.safe_load(record.read_text(encoding="utf-8"))), _shared(settings)
    if _is_finished(output, before):
        return FINISHED
    return "" if before == now else f"{OTHER_SETTINGS} ({difference(before, now)})"


def difference(before: Any, now: Any, name: str = "") -> str:
    """The first of the settings that two runs do not share, with both values."""
    if isinstance(before, dict) and isinstance(now, dict):
        pairs = {key: (before.get(key, "unset"), now.get(key, "unset")) for key in before | now}
        key = next(key for key, (one, two) in pairs.items() if one != two)
        return difference(*pairs[key], f"{name}.{key}".lstrip("."))
    return f"{name} is {before!r} there, {now!r} here"


def _is_finished(output: Path, settings: Mapping[str, Any]) -> bool:
    """Whether the training in an output has written its adapter, and has nothing left that goes only after that.

    Times say nothing of it, as copies and clocks change them. In doubt it is unfinished: its checkpoints stay.
    """
    manifest = output / MANIFEST
    unfinished = (output / UNFINISHED).exists() or unfinished_checkpoints(output)
    if unfinished or not (output / CONFIG).exists() or not manifest.is_file():
        return False
    # A run of an earlier version that was to replace an adapter has no mark; the adapter is of other settings, mostly.
    return _shared(read_json(manifest, "the manifest of an adapter").get("settings", {})) == settings


def _shared(settings: Mapping[str, Any]) -> dict[str, Any]:
    trainer = settings.get("trainer") or {}
    return {key: settings.get(key) for key in SAME} | {"trainer": {key: trainer.get(key) for key in OF_TRAINER}}


def clear_run(output: Path, *, stays: bool) -> None:
    """Make room for a Trainer's files, and delete what a kill has left half-written; call it where the output is held.

    Args:
        output: The output.
        stays: Whether its run goes on: then it keeps its checkpoints, and its metrics are set aside.
    """
    run = output / RUN
    if not stays:
        shutil.rmtree(run, ignore_errors=True)
    elif (run / "metrics.csv").exists():
        before = len(list(run.glob("metrics.before-*.csv")))
        (run / "metrics.csv").rename(run / f"metrics.before-{before}.csv")
    below = (path for folder in (run, output / "answers") for path in folder.rglob(HALF_WRITTEN))
    for path in (*output.glob(HALF_WRITTEN), *below):
        if path.is_file():
            path.unlink()
