"""Files of stored answers: ``answers/MODEL/SUITE.jsonl``, a line per row."""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from src.data.rows import Row
from src.files import write_text


def answer_file(folder: Path, model: str, suite: str) -> Path:
    """Where a model's answers lie, below the results also where the model was named by an absolute path."""
    # A path above this folder keeps its place among others: "../a" and "a" are two models.
    inside = "/".join("_up" if part == ".." else part for part in model.split("/") if part not in ("", "."))
    return folder / "answers" / inside / f"{suite}.jsonl"


def remove_other_answers(folder: Path, kept: Collection[Path]) -> None:
    """Delete answers of an evaluation before, of models and suites that this one does not have."""
    for path in (folder / "answers").rglob("*.jsonl"):
        if path not in kept:
            path.unlink()
    below = sorted((folder / "answers").rglob("*/"), key=lambda path: -len(path.parts))
    for directory in below:
        if not any(directory.iterdir()):
            directory.rmdir()


def write_answers(path: Path, rows: Sequence[Row], records: Sequence[Mapping[str, Any]]) -> None:
    """Write each row (id, hash, category, prompt, reference) with what was found on it."""
    lines = []
    for row, record in zip(rows, records, strict=True):
        known = {"id": row.id, "prompt_hash": row.prompt_hash, "category": row.category, "prompt": row.asked}
        known |= {"goal": row.goal} if row.goal else {}
        rest = {key: value for key, value in record.items() if key != "index"}
        lines.append(json.dumps(known | {"reference": row.response} | rest, ensure_ascii=False) + "\n")
    write_text(path, "".join(lines))
