"""``metrics.json``, the file of an evaluation's counts."""

from pathlib import Path
from typing import Any

from src.errors import InputError
from src.files import read_json

METRICS = "metrics.json"


def read_metrics(path: Path) -> dict[str, Any]:
    """Read what the test command counted.

    Args:
        path: The file.

    Returns:
        Its record, which has one entry or more under ``models``.

    Raises:
        InputError: the file is missing or is not one that the test command wrote.
    """
    record = read_json(path, "the metrics of an evaluation (made by `python -m src test`)")
    if not isinstance(record, dict) or not record.get("models"):
        raise InputError(f"{path}: no key 'models'; expected the metrics of an evaluation")
    return record
