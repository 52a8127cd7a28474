"""Where cells are kept: results as small JSON files to commit, weights in a working folder, failures beside them."""

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from src.errors import InputError, check_keys
from src.experiments.cell import Cell, digest
from src.files import read_json, write_json, write_text
from src.provenance import code_hash

WHOLE = "cell.json"
"""File of a weights folder that is written last: a folder that has one is whole."""
WITH_WEIGHTS = ("given", "fit", "fisher", "merge")
KEYS = ("key", "stage", "settings", "units", "source")
"""What every result says of its cell."""

Record = dict[str, Any]


class Store:
    """Results and weights of cells.

    Args:
        results: Folder of ``KEY.json`` files; small, to be committed.
        work: Folder of weights, running commands, claims and failures; shared by machines that work on one grid.
    """

    def __init__(self, results: Path, work: Path) -> None:
        self.results, self.work = results, work

    def weights(self, cell: Cell) -> Path:
        """Folder of a cell's adapter or Fisher files."""
        return self.work / "weights" / cell.key

    def running(self, name: str) -> Path:
        """Folder of a command that runs."""
        return self.work / "running" / name

    @property
    def claims(self) -> Path:
        """Folder of claims."""
        return self.work / "claims"

    def has_result(self, cell: Cell) -> bool:
        """Whether the cell's numbers are known."""
        return self._result(cell).is_file()

    def has_weights(self, cell: Cell) -> bool:
        """Whether cells that need this one can start: its weights are here."""
        return cell.stage not in WITH_WEIGHTS or (self.weights(cell) / WHOLE).is_file()

    def read(self, cell: Cell) -> Record:
        """What is known of a cell.

        Raises:
            InputError: it has not been computed, or its file is broken.
        """
        place, what = self._result(cell), f"the result of {cell.label}"
        record: Record = read_json(place, what)
        check_keys(record, KEYS, place, what)
        if record["key"] != cell.key:
            raise InputError(f"{place}: key is {record['key']!r}; expected {what}, {cell.key}")
        if cell.stage == "test":
            _check_rows(record, place, what)
        return record

    def read_weights(self, cell: Cell) -> Record:
        """What the weights at hand say of themselves: a result may have come from another machine since.

        Raises:
            InputError: there are none, or the file is broken.
        """
        record: Record = read_json(self.weights(cell) / WHOLE, f"the weights of {cell.label}")
        return record

    def finish(self, cell: Cell, record: Mapping[str, Any]) -> None:
        """Keep what a cell gave: the weights are whole from here on, the result last."""
        known = {
            "key": cell.key,
            "stage": cell.stage,
            "label": cell.label,
            "settings": cell.settings,
            "needs": {role: [parent.key for parent in cells] for role, cells in cell.needs.items()},
            "units": cell.units,
            "source": source_hash(),
        }
        if cell.stage in WITH_WEIGHTS:
            write_json(self.weights(cell) / WHOLE, known | {"trained": record.get("trained", {})})
        lines = (f"{json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in (known | dict(record)).items())
        # One key a line: long lists of rows stay small, and a difference between two commits can be read.
        write_text(self._result(cell), "{\n" + ",\n".join(lines) + "\n}\n")
        self._failure(cell).unlink(missing_ok=True)

    def drop_weights(self, cell: Cell) -> None:
        """Remove a cell's weights; its result stays. What says that they are whole goes first."""
        (self.weights(cell) / WHOLE).unlink(missing_ok=True)
        shutil.rmtree(self.weights(cell), ignore_errors=True)

    def fail(self, cell: Cell, message: str) -> None:
        """Keep why a cell failed."""
        write_json(self._failure(cell), {"key": cell.key, "label": cell.label, "message": message})

    def failure(self, cell: Cell, *, since: float) -> str | None:
        """Why a cell failed after a point of time, by the folder's clock; nothing where it did not."""
        path = self._failure(cell)
        try:
            if path.stat().st_mtime <= since:
                return None
            message: str = json.loads(path.read_text(encoding="utf-8"))["message"]
        except FileNotFoundError:
            return None
        return message

    def rates(self, base: str | None) -> dict[str, tuple[float | None, float]]:
        """Mean seconds per unit and per cell of the finished cells of a base model (unset: of any).

        By stage, and by settings: cells of the same settings, such as evaluations that ask the same suites, stand under
        these settings' digest. Seconds per unit are of the cells that say how many; nothing where none does.
        """
        spent: dict[str, list[tuple[float, float]]] = {}
        for path in sorted(self.results.glob("*.json")) if self.results.is_dir() else []:
            record = read_json(path, "the result of a cell")
            check_keys(record, (*KEYS, "cost"), path, "the result of a cell")
            name = record["settings"].get("model", {}).get("base", {}).get("name")
            if base in (None, name) or name is None:
                for group in (record["stage"], digest(record["settings"])):
                    spent.setdefault(group, []).append((record["cost"]["seconds"], record["units"] or 0.0))
        return {group: (_per_unit(costs), sum(s for s, _ in costs) / len(costs)) for group, costs in spent.items()}

    def look_anew(self) -> None:
        """Let a network file system forget that results and weights were absent: it does where their folders change."""
        for folder in (self.results, self.work / "weights"):
            if folder.is_dir():
                with tempfile.NamedTemporaryFile(dir=folder, prefix=".look-"):
                    pass

    def clear(self, name: str) -> None:
        """Remove what a finished command left."""
        shutil.rmtree(self.running(name), ignore_errors=True)

    def _result(self, cell: Cell) -> Path:
        return self.results / f"{cell.key}.json"

    def _failure(self, cell: Cell) -> Path:
        return self.work / "failures" / f"{cell.key}.json"


def source_hash() -> str:
    """Hash of this project's source: provenance, no part of a key (a comment would undo a night's work)."""
    return code_hash(("**/*.py",))[:16]


def _check_rows(record: Record, place: Path, what: str) -> None:
    """Stop at an evaluation without rows, or one whose columns are not of the same rows."""
    check_keys(record, ("found",), place, what)
    check_keys(record["found"], ("rows",), place, what)
    for suite, columns in record["found"]["rows"].items():
        counts = {len(column) for column in columns.values()}
        if len(counts) != 1:
            raise InputError(f"{place}: columns of suite {suite} have {sorted(counts)} rows; expected as many in each")


def _per_unit(costs: Sequence[tuple[float, float]]) -> float | None:
    units = sum(units for _, units in costs)
    return sum(seconds for seconds, units in costs if units) / units if units else None
