"""From a recipe to cells: which settings and which other cells each step of the pipeline is made from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from src.errors import InputError
from src.experiments.cell import Cell, digest
from src.experiments.content import count_rows, plain_source, redrawn, sources
from src.experiments.settings import (
    ExpertSpec,
    MethodSpec,
    Recipe,
    at_path,
    layered,
    plain,
    plain_base,
    read_config,
)
from src.merge.base import MergeMethod
from src.merge.settings import with_option

SAFETY_ROWS = "safety_rows"


@dataclass(frozen=True)
class Model:
    """One model of a study: a point of a method's path.

    Attributes:
        method: The method's name, or ``base``, ``utility``, ``safety``.
        strength: Its strength; nothing for models without one.
        seed: The seed of everything that went in.
        test: The cell with its evaluation.
        made: The cell with its weights; nothing for the base.
    """

    method: str
    strength: float | None
    seed: int
    test: Cell
    made: Cell | None


class Grid:
    """Makes the cells of a recipe.

    Args:
        recipe: The recipe.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def expert(self, spec: ExpertSpec, seed: int, label: str, over: Mapping[str, Any] | None = None) -> Cell:
        """Training of an expert."""
        return self._fit(spec, plain_sources(spec.train), seed, label, over or {})

    def _fit(self, spec: ExpertSpec, train: list[Any], seed: int, label: str, over: Mapping[str, Any]) -> Cell:
        lower = layered(read_config(spec.config), spec.settings)
        fixed = {
            "seed_everything": seed,
            "model": {"base": plain_base(self.recipe.base)},
            "data": {"train": train, "val": plain_sources(spec.val), "seed": seed},
        }
        settings = layered(layered(lower, fixed), over)
        rows = count_rows(settings["data"]["train"])
        units = None if rows is None else float(rows * settings.get("trainer", {}).get("max_epochs", 1))
        return Cell("fit", f"{label}, seed {seed}", settings, units=units)

    def utility(self, seed: int) -> Cell:
        """The utility expert.

        Raises:
            InputError: the recipe has none.
        """
        if self.recipe.utility is None:
            raise InputError("recipe.utility: this study needs a utility expert")
        return self.expert(self.recipe.utility, seed, "utility")

    def safety(self, seed: int, over: Mapping[str, Any] | None = None) -> Cell:
        """The safety expert."""
        return self.expert(self.recipe.safety, seed, "safety", over)

    def fisher(self, utility: Sequence[Cell], safety: Cell, seed: int, over: Mapping[str, Any]) -> Cell:
        """Both Fisher passes.

        Raises:
            InputError: the recipe does not say on which rows.
        """
        spec = self.recipe.fisher
        if spec is None:
            raise InputError("recipe.fisher: a method of this study needs Fisher files; name their rows")
        lower = layered(read_config(spec.config), spec.settings)
        lower["model"] = {key: value for key, value in lower["model"].items() if key not in ("utility", "safety")}
        rows = {"safety": plain_sources(spec.safety), "utility": plain_sources(spec.utility)}
        fixed = {"model": {"base": plain_base(self.recipe.base), "seed": seed}, "data": rows}
        settings = layered(layered(lower, fixed), over)
        for side in rows:
            settings["data"][side] = redrawn(settings["data"][side], seed, self._trained_on())
        counts = [count_rows(settings["data"][side]) for side in rows]
        units = None if None in counts else float(sum(count or 0 for count in counts))
        needs = {"utility": tuple(utility), "safety": (safety,)}
        return Cell("fisher", f"Fisher, seed {seed}", settings, needs, units=units)

    def _trained_on(self) -> set[str]:
        """Files that experts are trained on."""
        specs = [spec for spec in (self.recipe.utility, self.recipe.safety) if spec is not None]
        return {source.path for spec in specs for rows in (spec.train, spec.val) for source in sources(rows)}

    def merges(self, spec: MethodSpec, utility: Sequence[Cell], safety: Cell, seed: int) -> list[tuple[float, Cell]]:
        """Merges over a method's whole path: strength and cell."""
        spec.check()
        method = None if spec.method is None else seeded(spec.method, seed)
        needs: dict[str, tuple[Cell, ...]] = {"utility": tuple(utility)}
        if method is not None and method.needs_safety:
            needs["safety"] = (safety,)
        if method is not None and method.needs_fisher:
            needs["fisher"] = (self.fisher(utility, safety, seed, spec.fisher),)
        settings: dict[str, Any] = {"method": method, "combine": spec.combine, "rank": spec.rank, "energy": spec.energy}
        settings = {key: plain(value) for key, value in settings.items() if value is not None}
        parents = {role: [c.key for c in cells] for role, cells in needs.items()}
        batch = digest([settings, spec.strength.option, parents])
        found = []
        for value in spec.strength.values:
            strength = {"option": spec.strength.option, "value": value}
            label = f"{title(spec.name, value, spec)}, seed {seed}"
            found.append((value, Cell("merge", label, settings | {"strength": strength}, needs, batch, 1.0)))
        return found

    def trained(self, spec: MethodSpec, seed: int) -> list[tuple[float, Cell]]:
        """Adapters trained on utility rows, with safety rows among them: strength and cell."""
        spec.check()
        expert = self.recipe.utility
        if expert is None:
            raise InputError(f"method {spec.name}: train needs recipe.utility")
        found = []
        for value in spec.strength.values:
            train, over = list(plain_sources(expert.train)), spec.settings
            if spec.strength.option not in (SAFETY_ROWS, "none"):
                over = layered(over, at_path(spec.strength.option, value))
            if spec.train == "mixed":
                limit = int(value) if spec.strength.option == SAFETY_ROWS else None
                train += _drawn(self.recipe.safety.train, limit, seed)
            found.append((value, self._fit(expert, train, seed, title(spec.name, value, spec), over)))
        return found

    def test(self, made: Cell | None, label: str, suites: list[dict[str, Any]] | None = None) -> Cell:
        """Evaluation of the model that a cell made, or of the bare base."""
        evaluation = self.recipe.evaluation
        asked = [plain(suite) for suite in evaluation.suites] if suites is None else suites
        fixed = {"model": {"base": plain_base(self.recipe.base)}, "data": {"suites": asked}}
        settings = layered(evaluation.settings, fixed)
        needs = {"adapter": (made,)} if made is not None else {}
        return Cell("test", label, settings, needs, batch=digest(settings), units=_answers(asked))

    def models(self, spec: MethodSpec, seed: int) -> list[Model]:
        """Every point of a method's path, evaluated, on the recipe's utility and safety experts."""
        if spec.train is not None:
            made = self.trained(spec, seed)
        else:
            made = self.merges(spec, [self.utility(seed)], self.safety(seed), seed)
        return [Model(spec.name, value, seed, self.test(cell, cell.label), cell) for value, cell in made]

    def references(self, seed: int) -> list[Model]:
        """Base, utility expert and safety expert. The base is the same cell for every seed."""
        base = Model("base", None, seed, self.test(None, "base"), None)
        experts = [("utility", self.utility(seed)), ("safety", self.safety(seed))]
        return [base, *(Model(name, None, seed, self.test(cell, cell.label), cell) for name, cell in experts)]


