"""What cells are told, read before the first is computed: rows as their commands read them, settings by their parsers.

A command would refuse them only once it is reached: an evaluation after all trainings.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from importlib import import_module
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

from src.adapters.peft_files import read_base
from src.data.row_source import RowSource
from src.data.sources import load_rows, refuse_options
from src.data.suite import Suite
from src.errors import InputError
from src.experiments.cell import Cell, digest
from src.experiments.cell_stages import Stages
from src.experiments.content import ROWS, SUITE_ROWS, sources
from src.experiments.grid import Grid
from src.experiments.learnt_rows import check_learnt_rows, local_sources, suite_rows
from src.experiments.plain_settings import plain
from src.experiments.recipe import Recipe
from src.experiments.store import Store
from src.models.base import check_trained_on

TOLD = ("fit", "fisher", "test")
"""Stages that are told rows, and settings nested as in their YAML; those of the others are typed."""
Rows = RowSource | dict[str, Any]
"""A source without its seed, or a suite as plain values."""


class _Taken(Exception):
    """A parser has taken its arguments."""


def check_first(todo: Sequence[Cell], grid: Grid, seed: int) -> None:
    """Stop at rows and settings that a command would refuse.

    Rows are read where their file is here: data sets of the hub are not fetched. Of cells that differ in nothing but
    rows and seeds one is parsed.

    Args:
        todo: Cells to compute, what is needed first.
        grid: What made them.
        seed: One of its seeds.

    Raises:
        InputError: a command would refuse some; the message begins with their place in the study.
    """
    told = [cell for cell in todo if cell.stage in TOLD]
    _check_adapters(todo, grid.recipe)
    _check_rows(told, todo, grid.recipe)
    _check_settings(told, todo, grid, seed)
    check_learnt_rows(todo)


def _check_adapters(todo: Sequence[Cell], recipe: Recipe) -> None:
    """Stop at adapters of another base, as far as their files tell; those of the hub are not fetched."""
    names = dict.fromkeys(cell.settings["adapter"] for cell in todo if cell.stage == "given")
    given = [read_base(name) for name in names if Path(name).is_dir()]
    check_trained_on(given, recipe.base, option="--recipe.base.aliases")


def _check_rows(told: Sequence[Cell], todo: Sequence[Cell], recipe: Recipe) -> None:
    seen: set[str] = set()
    for cell in told:
        for rows in _rows(cell):
            if f"{cell.stage} {rows}" in seen:
                continue
            seen.add(f"{cell.stage} {rows}")
            try:
                _read(cell.stage, rows)
            except InputError as error:
                places = (name for name, known in _rows_of_recipe(recipe) if known == rows)
                raise InputError(f"{next(places, _label_of_use(cell, todo))}: {error}") from None


def _check_settings(told: Sequence[Cell], todo: Sequence[Cell], grid: Grid, seed: int) -> None:
    distinct = {_alike(cell): cell for cell in reversed(told)}
    with TemporaryDirectory() as folder:
        for alike, cell in reversed(distinct.items()):
            try:
                Stages(Store(Path(folder), Path(folder)), None, _parse)([cell])
            except _Taken:
                continue
            except InputError as error:
                other = f"{_label_of_use(cell, todo)}: settings of {cell.stage}"
                places = (
                    f"{name}.settings"
                    for name, own in _cells_of_recipe(grid, seed)
                    if own.stage in TOLD and _alike(own) == alike
                )
                raise InputError(f"{next(places, other)}: {error}") from None


def _rows(cell: Cell) -> Iterator[Rows]:
    """The sources and suites of a cell."""
    data = cell.settings["data"]
    for key in ROWS[cell.stage]:
        yield from _sources(data.get(key))
    yield from data.get("suites", ())


def _sources(value: Any) -> list[RowSource]:
    return [replace(source, seed=None) for source in sources(value)] if value is not None else []


def _read(stage: str, rows: Rows) -> None:
    """Read rows as the command of a stage does."""
    if isinstance(rows, RowSource):
        if stage == "fit":
            refuse_options(rows, "Fisher passes", "weight")
        if local_sources(rows):
            load_rows(rows, need_response=True)
        return
    # The seed says which rows are asked, and some may be broken: it stays.
    found, examples = suite_rows(rows), rows.get("few_shot")
    if found and examples is not None and len(local_sources(examples)) == len(sources(examples)):
        options = {key: value for key, value in rows.items() if key not in ("judge", *SUITE_ROWS)}
        Suite(**options, rows=rows["rows"], few_shot=[*sources(examples)]).worked([*found])


def _parse(arguments: Sequence[str], _log_file: Path) -> NoReturn:
    """Let a command's parser read its arguments, as ``--print_config`` does: nothing is made of them.

    Raises:
        InputError: it refuses some.
        _Taken: it does not.
    """
    # By its name, as where it is run: a study knows commands from outside.
    runner = import_module("src.cli").runner
    try:
        with redirect_stdout(StringIO()):
            runner(arguments[0])([*arguments[1:], "--print_config"])
    except SystemExit:
        pass
    raise _Taken


def _alike(cell: Cell) -> str:
    """Digest of a cell's settings without rows and seeds."""
    settings = dict(cell.settings)
    rows = ("suites", *ROWS[cell.stage])
    settings["data"] = _steady({key: value for key, value in settings["data"].items() if key not in rows})
    settings["model"] = _steady(settings["model"])
    return digest([cell.stage, _steady(settings)])


def _steady(settings: Mapping[str, Any]) -> dict[str, Any]:
    seeds = ("seed", "seed_everything")
    return {key: value for key, value in settings.items() if not (key in seeds and isinstance(value, int))}


def _rows_of_recipe(recipe: Recipe) -> Iterator[tuple[str, Rows]]:
    """Rows of a recipe with their places."""
    for name, spec in (("utility", recipe.utility), ("safety", recipe.safety), ("fisher", recipe.fisher)):
        for key in () if spec is None else ROWS["fisher" if name == "fisher" else "fit"]:
            yield from ((f"recipe.{name}.{key}", source) for source in _sources(getattr(spec, key)))
    for suite in (*recipe.evaluation.suites, *recipe.evaluation.further):
        yield "recipe.evaluation", plain(suite)


def _cells_of_recipe(grid: Grid, seed: int) -> Iterator[tuple[str, Cell]]:
    """Cells with the settings of a recipe alone, with their places."""
    recipe, safety = grid.recipe, grid.safety(seed)
    if recipe.utility is not None:
        yield "recipe.utility", grid.utility(seed)
    yield "recipe.safety", safety
    if recipe.fisher is not None:
        yield "recipe.fisher", grid.fisher([], safety, seed, {})
    yield "recipe.evaluation", grid.test(None, "base")


def _label_of_use(cell: Cell, todo: Sequence[Cell]) -> str:
    """The label of what a cell is computed for: of a merge or an evaluation."""
    for other in todo:
        if cell.stage in ("fit", "fisher") and cell.key in [parent.key for parent in other.parents]:
            return _label_of_use(other, todo)
    return cell.label
