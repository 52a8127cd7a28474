"""A folder of tasks for many experts: ``NAME.train.jsonl``, ``NAME.test.jsonl`` and, if there is one, ``index.json``.

The index is a list of ``{task, metric}``, in the order in which experts are added; metrics are ``exact`` and
``rougeL``. Without it tasks are taken by name and compared exactly.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from src.data.row_source import find_file
from src.data.suite import check_name
from src.errors import InputError
from src.files import read_json

METRICS = ("exact", "rougeL")


@dataclass(frozen=True)
class Task:
    """A task: its name, its rows (none to train on where experts are there) and how answers are compared."""

    name: str
    train: str
    test: str
    metric: str


def read_tasks(folder: str, *, trained: bool = True) -> list[Task]:
    """The tasks of a folder, in order.

    Args:
        folder: The folder.
        trained: Whether experts are trained on them: tasks have rows to train on then.

    Raises:
        InputError: the folder, a file or a metric is not as expected.
    """
    path, splits = find_file(folder), ("train", "test") if trained else ("test",)
    expected = " and ".join(f"NAME.{split}.jsonl" for split in splits)
    if path is None or not path.is_dir():
        raise InputError(f"study.tasks {folder}: no such folder; expected {expected} in it")
    index, ending = path / "index.json", f".{splits[0]}.jsonl"
    if index.exists():
        listed = _listed(index)
    else:
        listed = [(file.name.removesuffix(ending), "exact") for file in sorted(path.glob(f"*{ending}"))]
    if not listed:
        raise InputError(f"study.tasks {folder}: no task; expected {expected}")
    names = [name for name, _ in listed]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"{index}: {', '.join(twice)} is listed more than once; expected every task once")
    for name in names:
        try:
            check_name(name)
        except InputError as error:
            raise InputError(f"study.tasks {folder}: a task is a suite of its name: {error}") from None
    return [_task(path, name, metric, splits) for name, metric in listed]


def _listed(index: Path) -> list[tuple[str, str]]:
    """Names and metrics of an index."""
    found = read_json(index, "a list of tasks")
    if not isinstance(found, list) or not all(
        isinstance(one, dict) and isinstance(one.get("task"), str) for one in found
    ):
        raise InputError(f"{index}: expected a list of mappings with the key 'task'")
    return [(one["task"], one.get("metric", "exact")) for one in found]


def _task(folder: Path, name: str, metric: str, splits: Sequence[str]) -> Task:
    if metric not in METRICS:
        raise InputError(f"{folder / 'index.json'}: metric of {name} is {metric!r}; expected exact or rougeL")
    files = {split: folder / f"{name}.{split}.jsonl" for split in splits}
    for file in files.values():
        if not file.is_file():
            raise InputError(f"{file}: no such file; expected the rows of task {name}")
    return Task(name, str(files["train"]) if "train" in files else "", str(files["test"]), metric)
