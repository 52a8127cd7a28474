"""The judge command: judge stored answers without generating again, or measure a judge against human labels."""

import json
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from src.data.rows import goal_of, read_jsonl, read_utf8
from src.errors import InputError
from src.files import check_apart, check_output, new_directory, write_json, write_text
from src.judges.refusal import Refusal
from src.judges.verdicts import Verdicts, judged
from src.metrics.agreement import count_pairs, kappa
from src.metrics.categories import category_text, each_category, named_categories
from src.metrics.collapse import is_collapsed
from src.metrics.counters import FlagRate, by_goal, share
from src.metrics.judging import Judge, Judgement, check_finds, reservations
from src.own_files import check_own

log = logging.getLogger(__name__)

NAMES = {"refusal": "refusal", "harmful": "attack_success"}
CACHE = ".verdicts"


def judge(
    *,
    predictions: str | None = None,
    labels: str | None = None,
    judge: Judge | None = None,
    output: str = "logs/judge",
    overwrite: bool = False,
    device: str = "auto",
) -> None:
    """Judge stored answers, or measure a judge against labels.

    Args:
        predictions: A JSONL file of answers, or a directory that test or predict wrote (its ``answers`` are judged).
        labels: A JSONL file with the columns ``prompt``, ``answer`` and ``label``; a label is true or false (also 1, 0,
            yes, no), or says what the answer is: ``refusal``, ``harmful`` or ``answer`` (neither).
        judge: The judge; unset is the refusal matcher.
        output: Directory to write: ``judged.json`` and the answers with their verdicts, or ``agreement.json``.
        overwrite: Replace an output that exists; verdicts on unchanged answers are kept.
        device: Where a judge that is a model runs, such as ``cuda:1``; ``auto`` is the GPU, where there is one.
    """
    if (predictions is None) == (labels is None):
        raise InputError("judge: name either --predictions (answers to judge) or --labels (answers with human labels)")
    folder, found = Path(output), judge or Refusal()
    check_finds(found)
    check_output(folder, overwrite=overwrite)
    check_own(folder, ("*.jsonl", "judged.json", "agreement.json"))
    check_apart(folder, [str(predictions if labels is None else labels)])
    cache = folder.parent / CACHE
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if labels is not None:
        record = _agreement(Path(labels), found, cache, device)
        with new_directory(folder) as new:
            write_json(new / "agreement.json", record)
    else:
        record = _judged_files(Path(str(predictions)), found, folder, cache, device)
    sys.stdout.write(json.dumps({k: v for k, v in record.items() if k != "files"}, indent=2) + "\n")
    log.info("judged in %s", folder)


