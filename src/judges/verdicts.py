"""Verdicts kept on disk: what was judged once is not judged again, and a killed run goes on where it stopped.

One file per judge (named by its key) and process, a line per verdict, appended as verdicts arrive. A verdict is found
by the content of what was judged, so a changed answer is never served an old one.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from src.errors import InputError
from src.metrics.judging import Judge, Judgement, Unfinished, is_undecided, judgements

CHUNK = 64
"""Answers judged between two writes."""


class Verdicts:
    """A store of values by content.

    Args:
        folder: Directory to keep files in.
        key: What made the values: the judge's key.
        part: Name of this process's file; every process reads all files.
    """

    def __init__(self, folder: Path, key: str, part: str = "0") -> None:
        self.path = folder / f"verdicts-{key}.{part}.jsonl"
        self._known: dict[str, Any] = {}
        for path in sorted(folder.glob(f"verdicts-{key}.*.jsonl")):
            for line in read_lines(path):
                # Several processes write: what one would not decide another may have decided, before or later.
                undecided = isinstance(line["value"], dict) and is_undecided(line["value"].get("reply"))
                if not (undecided and line["item"] in self._known):
                    self._known[line["item"]] = line["value"]

    def mapped(
        self,
        items: Sequence[Sequence[str]],
        compute: Callable[[list[Sequence[str]]], list[Any]],
        *,
        final: Callable[[Any], bool] = lambda _: True,
    ) -> list[Any]:
        """The value of each item; only unknown ones are computed, each distinct one once.

        Args:
            items: What is looked up.
            compute: The values of items that have none.
            final: Whether a stored value still stands; one that does not is computed again.

        Raises:
            InputError: computing failed; values that came before are kept.
        """
        names = [_name(item) for item in items]
        known = {name: value for name, value in self._known.items() if final(value)}
        todo = list({name: item for name, item in zip(names, items, strict=True) if name not in known}.items())
        for start in range(0, len(todo), CHUNK):
            part = todo[start : start + CHUNK]
            try:
                values = compute([item for _, item in part])
            except Unfinished as error:
                self._keep({part[i][0]: vars(found) for i, found in error.found.items()})
                raise InputError(str(error)) from None
            found = {name: value for (name, _), value in zip(part, values, strict=True)}
            self._keep(found)
            known |= found
        return [known[name] for name in names]

    def missing(self, items: Sequence[Sequence[str]], *, final: Callable[[Any], bool] = lambda _: True) -> int:
        """Number of items whose value is not known, or does not stand."""
        known = {name for name, value in self._known.items() if final(value)}
        return sum(_name(item) not in known for item in items)

    def _keep(self, values: Mapping[str, Any]) -> None:
        if values:
            append_lines(self.path, [{"item": name, "value": value} for name, value in values.items()])
            self._known |= values


def _name(item: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(item)).encode()).hexdigest()


def judged(
    judge: Judge, prompts: Sequence[str], answers: Sequence[str], *, folder: Path | Verdicts, device: str = "cpu"
) -> list[Judgement]:
    """Judgements of answers, from the store (or the one in a folder) where they are known.

    Raises:
        InputError: the judge failed, or says something else than one judgement per answer.
    """

    def compute(items: list[Sequence[str]]) -> list[Any]:
        judge.load(device)
        return [vars(found) for found in judgements(judge, [item[0] for item in items], [item[1] for item in items])]

    pairs = list(zip(prompts, answers, strict=True))
    store = folder if isinstance(folder, Verdicts) else Verdicts(folder, judge.key)
    return [Judgement(**value) for value in store.mapped(pairs, compute, final=judge.stands)]


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file; a line that a killed process left unfinished is passed over."""
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            value = json.loads(line) if line else None
        except json.JSONDecodeError:
            continue
        if isinstance(value, dict):
            yield value


def append_lines(path: Path, values: Sequence[dict[str, Any]]) -> None:
    """Append JSON objects, a line each, behind whatever unfinished line is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)
    with path.open("ab+") as handle:
        if handle.tell() > 0:
            handle.seek(-1, 2)
            text = text if handle.read(1) == b"\n" else "\n" + text
        handle.write(text.encode())
