"""From a recipe to cells: which settings and which other cells each step of the pipeline is made from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from src.errors import InputError
from src.experiments.cell import Cell, digest
from src.experiments.content import all_redrawn, count_rows, place, plain_sources, redrawn, sources
from src.experiments.plain_settings import layered, plain, plain_base, read_config
from src.experiments.recipe import ExpertSpec, Recipe
from src.experiments.settings import BASE_FISHER, MethodSpec, Strengths
from src.experiments.trainings import trained, tuned_core
from src.merge.settings import Method, with_option

AT_BASE = {"model": {"reference_safety": "base", "reference_utility": "base"}}
"""Settings of Fisher passes at the base, for methods that compare the experts with it."""
UTILITY = "utility"
SAFETY = "safety"


@dataclass(frozen=True)
class Model:
    """One model of a study: a point of a method's path.

    Attributes:
        method: The method's name (``TIES (8)`` where it merges so many experts), or ``base``, ``utility``, ``safety``,
            ``expert NAME``.
        strength: Its strength; nothing for models without one.
        seed: The seed of everything that went in.
        test: The cell with its evaluation.
        made: The cell with its weights; nothing for the base.
        further: The cells with its answers to the suites that only report, one for each.
        experts: How many utility experts it merges, where a study varies that.
    """

    method: str
    strength: float | None
    seed: int
    test: Cell
    made: Cell | None
    further: tuple[Cell, ...] = ()
    experts: int | None = None

    @property
    def tests(self) -> list[Cell]:
        """Its evaluations."""
        return [self.test, *self.further]


class Grid:
    """Makes the cells of a recipe.

    Args:
        recipe: The recipe.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._redraws_experts = recipe.redraw == "experts"

    def expert(self, spec: ExpertSpec, seed: int, label: str, over: Mapping[str, Any] | None = None) -> Cell:
        """Training of an expert, or one that is there.

        Raises:
            InputError: it is there, and ``over`` has settings of a training.
        """
        if spec.adapter is None:
            return self.fit(spec, self.rows(spec.training_rows(label)[0], seed), seed, label, over or {}, own=label)
        if over:
            raise InputError(f"{label}: adapter {spec.adapter} is there, and {', '.join(over)} is of a training")
        return Cell("given", f"{label}, given", {"adapter": spec.adapter})

    def rows(self, value: Any, seed: int) -> list[dict[str, Any]]:
        """Rows that an expert of this seed is trained on, or chosen by."""
        return all_redrawn(value, seed) if self._redraws_experts else plain_sources(value)

    def fit(
        self,
        spec: ExpertSpec,
        train: list[Any],
        seed: int,
        label: str,
        over: Mapping[str, Any],
        needs: Mapping[str, tuple[Cell, ...]] | None = None,
        own: str = UTILITY,
    ) -> Cell:
        """Training on given rows, of an expert otherwise as told.

        ``needs`` are cells whose weights go into it; ``own`` is whose initial weights it has, where experts have some
        of their own.
        """
        lower = layered(read_config(spec.config), spec.settings)
        fixed: dict[str, Any] = {
            "seed_everything": seed,
            "model": {"base": plain_base(self.recipe.base)},
            "data": {"train": train, "val": self.rows(spec.training_rows(label)[1], seed), "seed": seed},
        }
        if self._redraws_experts:
            fixed["model"]["seed"] = int(digest([own, seed])[:7], 16)
        settings = layered(layered(lower, fixed), over)
        for key in over.get("data", {}).keys() & {"train", "val"}:
            settings["data"][key] = self.rows(settings["data"][key], seed)
        rows, epochs = count_rows(settings["data"]["train"]), _epochs(settings, label)
        units = None if rows is None or epochs is None else float(rows * epochs)
        return Cell("fit", f"{label}, seed {seed}", settings, needs or {}, units=units)

    def utility(self, seed: int) -> Cell:
        """The utility expert.

        Raises:
            InputError: the recipe has none.
        """
        if self.recipe.utility is None:
            raise InputError("recipe.utility: this study needs a utility expert")
        return self.expert(self.recipe.utility, seed, UTILITY)

    def safety(self, seed: int, over: Mapping[str, Any] | None = None, spec: MethodSpec | None = None) -> Cell:
        """The safety expert; that of a method, which has learnt its ``rows`` too, where it has any."""
        expert = self.recipe.safety
        if spec is None or spec.rows is None:
            return self.expert(expert, seed, SAFETY, over)
        label = f"{spec.name}, safety"
        train = [*self.rows(expert.training_rows(label)[0], seed), *self.drawn_anew(plain_sources(spec.rows), seed)]
        return self.fit(expert, train, seed, label, over or {}, own=SAFETY)

    def fisher(
        self, utility: Sequence[Cell], safety: Cell, seed: int, over: Mapping[str, Any], first: Cell | None = None
    ) -> Cell:
        """Both Fisher passes, F_s at a first step's merge where there is one.

        Raises:
            InputError: the recipe does not say on which rows.
        """
        spec = self.recipe.fisher
        if spec is None:
            raise InputError("recipe.fisher: a method of this study needs Fisher files; name their rows")
        lower = layered(read_config(spec.config), spec.settings)
        model = lower.get("model") or {}
        lower["model"] = {key: value for key, value in model.items() if key not in ("utility", "safety")}
        rows = {"safety": plain_sources(spec.safety), "utility": plain_sources(spec.utility)}
        fixed = {"model": {"base": plain_base(self.recipe.base), "seed": seed}, "data": rows}
        settings = layered(layered(lower, fixed), over)
        for side in rows:
            settings["data"][side] = self.drawn_anew(settings["data"][side], seed)
        counts = [count_rows(settings["data"][side]) for side in rows]
        units = None if None in counts else float(sum(count or 0 for count in counts))
        needs = {"utility": tuple(utility), "safety": (safety,)} | ({} if first is None else {"first": (first,)})
        label = "Fisher" if first is None else f"Fisher at {first.label.rpartition(', seed')[0]}"
        return Cell("fisher", f"{label}, seed {seed}", settings, needs, units=units)

    def drawn_anew(self, rows: Any, seed: int) -> list[dict[str, Any]]:
        """Calibration rows of this seed; files that experts are trained on keep their parts."""
        if self._redraws_experts:
            return all_redrawn(rows, seed)
        taken = {place(source) for part in self.recipe.learnt for source in sources(part)}
        return redrawn(rows, seed, taken)

    def merges(self, spec: MethodSpec, utility: Sequence[Cell], safety: Cell, seed: int) -> list[tuple[float, Cell]]:
        """Merges over a method's whole path: strength and cell."""
        spec.check()
        method = None if spec.method is None else seeded(spec.method, seed)
        combine = spec.combine
        if combine is not None and all(cell.stage == "given" for cell in utility):
            combine = seeded(combine, seed)  # experts of a seed's own have masks of their own
        needs: dict[str, tuple[Cell, ...]] = {"utility": tuple(utility)}
        if method is not None and method.needs_safety:
            needs["safety"] = (safety,)
        if method is not None and method.needs_fisher:
            over = layered(_mean_point(spec, utility), spec.fisher)
            needs["fisher"] = (self.fisher(utility, safety, seed, over, self._first(spec, utility, safety, seed)),)
            if method.beside_base:
                at_base = self.fisher(utility, safety, seed, layered(over, AT_BASE))
                needs[BASE_FISHER] = (replace(at_base, label=f"Fisher at the base, seed {seed}"),)
        settings: dict[str, Any] = {"method": method, "combine": combine, "rank": spec.rank, "energy": spec.energy}
        settings = {key: plain(value) for key, value in settings.items() if value is not None}
        parents = {role: [c.key for c in cells] for role, cells in needs.items()}
        batch = digest([settings, spec.strength.option, parents])
        found = []
        for value in spec.strength.values:
            strength = {"option": spec.strength.option, "value": value}
            label = f"{spec.title(value)}, seed {seed}"
            found.append((value, Cell("merge", label, settings | {"strength": strength}, needs, batch, 1.0)))
        return found

    def _first(self, spec: MethodSpec, utility: Sequence[Cell], safety: Cell, seed: int) -> Cell | None:
        """The merge of a method's first step."""
        if spec.first is None:
            return None
        path, title = Strengths("alpha", [spec.first.alpha]), f"{spec.name}, first step"
        fisher = spec.fisher if spec.first.method.needs_fisher else {}
        before = MethodSpec(title, spec.first.method, spec.combine, path, fisher=fisher, first=spec.first.first)
        return self.merges(before, utility, safety, seed)[0][1]

    def test(self, made: Cell | None, label: str, suites: list[dict[str, Any]] | None = None) -> Cell:
        """Evaluation of the model that a cell made, or of the bare base."""
        evaluation = self.recipe.evaluation
        asked = [plain(suite) for suite in evaluation.suites] if suites is None else suites
        fixed = {"model": {"base": plain_base(self.recipe.base)}, "data": {"suites": asked}}
        settings = layered(evaluation.settings, fixed)
        needs = {"adapter": (made,)} if made is not None else {}
        return Cell("test", label, settings, needs, batch=digest(settings), units=_answers(asked))

    def reporting(self, model: Model) -> Model:
        """The model with its answers to the recipe's further suites, a cell for each: more of them undo none."""
        suites = [plain(suite) for suite in self.recipe.evaluation.further]
        cells = [self.test(model.made, f"{model.test.label}, {suite['name']}", [suite]) for suite in suites]
        return replace(model, further=tuple(cells))

    def models(self, spec: MethodSpec, seed: int) -> list[Model]:
        """Every point of a method's path, evaluated, on the recipe's utility and safety experts."""
        if spec.train not in (None, "core"):
            made = trained(self, spec, seed)
        else:
            utility, safety = self.utility(seed), self.safety(seed, spec=spec)
            patch = safety if spec.train is None else tuned_core(self, spec, utility, safety, seed)
            made = self.merges(spec, [utility], patch, seed)
        return [Model(spec.name, spec.shown(value), seed, self.test(cell, cell.label), cell) for value, cell in made]

    def references(self, seed: int) -> list[Model]:
        """Base, utility expert and safety expert. The base is the same cell for every seed."""
        base = Model("base", None, seed, self.test(None, "base"), None)
        experts = [("utility", self.utility(seed)), ("safety", self.safety(seed))]
        return [base, *(Model(name, None, seed, self.test(cell, cell.label), cell) for name, cell in experts)]