def plain_sources(value: Any) -> list[dict[str, Any]]:
    """Sources as plain mappings."""
    return [plain_source(source) for source in sources(value)]


def seeded(method: MergeMethod, seed: int) -> MergeMethod:
    """The method with its own draws (masks, random subspaces) for this seed, where it has any."""
    own = getattr(method, "seed", None)
    return method if own is None else with_option(method, "seed", own + seed)


def title(name: str, value: float, spec: MethodSpec) -> str:
    """``TIES, alpha = 0.5``."""
    return name if spec.strength.option == "none" else f"{name}, {spec.strength.option} = {value:g}"


def _drawn(rows: Any, limit: int | None, seed: int) -> list[dict[str, Any]]:
    """So many rows of sources, shared out between them; whole files are shuffled by the seed, parts of files stay."""
    found = sources(rows)
    if limit is None:
        return [plain_source(source) for source in found]
    share = [limit // len(found) + (i < limit % len(found)) for i in range(len(found))]
    drawn = [
        replace(s, seed=seed if s.seed is None else s.seed, limit=n if s.limit is None else min(n, s.limit))
        for s, n in zip(found, share, strict=True)
        if n
    ]
    return [plain_source(source) for source in drawn]


def _answers(suites: Sequence[Mapping[str, Any]]) -> float | None:
    """Tokens that an evaluation decodes at most, with a row that is only scored counting as one."""
    total = 0
    for suite in suites:
        rows = count_rows(suite["rows"])
        if rows is None:
            return None
        generates = suite.get("generate", True) and suite["kind"] != "choice"
        total += rows * (suite.get("max_new_tokens", 32) if generates else 1)
    return float(total)
