"""What a study is: the models that it needs, and what it says about them."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath

from src.errors import InputError
from src.experiments.cell import Cell, closure
from src.experiments.content import ROWS, sources
from src.experiments.document import REFERENCES, Document
from src.experiments.grid import Grid, Model
from src.experiments.point_names import at_strength, called, method_and_strength
from src.experiments.scores import joined
from src.experiments.settings import MethodSpec
from src.experiments.store import Record, Store
from src.experiments.trainings import fewer_rows


@dataclass(frozen=True)
class Plan:
    """The models of a study, cells beside them (comparisons of adapters), and what a page must say."""

    models: Sequence[Model]
    others: Sequence[Cell] = field(default_factory=tuple)
    notes: Sequence[str] = ()

    @property
    def cells(self) -> list[Cell]:
        """Everything to compute."""
        return [*(cell for model in self.models for cell in model.tests), *self.others]


class Study(ABC):
    """A study; its subclasses are the registry of ``--study``.

    Attributes:
        reports_further: Whether it asks the recipe's ``evaluation.further``.
    """

    reports_further = False

    @abstractmethod
    def plan(self, grid: Grid, seeds: Sequence[int]) -> Plan:
        """The models for these seeds."""

    @abstractmethod
    def report(self, plan: Plan, store: Store) -> Document:
        """What the finished cells say."""


def every_path(grid: Grid, methods: Sequence[MethodSpec], seeds: Sequence[int]) -> Plan:
    """For every seed the references and every method's whole path, further suites included."""
    found: list[Model] = []
    for seed in seeds:
        found += grid.references(seed)
        for method in methods:
            found += grid.models(method, seed)
    return Plan([grid.reporting(model) for model in found], notes=notes_on(grid, methods))


def notes_on(grid: Grid, methods: Sequence[MethodSpec]) -> list[str]:
    """What a page must say of experts and methods before anything is computed."""
    found = [note for method in methods for note in fewer_rows(grid.recipe, method)]
    if own := [method.name for method in methods if method.rows is not None and method.train in (None, "core")]:
        found.append(
            f"{', '.join(map(called, own))}: the safety expert has learnt further rows; the model named safety has not."
        )
    experts = {"utility": grid.recipe.utility, "safety": grid.recipe.safety}
    if given := [f"{name} ({one.adapter})" for name, one in experts.items() if one is not None and one.adapter]:
        found.append(f"Given adapters, the same for every seed: {', '.join(given)}.")
    return found


def rows_note(points: Mapping[str, Sequence[Model]]) -> list[str]:
    """Which files of rows each method reads beside those of the experts' trainings: not all know as much."""
    first = [models[0] for models in points.values() if models[0].made is not None]
    experts = {model.made.key: model.made for model in first if model.method in REFERENCES and model.made is not None}
    usual = {name for cell in experts.values() for name in _files(cell)}
    read: dict[str, list[str]] = {}
    for model in first:
        if model.method not in REFERENCES and model.method not in read and model.made is not None:
            cells = [cell for cell in closure([model.made]) if cell.key not in experts]
            files = dict.fromkeys(name for cell in cells for name in _files(cell))
            read[model.method] = [name for name in files if name not in usual]
    groups: dict[tuple[str, ...], list[str]] = {}
    for method, names in read.items():
        groups.setdefault(tuple(names), []).append(method)
    said = "; ".join(
        f"{', '.join(map(called, methods))}: {', '.join(names) or 'none'}" for names, methods in groups.items()
    )
    return [f"Files that methods read beside those of the experts' trainings. {said}."] if len(groups) > 1 else []


def _files(cell: Cell) -> list[str]:
    """Names of the files that a training or Fisher passes learn."""
    data = [cell.settings["data"].get(key) for key in ROWS[cell.stage] if key != "val"]
    return [PurePath(source.path).name for rows in data if rows is not None for source in sources(rows)]


def name_of(model: Model) -> str:
    """A point of a path, apart from its seed."""
    return at_strength(model.method, model.strength)


def finished(models: Sequence[Model], store: Store) -> tuple[dict[str, list[Model]], list[str]]:
    """Points of which every seed is known, by name, and a note on those that are left out."""
    points: dict[str, list[Model]] = {}
    for model in models:
        points.setdefault(name_of(model), []).append(model)
    whole = {
        name: seeds
        for name, seeds in points.items()
        if all(store.has_result(cell) for model in seeds for cell in model.tests)
    }
    return whole, left_out([name for name in points if name not in whole], len(points))


