"""Ablations: one method, one setting changed at a time, on validation rows only (defaults are chosen here)."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from src.errors import InputError
from src.experiments.comparison import AT_CHOSEN, CLAIMED, Choice, check_choice, chosen_point, front_note, summary
from src.experiments.costs import cost_table
from src.experiments.document import (
    BEST,
    REFERENCES,
    Document,
    best_rows,
    column,
    fronts,
    measure_cells,
    measure_columns,
    table,
)
from src.experiments.equal_refusal import gaps, meets
from src.experiments.equal_refusal_tables import equal_refusal_tables, sentences
from src.experiments.grid import Grid, Model
from src.experiments.pencils import overlap_table, pencils
from src.experiments.plain_settings import at_path, layered
from src.experiments.scores import draws_for, gathered, not_finite, seed_by_seed
from src.experiments.settings import MethodSpec
from src.experiments.statements import claims, claims_table
from src.experiments.store import Store
from src.experiments.study import (
    Plan,
    Study,
    check_names,
    curves,
    finished,
    notes_on,
    of_methods,
    paths,
    records,
)
from src.merge.settings import with_option

PARTS = ("method", "fisher", "safety")
VALIDATION = "These are validation rows, on which strengths are chosen: for choosing defaults, not for claims."


@dataclass
class Axis:
    """One setting and its values.

    Args:
        option: ``method.NAME``, or a dotted key of the YAML of ``fisher`` or of the safety expert's ``fit`` behind
            ``fisher.`` or ``safety.``, such as ``fisher.model.labels`` or ``safety.data.train``.
        values: Its values, without that of the reference.
        labels: What the values are called; unset shows them.
    """

    option: str
    values: list[Any]
    labels: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Stop where the option has no such place, or labels do not fit."""
        if self.option.partition(".")[0] not in PARTS or "." not in self.option:
            raise InputError(f"axis {self.option}: expected an option that begins with {', '.join(PARTS)} and a dot")
        if self.labels and len(self.labels) != len(self.values):
            raise InputError(f"axis {self.option}: {len(self.labels)} labels for {len(self.values)} values")


class Ablations(Study):
    """One setting at a time.

    Args:
        reference: The method with its reference settings.
        axes: The settings to change.
        choice: The validation rows, and how strengths are chosen on them.
        methods: Whole methods to show beside the variants, such as task arithmetic or fine-tuning of the core.
    """

    def __init__(
        self,
        reference: MethodSpec,
        axes: list[Axis],
        choice: Choice | None = None,
        methods: list[MethodSpec] | None = None,
    ) -> None:
        self.methods = methods or []
        check_names([reference, *self.methods])
        if reference.train is not None:
            raise InputError(
                f"method {reference.name}: the reference merges the safety expert as it is; train is for study.methods"
            )
        for axis in axes:
            axis.check()
        self.reference, self.axes, self.choice = reference, axes, choice or Choice()
        self._points = [(reference, dict[str, Any]()), *self._changed_points()]
        check_names([*(spec for spec, _ in self._points), *self.methods])

    def _changed_points(self) -> list[tuple[MethodSpec, dict[str, Any]]]:
        found = []
        for axis in self.axes:
            labels = axis.labels or [str(value) for value in axis.values]
            for value, label in zip(axis.values, labels, strict=True):
                found.append(self._changed(axis.option, value, f"{axis.option} = {label}"))
        return found

    def _changed(self, option: str, value: Any, name: str) -> tuple[MethodSpec, dict[str, Any]]:
        part, _, rest = option.partition(".")
        spec, safety = copy.copy(self.reference), dict[str, Any]()
        spec.name = name
        if part == "method":
            if spec.method is None:
                raise InputError(f"axis {option}: the reference has no method")
            if rest == spec.strength.option:
                raise InputError(f"axis {option}: the strengths of the reference are values of {rest}")
            spec.method = with_option(spec.method, rest, value)
        elif part == "fisher":
            if spec.method is None or not spec.method.needs_fisher:
                raise InputError(f"axis {option}: the reference needs no Fisher files")
            spec.fisher = layered(spec.fisher, at_path(rest, value))
        else:
            if spec.rows is not None and rest == "data.train":
                raise InputError(f"axis {option}: the reference has rows that its safety expert learns as well")
            safety = at_path(rest, value)
        return spec, safety

    def plan(self, grid: Grid, seeds: Sequence[int]) -> Plan:
        """References, the reference method and its variants.

        Raises:
            InputError: strengths are to be chosen, and no suite says by what.
        """
        check_choice(grid, [*(spec for spec, _ in self._points), *self.methods], self.choice)
        found: list[Model] = []
        for seed in seeds:
            found += grid.references(seed)
            for spec, over in self._points:
                merges = grid.merges(spec, [grid.utility(seed)], grid.safety(seed, over, spec), seed)
                found += [Model(spec.name, value, seed, grid.test(cell, cell.label), cell) for value, cell in merges]
            for method in self.methods:
                found += grid.models(method, seed)
        return Plan(found, notes=notes_on(grid, [self.reference, *self.methods]))

    def report(self, plan: Plan, store: Store) -> Document:
        """Variants against the reference, on validation rows."""
        points, notes = finished(plan.models, store)
        known, series = records(points, store), paths(points)
        split: dict[str, Any] = {"share": self.choice.share, "split_seed": self.choice.seed}
        draws = draws_for(len(CLAIMED) * len(series))
        scores = gathered(known, "validation", draws=draws, **split)
        chosen = {method: chosen_point(scores, names, self.choice) for method, names in series.items()}
        ours = chosen.get(self.reference.name)
        others = [name for method, name in chosen.items() if method not in (*REFERENCES, self.reference.name)]
        made = claims(scores, ours, others, CLAIMED) if ours else []
        lines = curves(series, [*(spec for spec, _ in self._points), *self.methods])
        seeds = list(dict.fromkeys(model.seed for model in plan.models))
        each = seed_by_seed(known, len(seeds), "validation", draws=draws, **split)
        ways = [spec.name for spec in (self.reference, *self.methods)]
        equal = {name: gaps(each, lines, name) for name in ways}
        pooled = {name: gaps([scores], lines, name) if len(seeds) > 1 else [] for name in ways}
        rows = [{"model": name} | measure_cells(scores, name) for name in chosen.values()]
        columns = [column("model", "model"), *measure_columns(scores)]
        competitors = [name for method, name in chosen.items() if method not in REFERENCES]
        best = best_rows(scores, list(chosen.values()), competitors)
        tables = [
            table("Variants (validation rows)", columns, rows, note=f"{VALIDATION} {BEST}", best=best),
            claims_table(made, "The reference against its variants (validation rows)"),
            *(
                one
                for name, found in equal.items()
                if meets(found)
                for one in equal_refusal_tables(found, pooled[name], name, seeds, "validation rows")
            ),
            overlap_table(of_methods(points), store),
            cost_table(of_methods(points), store),
        ]
        said = [sentence for name, found in equal.items() for sentence in sentences(found, name)]
        return {
            "summary": [VALIDATION, *dict.fromkeys(said)] if said else [VALIDATION, *summary(made, ours)],
            "folded": {AT_CHOSEN: summary(made, ours)} if said else {},
            "notes": [*notes, *plan.notes, *not_finite(known, "validation", **split)],
            "fronts": fronts(scores, series, "validation rows", [self.reference.name], front_note(seeds)),
            "pencils": pencils({ours: points[ours]} if ours else {}, store),
            "tables": tables,
            "examples": [],
        }
