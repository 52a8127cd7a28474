"""What each method took: wall time and peak memory of its commands, measured where its numbers were made."""

from collections.abc import Mapping, Sequence
from typing import Any

from src.experiments.cell import Cell, closure
from src.experiments.document import Document, column, table
from src.experiments.grid import Model
from src.experiments.store import Store

STAGES = {"fit": "training", "fisher": "Fisher", "merge": "merge"}
NOTE = (
    "Mean seconds per seed for a method's whole path, with the start of Python, and the largest resident memory of a "
    "process. Training of the experts is not a method's own cost; training of a method that trains is."
)


def cost_table(methods: Mapping[str, Sequence[Model]], store: Store) -> Document:
    """Seconds by stage and peak memory of every method."""
    columns = [column("method", "method"), *(column(key, f"{name} (s)") for key, name in STAGES.items())]
    rows = [{"method": name} | _spent(models, store) for name, models in methods.items()]
    columns += [*_peak_columns(rows), column("processor", "processor")]
    return table("Cost of the methods", columns, rows, note=NOTE)


def _spent(models: Sequence[Model], store: Store) -> dict[str, Any]:
    made = [model.made for model in models if model.made is not None]
    results = {cell.key for cell in made}
    # What only this method needs: its Fisher passes, and trainings that need other cells (an expert needs none).
    own = {c.key: c for c in closure(made) if c.key in results or c.stage == "fisher" or c.needs}
    costs = [(cell, store.read(cell)["cost"]) for cell in own.values() if store.has_result(cell)]
    seeds = len({model.seed for model in models})
    found: dict[str, Any] = {}
    for stage in STAGES:
        spent = [cost["seconds"] for cell, cost in costs if cell.stage == stage]
        found[stage] = sum(spent) / seeds if spent else ""
    found |= _peaks([cost for _, cost in costs])
    found["processor"] = "; ".join(sorted({cost["processor"] for _, cost in costs}))
    return found


def totals(cells: Sequence[Cell], store: Store) -> Document:
    """Number of cells, minutes and peak memory by stage, for the whole study."""
    rows = []
    known = [cell for cell in closure(cells) if cell.stage != "given" and store.has_result(cell)]
    for stage in dict.fromkeys(cell.stage for cell in known):
        costs = [store.read(cell)["cost"] for cell in known if cell.stage == stage]
        minutes = round(sum(cost["seconds"] for cost in costs) / 60, 1)
        rows.append({"stage": stage, "cells": len(costs), "minutes": minutes} | _peaks(costs))
    columns = [column("stage", "stage"), column("cells", "cells"), column("minutes", "minutes")]
    return table("Cost of the study", [*columns, *_peak_columns(rows)], rows)


def _peaks(costs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The largest memory of a process, and of one on a GPU where one has been used."""
    found = {"peak_mb": max((cost["peak_mb"] for cost in costs), default="")}
    on_gpu = [cost["gpu_peak_mb"] for cost in costs if "gpu_peak_mb" in cost]
    return found | {"gpu_peak_mb": max(on_gpu)} if on_gpu else found


def _peak_columns(rows: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Columns of the peaks; that of GPUs where a row has one."""
    on_gpu = any("gpu_peak_mb" in row for row in rows)
    return [column("peak_mb", "peak memory (MB)")] + [column("gpu_peak_mb", "peak GPU memory (MB)")] * on_gpu
