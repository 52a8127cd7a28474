"""Which rows a training checkpoint is of: what goes on from it with others would hide what it was trained on."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning import Callback

from src.models.checkpoints import opened

ROWS = "learnt_sha256"
"""Entry of a checkpoint: SHA-256 of what is learnt from the rows, by split."""


class RowsRecord(Callback):
    """Keeps the hashes of the rows in every checkpoint.

    Args:
        rows: SHA-256 of the rows by split, computed when a checkpoint is written.
    """

    def __init__(self, rows: Callable[[], Mapping[str, str]]) -> None:
        self.rows = rows

    def on_save_checkpoint(self, _trainer: Any, _module: Any, checkpoint: dict[str, Any]) -> None:
        """Add the entry."""
        checkpoint[ROWS] = dict(self.rows())


def other_rows(path: Path, rows: Mapping[str, str]) -> str:
    """The option whose rows are not those of a checkpoint's training; empty where there is none.

    An earlier version's checkpoint does not tell, and what is wrong with one that cannot be read is said elsewhere.

    Args:
        path: The checkpoint.
        rows: SHA-256 of the rows here by split.
    """
    found = opened(path)
    before = (found.get(ROWS) if isinstance(found, dict) else None) or rows
    return next((f"data.{split}" for split, sha256 in rows.items() if before.get(split) != sha256), "")
