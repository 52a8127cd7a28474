"""Where the files of a Fisher measurement lie until all of them are whole, and how they appear: together.

Parts, and finished files that wait for the others, lie in a hidden folder of the output. The files are renamed into
place one after the other; the output's mark (:func:`src.files.begin_output`) goes only then, and the parts after it. So
a run that is killed between two renames is taken up by the same command, which finds every part and measures nothing.
Files of an earlier run, which are to be replaced, go before the first rename: an output never holds files of two runs.
"""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from src.files import begin_output, end_output
from src.fisher.shards import JOINED

PARTS = ".parts"
DONE = ".parts.done"
"""Parts that are of no use any more, while they are deleted."""
PASSES = ("safety", "utility", "benign")
"""All passes that a measurement may have."""


def parts_folder(output: Path, name: str) -> Path:
    """Folder of the parts of a pass."""
    return output / PARTS / name


def ready_file(output: Path, name: str) -> Path:
    """Where the file of a pass waits for the others."""
    return output / PARTS / f"{name}.safetensors"


def remove_stale(output: Path) -> None:
    """Delete what a kill in the middle of a write has left."""
    for stale in (output / PARTS).rglob(".*.tmp"):
        stale.unlink()


def remove_joined(output: Path, name: str) -> None:
    """Delete the joined scores of a pass, once they are in its file."""
    (parts_folder(output, name) / JOINED).unlink(missing_ok=True)


def remove_done(output: Path) -> None:
    """Delete parts whose deletion a kill has cut short."""
    shutil.rmtree(output / DONE, ignore_errors=True)


def publish(output: Path, names: Iterable[str], settings: Any) -> None:
    """Move the finished files of all passes into place, then delete the parts.

    Args:
        output: Directory of the measurement.
        names: Its passes, each with a finished file.
        settings: What makes a run the same, JSON.
    """
    begin_output(output, settings)
    for old in PASSES:
        (output / f"{old}.safetensors").unlink(missing_ok=True)
    for name in names:
        ready_file(output, name).replace(output / f"{name}.safetensors")
    end_output(output)
    remove_done(output)
    (output / PARTS).rename(output / DONE)
    remove_done(output)
