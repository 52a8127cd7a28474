"""A folder of tasks for many experts: ``NAME.train.jsonl``, ``NAME.test.jsonl`` and, if there is one, ``index.json``.

The index is a list of ``{task, metric}``, in the order in which experts are added; metrics are ``exact`` and
``rougeL``. Without it tasks are taken by name and compared exactly.
"""

from dataclasses import dataclass
from pathlib import Path

from src.data.row_source import find_file
from src.data.suite import check_name
from src.errors import InputError
from src.files import read_json

METRICS = ("exact", "rougeL")


@dataclass(frozen=True)
class Task:
    """A task: its name, its rows and how answers are compared."""

    name: str
    train: str
    test: str
    metric: str


def read_tasks(folder: str) -> list[Task]:
    """The tasks of a folder, in order.

    Raises:
        InputError: the folder, a file or a metric is not as expected.
    """
    path = find_file(folder)
    if path is None or not path.is_dir():
        raise InputError(f"study.tasks {folder}: no such folder; expected NAME.train.jsonl and NAME.test.jsonl in it")
    index = path / "index.json"
    if index.exists():
        listed = _listed(index)
    else:
        listed = [(file.name.removesuffix(".train.jsonl"), "exact") for file in sorted(path.glob("*.train.jsonl"))]
    if not listed:
        raise InputError(f"study.tasks {folder}: no task; expected NAME.train.jsonl and NAME.test.jsonl")
    names = [name for name, _ in listed]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"{index}: {', '.join(twice)} is listed more than once; expected every task once")
    for name in names:
        try:
            check_name(name)
        except InputError as error:
            raise InputError(f"study.tasks {folder}: a task is a suite of its name: {error}") from None
    return [_task(path, name, metric) for name, metric in listed]


def _listed(index: Path) -> list[tuple[str, str]]:
    """Names and metrics of an index."""
    found = read_json(index, "a list of tasks")
    if not isinstance(found, list) or not all(
        isinstance(one, dict) and isinstance(one.get("task"), str) for one in found
    ):
        raise InputError(f"{index}: expected a list of mappings with the key 'task'")
    return [(one["task"], one.get("metric", "exact")) for one in found]


def _task(folder: Path, name: str, metric: str) -> Task:
    if metric not in METRICS:
        raise InputError(f"{folder / 'index.json'}: metric of {name} is {metric!r}; expected exact or rougeL")
    files = [folder / f"{name}.{split}.jsonl" for split in ("train", "test")]
    for file in files:
        if not file.is_file():
            raise InputError(f"{file}: no such file; expected the rows of task {name}")
    return Task(name, str(files[0]), str(files[1]), metric)
