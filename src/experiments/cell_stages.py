"""How the cells of each stage are computed: the project's command, told by a YAML file, and what is kept of its output.

The command is the one that a user would type; ``--trainer`` goes through to those that run a Trainer.
"""

import resource
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from src.adapters.given_adapter import copy_adapter
from src.experiments.cell import Cell, digest
from src.experiments.command import Cost, peak_mb, processor, run_command
from src.experiments.engine import CellError
from src.experiments.lineage import trained, warn_of_other_weights
from src.experiments.pencils import kept_pencil
from src.experiments.plain_settings import layered
from src.experiments.rows import by_suite
from src.experiments.settings import BASE_FISHER
from src.experiments.store import Record, Store
from src.files import read_json, write_text
from src.merge.sweep import point_name
from src.metrics.file import METRICS, read_metrics
from src.models.answer_files import answer_file
from src.provenance import versions

GOES_ON = ("fit", "fisher", "test")
"""Commands that go on from where a killed one ended; the others start again."""
Execute = Callable[[Sequence[str], Path], Cost]
"""Runs ``python -m src ARGUMENTS``, with a file for what it prints."""


class Stages:
    """Computes batches of cells by the project's commands.

    Args:
        store: Where weights and outputs lie.
        trainer: Hardware file for the commands that run a Trainer.
        execute: Runs a command; each in a process of its own unless a test says otherwise.
    """

    def __init__(self, store: Store, trainer: str | None, execute: Execute = run_command) -> None:
        self.store, self.execute = store, execute
        self.hardware = [] if trainer is None else ["--trainer", trainer]

    def __call__(self, batch: Sequence[Cell]) -> Mapping[str, Record]:
        """Compute a batch: key to result."""
        collect = getattr(self, f"_{batch[0].stage}")
        name = f"{batch[0].stage}-{digest([cell.key for cell in batch])}"
        cost, command, found = collect(name, batch)
        shared = {"cost": cost.shared(len(batch)), "command": command, "versions": versions()}
        self.store.clear(name)
        records = {c.key: {"found": found[c.key]} | shared | {"trained": trained(c, self.store)} for c in batch}
        for cell in batch:
            if cell.stage == "fit" and self.store.has_result(cell):
                warn_of_other_weights(cell, self.store.read(cell), records[cell.key])
        return records

    def _run(
        self, command: str, name: str, settings: Mapping[str, Any], flags: Sequence[str]
    ) -> tuple[Cost, list[str]]:
        config = self.store.work / "configs" / f"{name}.yaml"
        write_text(config, yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True))
        arguments, log_file = [command, "--config", str(config), *flags], self.store.work / "logs" / f"{name}.txt"
        begun = self.store.work / "configs" / f"{name}.begun"
        before = _spent(begun, log_file) if command in GOES_ON else 0.0
        write_text(begun, f"{before}\n")
        try:
            cost = self.execute(arguments, log_file)
        except CellError:
            begun.unlink(missing_ok=True)
            raise
        begun.unlink(missing_ok=True)
        return replace(cost, seconds=before + cost.seconds), ["python", "-m", "src", *arguments]

    def _given(self, _name: str, batch: Sequence[Cell]) -> tuple[Cost, list[str], dict[str, Any]]:
        """A copy: what a study goes on from stays as it was."""
        (cell,) = batch
        started, folder = time.monotonic(), self.store.weights(cell)
        found = copy_adapter(cell.settings["adapter"], folder)
        used = resource.getrusage(resource.RUSAGE_SELF)
        cost = Cost(time.monotonic() - started, peak_mb([], used), processor())
        return cost, ["cp", "-r", cell.settings["adapter"], str(folder)], {cell.key: found}

    def _fit(self, name: str, batch: Sequence[Cell]) -> tuple[Cost, list[str], dict[str, Any]]:
        (cell,) = batch
        folder = self.store.weights(cell)
        # As many steps as in one process: hardware is no part of a cell's key.
        flags = [*self.hardware, "--data.shared_batch", "true", "--output", str(folder)]
        # A cell's training goes on where it can, and starts again where paths or options have changed since.
        flags += ["--resume", "true", "--overwrite", "true"]
        cost, ran = self._run("fit", name, self._fit_settings(cell), flags)
        shutil.rmtree(folder / "run", ignore_errors=True)  # checkpoints with the optimiser's state
        manifest = read_json(folder / "manifest.json", "the manifest of an expert")
        kept = ("rows", "steps", "val_loss", "base")
        return cost, ran, {cell.key: {key: manifest[key] for key in kept}}

    def _fit_settings(self, cell: Cell) -> dict[str, Any]:
        """Its settings, with the paths of what it needs; initial weights are of seed 0 where it names none."""
        model: dict[str, Any] = {"seed": cell.settings["model"].get("seed", 0)}
        if cell.needs.get("core"):
            model["core"] = self._paths(cell, "core")[0]
        if cell.needs.get("beside"):
            model["beside"] = dict.fromkeys(self._paths(cell, "beside"), 1.0)
        if cell.needs.get("fisher"):
            model["regularizer"] = {"init_args": {"fisher": self._paths(cell, "fisher")[0]}}
        return layered(cell.settings, {"model": model})

    def _fisher(self, name: str, batch: Sequence[Cell]) -> tuple[Cost, list[str], dict[str, Any]]:
        (cell,) = batch
        model = {"utility": self._paths(cell, "utility"), "safety": self._paths(cell, "safety")[0]}
        first = self._paths(cell, "first")
        point = {"reference_safety": dict.fromkeys(first, 1.0)} if first else {}
        settings = dict(cell.settings) | {"model": dict(cell.settings["model"]) | model | point}
        flags = [*self.hardware, "--output", str(self.store.weights(cell)), "--overwrite", "true"]
        cost, ran = self._run("fisher", name, settings, flags)
        files = sorted(path.name for path in self.store.weights(cell).glob("*.safetensors"))
        return cost, ran, {cell.key: {"files": files}}

    def _merge(self, name: str, batch: Sequence[Cell]) -> tuple[Cost, list[str], dict[str, Any]]:
        """One command for all strengths of a method; each merged adapter then becomes its cell's weights."""
        first = batch[0]
        settings = {key: value for key, value in first.settings.items() if key != "strength"}
        settings["utility"] = self._paths(first, "utility")
        settings |= {role: self._paths(first, role)[0] for role in ("safety", "fisher") if first.needs.get(role)}
        if first.needs.get(BASE_FISHER):
            settings = layered(settings, {"method": {"init_args": {BASE_FISHER: self._paths(first, BASE_FISHER)[0]}}})
        option = first.settings["strength"]["option"]
        values = [cell.settings["strength"]["value"] for cell in batch]
        if option == "alpha":
            settings["alpha"] = values
        elif option != "none":
            settings["sweep"] = {option: values}
        output = self.store.running(name)
        cost, ran = self._run("merge", name, settings, ["--output", str(output), "--overwrite", "true"])
        found = {}
        for cell, value in zip(batch, values, strict=True):
            folder = output if option == "none" else output / point_name(option, value)
            manifest = read_json(folder / "manifest.json", "the manifest of a merge")
            found[cell.key] = {key: manifest.get(key) for key in ("method", "settings", "alpha")} | _size(manifest)
            found[cell.key] |= kept_pencil(manifest)
            self.store.drop_weights(cell)
            self.store.weights(cell).parent.mkdir(parents=True, exist_ok=True)
            folder.rename(self.store.weights(cell))
        return cost, ran, found

    def _test(self, name: str, batch: Sequence[Cell]) -> tuple[Cost, list[str], dict[str, Any]]:
        """One load of the base for several models with the same suites."""
        first = batch[0]
        names = {cell.key: (self._paths(cell, "adapter") or ["base"])[0] for cell in batch}
        adapters = [path for path in names.values() if path != "base"]
        model = dict(first.settings["model"]) | {"adapters": adapters, "include_base": "base" in names.values()}
        output = self.store.running(name)
        flags = [*self.hardware, "--output", str(output), "--overwrite", "true"]
        cost, ran = self._run("test", name, dict(first.settings) | {"model": model}, flags)
        metrics = read_metrics(output / METRICS)
        models = {one["name"]: one for one in metrics["models"]}
        suites = [suite["name"] for suite in first.settings["data"]["suites"]]
        found = {}
        for key, model_name in names.items():
            one = models[model_name]
            folder = answer_file(output, model_name, suites[0]).parent
            kept = {"adapter": one["adapter"] and one["adapter"]["sha256"], "suites": one["suites"]}
            found[key] = kept | {"base": metrics["base"]} | by_suite(folder, suites)
        return cost, ran, found

    def _inspect(self, name: str, batch: Sequence[Cell]) -> tuple[Cost, list[str], dict[str, Any]]:
        (cell,) = batch
        output = self.store.running(name)
        settings = {"adapters": self._paths(cell, "adapters")}
        cost, ran = self._run("inspect", name, settings, ["--output", str(output), "--overwrite", "true"])
        found = read_json(output / "inspect.json", "the comparison of adapters")
        # Every angle of every module and pair: 16 MB for 20 experts. A study shows means, which stand beside them.
        return cost, ran, {cell.key: {name: value for name, value in found.items() if name != "angles"}}

    def _paths(self, cell: Cell, role: str) -> list[str]:
        return [str(self.store.weights(parent)) for parent in cell.needs.get(role, ())]


def _size(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Form, kept energy and mean rank of a merged adapter; its numbers by module are in the weights' manifest."""
    output = manifest["output"]
    ranks = list((output.get("ranks") or {}).values())
    mean = sum(ranks) / len(ranks) if ranks else None
    return {"output": {"form": output["form"], "kept_energy": output.get("kept_energy"), "mean_rank": mean}}


def _spent(begun: Path, log_file: Path) -> float:
    """Seconds that pieces of a command took which were killed, and from whose end it goes on.

    The mark holds those before the last one, which lasted from when the mark was written until it last said something.
    """
    if not begun.is_file():
        return 0.0
    last = log_file.stat().st_mtime - begun.stat().st_mtime if log_file.is_file() else 0.0
    return float(begun.read_text(encoding="utf-8")) + max(0.0, last)
