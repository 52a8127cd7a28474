"""Methods that train, as cells: mixed rows, beside the safety expert, and the safety expert's core alone."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from src.errors import InputError
from src.experiments.cell import Cell
from src.experiments.content import count_rows, plain_sources, sources
from src.experiments.plain_settings import at_path, layered, plain
from src.experiments.recipe import Recipe
from src.experiments.settings import SAFETY_ROWS, MethodSpec
from src.merge.combinations.concatenate import Concatenate

if TYPE_CHECKING:
    from src.experiments.grid import Grid


def trained(grid: "Grid", spec: MethodSpec, seed: int) -> list[tuple[float, Cell]]:
    """Adapters of a method that trains: strength and cell."""
    return [(value, _trained(grid, spec, value, seed)) for value in spec.strength.values]


def _trained(grid: "Grid", spec: MethodSpec, value: float, seed: int) -> Cell:
    expert = grid.recipe.utility
    if expert is None:
        raise InputError(f"method {spec.name}: train needs recipe.utility")
    over, label = spec.settings, spec.title(value)
    train = grid.rows(expert.training_rows(f"{label}: recipe.utility")[0], seed)
    if spec.rows is not None:
        train += grid.drawn_anew(plain_sources(spec.rows), seed)
    if spec.strength.option not in (SAFETY_ROWS, "none"):
        over = layered(over, at_path(spec.strength.option, value))
    if spec.train == "beside_safety":
        return _beside_safety(grid, spec, train, seed, label, over)
    if spec.train == "mixed":
        limit = int(value) if spec.strength.option == SAFETY_ROWS else None
        refusals, _ = grid.recipe.safety.training_rows(f"{label}: recipe.safety")
        train += _drawn(grid.rows(refusals, seed), limit, seed)
    return grid.fit(expert, train, seed, label, over)


def _beside_safety(
    grid: "Grid", spec: MethodSpec, train: list[Any], seed: int, label: str, over: Mapping[str, Any]
) -> Cell:
    """The sum of the safety expert and of what is trained beside it."""
    expert, safety = grid.recipe.utility, grid.safety(seed)
    assert expert is not None
    needs = {"beside": (safety,)}
    if "regularizer" in over.get("model", {}):
        there = {"reference_safety": {"safety": 1.0}, "reference_utility": {"safety": 1.0}, "relearn": False}
        needs["fisher"] = (grid.fisher([safety], safety, seed, layered({"model": there}, spec.fisher)),)
    trained = grid.fit(expert, train, seed, label, over, needs)
    settings = {"combine": plain(Concatenate()), "strength": {"option": "none", "value": 1.0}}
    return Cell("merge", f"{label}, seed {seed}", settings, {"utility": (trained, safety)}, trained.key, 1.0)


def tuned_core(grid: "Grid", spec: MethodSpec, utility: Cell, safety: Cell, seed: int) -> Cell:
    """The safety expert with its core fine-tuned on the rows of the Fisher passes, beside the utility expert.

    Raises:
        InputError: the recipe does not say on which rows.
    """
    fisher, expert = grid.recipe.fisher, grid.recipe.utility
    if fisher is None or expert is None:
        raise InputError(f"method {spec.name}: train core needs recipe.fisher and recipe.utility")
    drawn = [row for rows in (fisher.safety, fisher.utility) for row in grid.drawn_anew(plain_sources(rows), seed)]
    # Weights are for Fisher passes; fit refuses them.
    train: Any = [{key: value for key, value in row.items() if key != "weight"} for row in drawn]
    # The checkpoint is chosen on rows of both kinds, as the rows are that it trains on.
    label = f"{spec.name}, core"
    experts = {"safety": grid.recipe.safety, "utility": expert}
    vals = [one.training_rows(f"{label}: recipe.{name}")[1] for name, one in experts.items()]
    chosen_by: Any = [row for val in vals for row in sources(val)]
    both = replace(grid.recipe.safety, train=train, val=chosen_by)
    return grid.fit(both, train, seed, label, spec.settings, {"core": (safety,), "beside": (utility,)})


def fewer_rows(recipe: Recipe, spec: MethodSpec) -> list[str]:
    """Notes on strengths of mixed training that sources without enough rows do not reach."""
    if spec.train != "mixed" or spec.strength.option != SAFETY_ROWS:
        return []
    refusals, _ = recipe.safety.training_rows(f"{spec.name}: recipe.safety")
    counts = {value: count_rows(_drawn(refusals, int(value), 0)) for value in spec.strength.values}
    short = [f"@ {spec.shown(v):g} has {n}" for v, n in counts.items() if n is not None and n < v]
    where = "each source gives an equal share, as far as it has so many"
    return [f"{spec.name} {', '.join(short)} safety rows: {where}."] if short else []


def _drawn(rows: Any, limit: int | None, seed: int) -> list[dict[str, Any]]:
    """So many rows of sources, an equal share of each as far as it has so many.

    Whole files are shuffled by the seed, parts of files stay.
    """
    found = sources(rows)
    if limit is None:
        return [plain(source) for source in found]
    share = [limit // len(found) + (i < limit % len(found)) for i in range(len(found))]
    drawn = [
        replace(s, seed=seed if s.seed is None else s.seed, limit=n if s.limit is None else min(n, s.limit))
        for s, n in zip(found, share, strict=True)
        if n
    ]
    return [plain(source) for source in drawn]