def _mean_point(spec: MethodSpec, utility: Sequence[Cell]) -> dict[str, Any]:
    """Settings of a Fisher pass at the mean of several experts, where a method averages them.

    Raises:
        InputError: its experts are no sum, and passes would measure at another model than the patch is added to.
    """
    plain_sum = [1.0] * len(utility)
    weights = plain_sum if spec.combine is None else spec.combine.sum_weights(plain_sum)
    if weights is None:
        raise InputError(
            f"method {spec.name}: combine is {type(spec.combine).__name__}, and Fisher passes measure at a plain sum "
            "of the experts; expected TaskArithmetic, Linear or Concatenate"
        )
    return {} if weights == plain_sum else {"model": {"utility_weights": weights}}


def seeded(method: Method, seed: int) -> Method:
    """The method or combination with its own draws (masks, random subspaces) for this seed, where it has any."""
    own = getattr(method, "seed", None)
    return method if own is None else with_option(method, "seed", own + seed)


def _epochs(settings: Mapping[str, Any], label: str) -> int | None:
    """Epochs of a training; unknown where something else ends it.

    Raises:
        InputError: they are no number.
    """
    trainer = settings.get("trainer")
    found = trainer.get("max_epochs", 1) if isinstance(trainer, Mapping) else 1
    if found in (None, -1):
        return None
    if type(found) is not int:
        raise InputError(f"settings of {label}: trainer.max_epochs is {found!r}; expected a whole number")
    return found


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
