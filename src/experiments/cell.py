"""A cell: one step of a study, a pure function of its content.

    key = SHA-256(stage, settings with rows and base replaced by their content, keys of the cells that it needs)

Hardware is no part of it, nor is how judges are run. Equal cells of different studies have equal keys, so what one
study computed serves all.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from typing import Any, Literal

from src.experiments.content import identified

Stage = Literal["given", "fit", "fisher", "merge", "test", "inspect"]
"""The command that computes a cell; ``given`` are adapters that are there."""
FORMAT: dict[str, int] = {"given": 1, "fit": 2, "fisher": 1, "merge": 1, "test": 1, "inspect": 1}
"""Raise a stage's number where a change of the source changes its numbers: cells that are known are made again then."""
NUMERICAL = {"fit": ("torch", "transformers", "peft"), "fisher": ("torch", "transformers"), "merge": ("torch",)}
NUMERICAL |= {"given": (), "test": ("torch", "transformers"), "inspect": ("torch",)}
KEY_LENGTH = 24


@dataclass(frozen=True, eq=False)
class Cell:
    """One step.

    Attributes:
        stage: Which command computes it.
        label: What people call it.
        settings: Everything that the command is told, but paths of other cells' weights, hardware and output.
        needs: Role to the cells whose weights go in, in order.
        batch: Cells of one batch may be computed by one run of the command.
        units: Size of the work, to tell the time of cells to come from that of finished ones; unknown without.
    """

    stage: Stage
    label: str
    settings: Mapping[str, Any]
    needs: Mapping[str, tuple["Cell", ...]] = field(default_factory=dict)
    batch: str = ""
    units: float | None = None

    @cached_property
    def key(self) -> str:
        """Hash of the content."""
        content = {
            "stage": self.stage,
            "format": FORMAT[self.stage],
            "versions": {name: _series(version(name)) for name in NUMERICAL[self.stage]},
            "settings": identified(self.stage, self.settings),
            "needs": {role: [cell.key for cell in cells] for role, cells in sorted(self.needs.items())},
        }
        return digest(content)

    @property
    def parents(self) -> list["Cell"]:
        """The cells that it needs."""
        return [cell for cells in self.needs.values() for cell in cells]


def digest(content: Any) -> str:
    """Key of plain values: the beginning of the SHA-256 of their canonical JSON."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_LENGTH]


def _series(number: str) -> str:
    """``2.13`` of ``2.13.1+cpu``: a patch release does not make a study start again."""
    return ".".join(number.split("+", maxsplit=1)[0].split(".")[:2])


def closure(cells: Iterable[Cell]) -> list[Cell]:
    """The cells and all that they need, each once, what is needed first."""
    found: dict[str, Cell] = {}

    def visit(cell: Cell) -> None:
        if cell.key not in found:
            for parent in cell.parents:
                visit(parent)
            found.setdefault(cell.key, cell)

    for cell in cells:
        visit(cell)
    return list(found.values())