def left_out(names: Sequence[str], total: int) -> list[str]:
    """The note on points that a report does not show; none where it shows all."""
    if not names:
        return []
    strengths: dict[str, list[str]] = {}
    for method, strength in map(method_and_strength, names[1:]):
        strengths.setdefault(method, []).append(strength)
    others = "; ".join(
        f"{method} @ {', '.join(found)}" if any(found) else method for method, found in strengths.items()
    )
    others = f", and so are {others}" if others else ""
    return [f"{names[0]} is left out{others}: not computed or failed ({len(names)} of {total} points)."]


def records(points: Mapping[str, Sequence[Model]], store: Store) -> dict[str, list[Record]]:
    """What the models of points answered, one record per seed."""
    return {name: [answered(model, store) for model in seeds] for name, seeds in points.items()}


def answered(model: Model, store: Store) -> Record:
    """What a model answered, in its first suites and in those that only report."""
    return joined(store.read(model.test), [store.read(cell) for cell in model.further])


def further_note(models: Sequence[Model]) -> list[str]:
    """The note on suites whose rows all report; none where there are none."""
    cells = [cell for model in models for cell in model.further]
    names = dict.fromkeys(suite["name"] for cell in cells for suite in cell.settings["data"]["suites"])
    if not names:
        return []
    said = ", ".join(names)
    return [f"No strength was chosen on suites that only report ({said}): all of their rows are test rows."]


def paths(points: Mapping[str, Sequence[Model]]) -> dict[str, list[str]]:
    """Method to the names of its points, in the order of the path."""
    found: dict[str, list[str]] = {}
    for name, seeds in points.items():
        found.setdefault(seeds[0].method, []).append(name)
    return found


def curves(found: Mapping[str, Sequence[str]], methods: Sequence[MethodSpec]) -> dict[str, list[str]]:
    """Every method's path (:func:`paths`) from the utility expert on, as far as it begins there."""
    begins = {method.name: method.train != "beside_safety" for method in methods}
    start = found.get("utility", ())
    return {name: [*(start if begins[name] else ()), *points] for name, points in found.items() if name in begins}


def of_methods(points: Mapping[str, Sequence[Model]]) -> dict[str, list[Model]]:
    """Method to all its models, without base and experts."""
    found: dict[str, list[Model]] = {}
    for seeds in points.values():
        if seeds[0].method not in REFERENCES:
            found.setdefault(seeds[0].method, []).extend(seeds)
    return found


def check_names(methods: Sequence[MethodSpec]) -> None:
    """Stop where two methods share a name, or take one of a reference."""
    names = [method.name for method in methods]
    if not names or len(set(names)) < len(names) or set(names) & set(REFERENCES):
        raise InputError(f"methods: names are {', '.join(names) or 'none'}; expected different ones, not {REFERENCES}")
    points = [at_strength(method.name, method.shown(value)) for method in methods for value in method.strength.values]
    if twice := sorted({name for name in points if points.count(name) > 1}):
        raise InputError(f"methods: two points are called {', '.join(twice)}; expected different names and strengths")
    for method in methods:
        method.check()


def only_named(methods: list[MethodSpec], only: Sequence[str] | None) -> list[MethodSpec]:
    """The methods of these names, in the order of the list; all where no name is given.

    Raises:
        InputError: a name is no method's.
    """
    unknown = set(only or ()) - {method.name for method in methods}
    if unknown:
        names = ", ".join(called(method.name) for method in methods)
        raise InputError(f"study.only names {', '.join(map(called, sorted(unknown)))}; expected some of: {names}")
    return [method for method in methods if not only or method.name in only]


def aside_note(every: Sequence[MethodSpec], shown: Sequence[MethodSpec]) -> list[str]:
    """The note on methods that a study has and a page leaves out; none where it shows all."""
    names = [method.name for method in shown]
    aside = [method.name for method in every if method.name not in names]
    if not aside:
        return []
    return [
        f"Of {len(every)} methods {len(names)} are shown, and p-values are adjusted for these alone; the "
        f"others are {', '.join(map(called, aside))}."
    ]
