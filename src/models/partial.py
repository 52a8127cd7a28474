"""Partial results of an evaluation, kept by content: a killed run redoes only what is missing.

Each (model, suite) has a key: the SHA-256 of the base's weights, the adapter's weights and scaling, the rows and their
token ids, the decoding settings, the number format and this project's own code that computes them. A result is found by
its key alone, so whatever changes, nothing stale is served. Each process appends a line per batch to its own file.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from src.judges.verdicts import append_lines, read_lines
from src.provenance import code_hash

FOLDER = ".parts"
"""Hidden directory of an output: it is no result, and a later run may find it there."""
CODE = (
    *(
        f"models/{name}.py"
        for name in (
            "adapter_swap",
            "computation",
            "generation",
            "kv_cache",
            "logits",
            "packing",
            "products",
            "settling",
            "speed",
        )
    ),
    "adapters/attach.py",
    "adapters/pairs.py",
    "data/batches.py",
    "data/chat.py",
    "data/conversations.py",
)
"""What computes answers and scores."""

ANSWER = ("index", "answer", "unfinished")
"""What an answer alone leaves of a record."""
Record = dict[str, Any]


def result_key(**parts: Any) -> str:
    """Key of a result that was computed from these parts."""
    text = json.dumps(parts | {"code": code_hash(CODE)}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def answers_key(key: str) -> str:
    """Key of a result of which only the answers were computed."""
    return result_key(answers_of=key)


class Parts:
    """Partial results in a directory.

    Args:
        folder: The directory.
        rank: This process.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.rank = folder, rank

    def add(self, key: str, records: Sequence[Record]) -> None:
        """Keep the records of one batch."""
        append_lines(self.folder / f"{key}.{self.rank}.jsonl", [{"records": list(records)}])

    def read(self, key: str) -> dict[int, Record]:
        """Every kept record of a result, by its sequence's position, whichever process computed it."""
        found: dict[int, Record] = {}
        for path in sorted(self.folder.glob(f"{key}.*.jsonl")):
            for line in read_lines(path):
                found |= {record["index"]: record for record in line.get("records", [])}
        return found

    def read_answers(self, *keys: str) -> dict[int, Record]:
        """The answers of some results, without whatever else was measured on them."""
        found: dict[int, Record] = {}
        for key in keys:
            found |= {index: {k: one[k] for k in ANSWER if k in one} for index, one in self.read(key).items()}
        return found
