"""Models of a study whose answers are made up: a store that knows them, without weights and without commands."""

import random

from src.experiments.cell import Cell
from src.experiments.grid import Model

COLUMNS = {"harmful": "refused", "borderline": "refused", "utility": "exact"}


def model(method, strength=None, seed=0):
    return Model(method, strength, seed, Cell("test", f"{method} @ {strength}, seed {seed}", {}), None)


class KnownAnswers:
    """Stands for a store: every model answered suites (name to kind), but those whose labels are missing."""

    def __init__(self, suites, missing=(), own=None):
        self.suites, self.missing, self.own = suites, missing, own or {}

    def has_result(self, cell):
        return cell.label not in self.missing

    def read(self, cell):
        draw, rows = random.Random(cell.label), {}
        share = self.own.get(cell.label, 0.5)
        for name, kind in self.suites.items():
            ids = [f"{name}{i:03d}" for i in range(60)]
            rows[name] = {"ids": ids, "categories": [""] * 60, COLUMNS[kind]: [draw.random() < share for _ in ids]}
        suites = [{"name": name, "kind": kind, "rows": "absent.jsonl"} for name, kind in self.suites.items()]
        return {"settings": {"data": {"suites": suites}}, "found": {"rows": rows, "examples": {}}}
