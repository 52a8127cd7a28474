"""A grid of cells that only sleep and count: ``python -m tests.toy_grid FOLDER SECONDS`` works on it as a process."""

import os
import sys
import time
from pathlib import Path

from src.experiments.cell import Cell
from src.experiments.engine import CellError, Engine
from src.experiments.store import Store


def toy_grid(count=4):
    """Two roots, and ``count`` cells that need both."""
    roots = tuple(Cell("fisher", f"root {i}", {"toy": i}) for i in range(2))
    return [Cell("inspect", f"leaf {i}", {"leaf": i}, {"adapters": roots}, units=1.0) for i in range(count)]


class ToyWork:
    """Computes toy cells slowly; keeps a line for each start and each end; fails for the labels that it is told."""

    error = CellError

    def __init__(self, store, folder, seconds=0.0, bad=()):
        self.store, self.diary, self.seconds, self.bad = store, folder / "diary.txt", seconds, bad

    def __call__(self, batch):
        for cell in batch:
            self._note("start", cell)
            time.sleep(self.seconds)
            if cell.label in self.bad:
                raise self.error(f"{cell.label} is bad")
            if cell.stage == "fisher":
                (self.store.weights(cell)).mkdir(parents=True, exist_ok=True)
            self._note("end", cell)
        cost = {"seconds": 0.5, "peak_mb": 1.0, "cells_in_run": len(batch), "processor": "toy"}
        return {cell.key: {"found": {"label": cell.label}, "cost": cost, "command": []} for cell in batch}

    def _note(self, what, cell):
        with self.diary.open("a") as file:
            file.write(f"{what} {os.getpid()} {cell.label}\n")

    def noted(self, what):
        lines = [line.split(" ", 2) for line in self.diary.read_text().splitlines()] if self.diary.exists() else []
        return [label for kind, _, label in lines if kind == what]


def toy_engine(folder, *, seconds=0.0, bad=(), count=4, **options):
    store = Store(folder / "results", folder / "work")
    work = ToyWork(store, folder, seconds, bad)
    return Engine(toy_grid(count), store, work, **options), work, store


if __name__ == "__main__":
    toy_engine(Path(sys.argv[1]), seconds=float(sys.argv[2]))[0].run()