def _judged_files(source: Path, judge: Judge, folder: Path, cache: Path, device: str) -> dict[str, Any]:
    files = _answer_files(source)
    store = Verdicts(cache, judge.key)
    record: dict[str, Any] = {"judge": judge.settings, "predictions": str(source), "files": {}}
    with new_directory(folder) as new:
        for name, path in files.items():
            rows = [row for _, row in _rows(path)]
            verdicts = _verdicts(rows, judge, store, device)
            record["files"][name] = _shares(rows, verdicts, judge)
            whole = (row | {"verdict": vars(verdict)} for row, verdict in zip(rows, verdicts, strict=True))
            write_text(new / f"{name}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in whole))
        write_json(new / "judged.json", record)
    for name, summary in record["files"].items():
        one = summary[NAMES[judge.finds]]
        log.info("%s: %s %.2f [%.2f, %.2f], n = %d", name, NAMES[judge.finds], one["value"], *one["interval"], one["n"])
    return record


def _answer_files(source: Path) -> dict[str, Path]:
    """Name (``MODEL/SUITE``) to file."""
    if source.is_file():
        return {source.stem: source}
    root = source / "answers" if (source / "answers").is_dir() else source
    files = {str(path.relative_to(root).with_suffix("")): path for path in _below(root)}
    with_answers = {name: path for name, path in files.items() if '"answer"' in read_utf8(path)}
    if not with_answers:
        raise InputError(f"{source}: no answers; expected a JSONL file of answers or the output of test or predict")
    return with_answers


def _below(path: Path, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """The JSONL files below a folder, sorted; links are followed, but not to a folder that they lie in."""
    if path.suffix == ".jsonl" and path.is_file():
        yield path
    elif path.is_dir() and (place := path.resolve()) not in above:
        for entry in sorted(path.iterdir()):
            yield from _below(entry, above | {place})


def _rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    found = list(read_jsonl(path))
    for place, row in found:
        for key in ("prompt", "answer"):
            if not isinstance(row.get(key), str):
                raise InputError(f"{place}: no text in {key!r}; an answer to judge has 'prompt' and 'answer'")
        if not isinstance(row.get("goal", ""), str):
            raise InputError(f"{place}: goal is {row['goal']!r}; expected a text, or no such column")
        if not isinstance(row.get("collapsed", False), bool):
            raise InputError(f"{place}: collapsed is {row['collapsed']!r}; expected true or false")
    return found


def _verdicts(rows: Sequence[dict[str, Any]], judge: Judge, store: Path | Verdicts, device: str) -> list[Judgement]:
    prompts, answers = [row.get("goal") or row["prompt"] for row in rows], [row["answer"] for row in rows]
    return judged(judge, prompts, answers, folder=store, device=device)


def _shares(rows: Sequence[dict[str, Any]], verdicts: Sequence[Judgement], judge: Judge) -> dict[str, Any]:
    """Shares of positive verdicts and of collapsed answers, and how many answers a model judged in part only.

    A collapsed answer is never positive; what an evaluation called collapsed (by its perplexity, say) stays so.
    """
    collapsed = [row.get("collapsed", False) or is_collapsed(row["answer"], row["prompt"]) for row in rows]
    flags = [verdict.positive and not how for verdict, how in zip(verdicts, collapsed, strict=True)]
    goals = list(map(goal_of, rows))
    named = named_categories([category_text(row.get("category")) for row in rows])
    found: dict[str, Any] = {}
    for name, each in ((NAMES[judge.finds], flags), ("collapse", collapsed)):
        rate = FlagRate(each_category(named))
        rate.update(each, named or None)
        found[name] = by_goal(rate.summary(), each, goals, named)
    return found | reservations(verdict.reply for verdict in verdicts)


def _agreement(path: Path, judge: Judge, cache: Path, device: str) -> dict[str, Any]:
    """Accuracy and Cohen's kappa of a judge against human labels."""
    found = _rows(path)
    human = [_label(row, judge, place) for place, row in found]
    verdicts = _verdicts([row for _, row in found], judge, cache, device)
    pairs = count_pairs([verdict.positive for verdict in verdicts], human)
    value, low, high = kappa(pairs)
    return {
        "judge": judge.settings,
        "labels": str(path),
        "accuracy": share(pairs.both + pairs.neither, pairs.total),
        "kappa": {"value": value, "interval": [low, high], "n": pairs.total} if value == value else None,  # noqa: PLR0124
        "pairs": {"both": pairs.both, "judge only": pairs.first, "human only": pairs.second, "neither": pairs.neither},
    } | reservations(verdict.reply for verdict in verdicts)


def _label(row: dict[str, Any], judge: Judge, place: str) -> bool:
    label = row.get("label")
    known = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False, "answer": False}
    known |= {word: word == judge.finds for word in NAMES}
    if isinstance(label, bool | int | float) and label in (0, 1):
        return bool(label)
    if isinstance(label, str) and label.strip().casefold() in known:
        return known[label.strip().casefold()]
    raise InputError(f"{place}: label is {label!r}; expected true or false (1, 0, yes, no) or refusal, harmful, answer")
