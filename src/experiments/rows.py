"""The answers of an evaluation in the small form that is committed: per-row flags and scores, and a few examples.

Rows are kept because every later question is a paired one: intervals of differences, validation and test rows, means
over seeds. A row is known by the beginning of its prompt's hash, a prompt in disguise by that of its goal: rows of one
goal are of one split, and are resampled together.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from src.data.row_source import find_file
from src.data.rows import Row, goal_of, read_jsonl
from src.data.sources import load_rows
from src.experiments.content import sources
from src.experiments.learnt_rows import suite_rows
from src.metrics.exact import normalised
from src.metrics.flags import FLAGS

SCORES = ("rouge_l", "pass@1")
ID_LENGTH = 12
EXAMPLES = 4
"""Rows of a suite whose answers are kept in words."""
LONGEST = 400
"""Characters of an example's answer."""
DIGITS = 6


def compact(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Columns of ``answers/MODEL/SUITE.jsonl``: ``ids``, ``categories`` and whatever of flags and scores there is."""
    found: dict[str, Any] = {
        "ids": [goal_of(row)[:ID_LENGTH] for row in rows],
        "categories": [row["category"] for row in rows],
    }
    for flag in FLAGS:
        if flag in rows[0]:
            found[flag] = [int(row[flag]) for row in rows]
    for score in SCORES:
        if score in rows[0]:
            found[score] = [round(row[score], DIGITS) for row in rows]
    if "nll" in rows[0]:
        found["nll"] = [round(row["nll"] / row["tokens"], DIGITS) for row in rows]
    return found


def examples(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Answers to the same few prompts for every model, those with the smallest hashes, cut to a readable length.

    Prompts and references stay in their files, whose licence may forbid to commit them.
    """
    chosen = sorted(rows, key=lambda row: row["prompt_hash"])[:EXAMPLES]
    answers = [(row["prompt_hash"], row["answer"]) for row in chosen if "answer" in row]
    return [
        {"id": key[:ID_LENGTH], "answer": said if len(said) <= LONGEST else f"{said[:LONGEST]} …"}
        for key, said in answers
    ]


def prompts(suite: Mapping[str, Any]) -> dict[str, str]:
    """Identifier to prompt of a suite's rows (its settings as plain values); empty where they are not on this disk."""
    return {row.prompt_hash[:ID_LENGTH]: row.asked for row in _rows_of(suite)}


def row_ids(suite: Mapping[str, Any]) -> list[str]:
    """Identifiers of a suite's rows as :func:`compact` has them, of files that are here."""
    return [row.goal_hash[:ID_LENGTH] for row in suite_rows(suite)]


def most_frequent(suite: Mapping[str, Any]) -> float | None:
    """What the most frequent reference of a suite scores as the answer to every prompt, by exact match.

    Nothing where its rows are not on this disk, or answers are compared otherwise.
    """
    references = Counter(normalised(row.response) for row in _rows_of(suite))
    if not references or suite.get("rouge") or suite.get("answer", "text") != "text":
        return None
    return max(references.values()) / references.total()


def _rows_of(suite: Mapping[str, Any]) -> list[Row]:
    given = sources(suite["rows"])
    if any(find_file(source.path) is None for source in given):
        return []
    return load_rows([*given], need_response=False)


def by_suite(folder: Path, suites: Sequence[str]) -> dict[str, Any]:
    """Rows and examples of every suite of one model's answers.

    Raises:
        InputError: a file of answers is missing, empty or broken.
    """
    found: dict[str, Any] = {"rows": {}, "examples": {}}
    for suite in suites:
        rows = [row for _, row in read_jsonl(folder / f"{suite}.jsonl")]
        found["rows"][suite], found["examples"][suite] = compact(rows), examples(rows)
    return found
