"""The comparison: every method with the same number of strengths, chosen on validation rows, reported on test rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from src.data.suite import BENIGN, CHECKED, HARMFUL
from src.errors import InputError
from src.experiments.costs import cost_table
from src.experiments.document import (
    BEST,
    REFERENCES,
    Document,
    best_rows,
    column,
    examples,
    fronts,
    measure_cells,
    measure_columns,
    table,
)
from src.experiments.equal_refusal import gaps
from src.experiments.equal_refusal_tables import equal_refusal_tables, sentences
from src.experiments.grid import Grid, Model
from src.experiments.learnt_rows import is_here
from src.experiments.pencils import overlap_table, pencils
from src.experiments.plain_settings import plain
from src.experiments.point_names import called
from src.experiments.rows import row_ids
from src.experiments.safety_tax import category_table, tax_rows, tax_table
from src.experiments.scores import MEASURES, Measure, Scores, draws_for, gathered, in_split, not_finite, seed_by_seed
from src.experiments.settings import MethodSpec
from src.experiments.statements import NOT_AFTER_HOLM, Claim, claims, claims_table, tally
from src.experiments.store import Record, Store
from src.experiments.study import (
    Plan,
    Study,
    aside_note,
    check_names,
    curves,
    every_path,
    finished,
    further_note,
    of_methods,
    only_named,
    paths,
    records,
    rows_note,
)

AT_CHOSEN = "At the chosen strengths, which refuse differently"
CLAIMED: tuple[Measure, ...] = ("refusal", "over_refusal", "utility", "task_nll", "answer_nll")


@dataclass
class Choice:
    """How a method's strength is chosen on the validation rows.

    Args:
        rule: ``balanced`` takes the highest mean of refusal, 1 − over-refusal and utility; ``refusal_at_least`` the
            highest mean of 1 − over-refusal and utility among strengths that refuse enough (the highest refusal where
            none does).
        refusal: What is enough, 0 to 1.
        share: Share of the rows that validate, above 0 to below 1.
        seed: Which division into validation and test rows.
    """

    rule: Literal["balanced", "refusal_at_least"] = "balanced"
    refusal: float = 0.8
    share: float = 0.4
    seed: int = 0

    def __post_init__(self) -> None:
        """Stop where a number is out of its range."""
        if not 0 < self.share < 1:
            raise InputError(f"choice.share is {self.share}; expected a number between 0 and 1")
        if not 0 <= self.refusal <= 1:
            raise InputError(f"choice.refusal is {self.refusal}; expected a share from 0 to 1")


class Comparison(Study):
    """Methods side by side.

    Args:
        methods: The methods, controls among them; all have as many strengths, but those whose strength option is none.
        ours: The method whose claims are made.
        choice: How strengths are chosen.
        only: Names of the methods to compute and report; all where none is given.
    """

    reports_further = True

    def __init__(
        self, methods: list[MethodSpec], ours: str, choice: Choice | None = None, only: list[str] | None = None
    ) -> None:
        check_names(methods)
        every, methods = methods, only_named(methods, only)
        self._aside = aside_note(every, methods)
        if ours in [method.name for method in every] and ours not in [method.name for method in methods]:
            raise InputError(f"study.only leaves out study.ours, which is {ours}; expected it among {only}")
        if ours not in [method.name for method in methods]:
            raise InputError(f"study.ours is {ours}; expected the name of one of the methods")
        counts = {m.name: len(m.strength.values) for m in methods if m.strength.option != "none"}
        if len(set(counts.values())) > 1:
            raise InputError(f"methods: numbers of strengths are {counts}; expected the same for all (equal tuning)")
        self.choice = choice or Choice()
        self.methods, self.ours = methods, ours

    def plan(self, grid: Grid, seeds: Sequence[int]) -> Plan:
        """References and paths for every seed.

        Raises:
            InputError: strengths are to be chosen, and no suite says by what.
        """
        check_choice(grid, self.methods, self.choice)
        return every_path(grid, self.methods, seeds)

    def report(self, plan: Plan, store: Store) -> Document:
        """Chosen strengths on test rows, claims, fronts, taxes, categories, costs."""
        points, notes = finished(plan.models, store)
        known, series = records(points, store), paths(points)
        split: dict[str, Any] = {"share": self.choice.share, "split_seed": self.choice.seed}
        validation = gathered(known, "validation", **split)
        draws = draws_for(len(CLAIMED) * len(series))
        test = gathered(known, "test", draws=draws, **split)
        chosen = {m: chosen_point(validation, names, self.choice) for m, names in series.items()}
        names = list(chosen.values())
        ours = chosen.get(self.ours)
        others = [name for method, name in chosen.items() if method != self.ours]
        made = claims(test, ours, others, CLAIMED) if ours else []
        taxes = tax_rows(test, names)
        lines = curves(series, self.methods)
        seeds = list(dict.fromkeys(model.seed for model in plan.models))
        equal = gaps(seed_by_seed(known, len(seeds), "test", draws=draws, **split), lines, self.ours)
        pooled = gaps([test], lines, self.ours) if len(seeds) > 1 else []
        said = sentences(equal, self.ours)
        tables = [
            self._chosen_table(test, chosen),
            claims_table(made, f"{ours or self.ours} against the others (test rows)"),
            *equal_refusal_tables(equal, pooled, self.ours, seeds, "test rows"),
            tax_table(taxes),
            spread_table(points, known, names, split),
            category_table({name: known[name] for name in names}, "test", **split),
            overlap_table(of_methods(points), store),
            cost_table(of_methods(points), store),
        ]
        return {
            "summary": said or summary(made, ours),
            "folded": {AT_CHOSEN: summary(made, ours)} if said else {},
            "notes": [
                *notes,
                *self._aside,
                *plan.notes,
                self._rule(),
                *rows_note(points),
                *further_note(plan.models),
                *not_finite(known, "test", **split),
            ],
            "fronts": fronts(test, series, "test rows", [self.ours], front_note(seeds)),
            "pencils": pencils({ours: points[ours]} if ours else {}, store),
            "tables": tables,
            "examples": examples({name: points[name][0] for name in names}, store),
        }

    def _chosen_table(self, test: Mapping[Measure, Scores], chosen: Mapping[str, str]) -> Document:
        controls = {method.name for method in self.methods if method.control}
        rows = []
        for method, name in chosen.items():
            kind = "reference" if method in REFERENCES else "control" if method in controls else "method"
            rows.append({"model": name, "kind": kind} | measure_cells(test, name))
        columns = [column("model", "model"), column("kind", "kind"), *measure_columns(test)]
        competitors = [name for method, name in chosen.items() if method not in controls | set(REFERENCES)]
        best = best_rows(test, list(chosen.values()), competitors)
        return table("Chosen on validation rows, measured on test rows", columns, rows, note=BEST, best=best)

    def _rule(self) -> str:
        rule = self.choice
        what = (
            "highest mean of refusal, 1 − over-refusal and utility"
            if rule.rule == "balanced"
            else f"highest mean of 1 − over-refusal and utility among those that refuse at least {rule.refusal:g}"
        )
        swept = {m.name: m.strength.option for m in self.methods if m.strength.option != "none"}
        options = "; ".join(f"{option} of {called(name)}" for name, option in swept.items())
        return (
            f"On {rule.share:.0%} of the rows each method's strength with the {what} was chosen; the other "
            f"{1 - rule.share:.0%} are reported." + (f" Behind @ stands a strength: {options}." if options else "")
        )


def check_choice(grid: Grid, methods: Sequence[MethodSpec], choice: Choice) -> None:
    """Stop before anything is computed where no validation row will ask for a refusal, or no other row will.

    Rows are counted where the files of all suites that ask for one thing are here: harmful prompts, benign ones, tasks.

    Raises:
        InputError: a method has several strengths, and none of ``evaluation.suites`` has harmful prompts; or the rows
            of one kind are all validation rows, or none is.
    """
    if all(len(method.strength.values) == 1 for method in methods):
        return
    suites = grid.recipe.evaluation.suites
    if not any(suite.kind in HARMFUL for suite in suites):
        raise InputError(
            "recipe.evaluation.suites: no suite of kind harmful or jailbreak; strengths are chosen by refusal"
        )
    for kinds in (HARMFUL, BENIGN, CHECKED):
        asked = [plain(suite) for suite in suites if suite.kind in kinds]
        ids = [(suite["name"], one) for suite in asked for one in row_ids(suite)]
        chosen = [in_split((*row, 0), "validation", share=choice.share, seed=choice.seed) for row in ids]
        if ids and all(map(is_here, asked)) and len(set(chosen)) < 2:
            raise InputError(
                f"study.choice: {sum(chosen)} of {len(ids)} rows of {', '.join(suite['name'] for suite in asked)} are "
                f"validation rows (share {choice.share:g}, seed {choice.seed}); expected some for the choice of "
                "strengths, and some for the report"
            )


def chosen_point(validation: Mapping[Measure, Scores], names: Sequence[str], choice: Choice) -> str:
    """The point of a path that the rule takes on the validation rows; the first of equal ones."""

    def value(measure: Measure, name: str) -> float:
        return validation[measure].mean(name)

    def kept(name: str) -> float:
        """Mean of what safety may cost."""
        parts = [1 - value("over_refusal", name)] if "over_refusal" in validation else []
        parts += [value("utility", name)] if "utility" in validation else []
        return sum(parts) / len(parts) if parts else 0.0

    if len(names) == 1:
        return names[0]
    if "refusal" not in validation:
        raise InputError("no validation row asks for a refusal; strengths cannot be chosen")
    if choice.rule == "balanced":
        terms = ("over_refusal" in validation) + ("utility" in validation)
        return max(names, key=lambda name: value("refusal", name) + terms * kept(name))
    enough = [name for name in names if value("refusal", name) >= choice.refusal]
    return max(enough, key=kept) if enough else max(names, key=lambda name: value("refusal", name))


def spread_table(
    points: Mapping[str, Sequence[Model]],
    known: Mapping[str, Sequence[Record]],
    names: Sequence[str],
    split: Mapping[str, Any],
) -> Document:
    """The chosen models seed by seed: how far training and calibration draws move the numbers."""
    columns: list[dict[str, Any]] = []
    rows = []
    for name in names:
        for model, record in zip(points[name], known[name], strict=True):
            scores = gathered({name: [record]}, "test", **split)
            columns = columns or measure_columns(scores)
            rows.append({"model": name, "seed": model.seed} | measure_cells(scores, name))
    several = len({row["seed"] for row in rows}) > 1
    head = [column("model", "model"), column("seed", "seed")]
    return table("Seed by seed (test rows)", [*head, *columns], rows if several else [])


def front_note(seeds: Sequence[int]) -> str:
    """What stands below a front: how it differs from the comparison at equal refusal."""
    begins = "Comparisons at equal refusal take paths that begin at the utility expert"
    if len(seeds) < 2:
        return f"{begins}."
    return f"Points are means over {len(seeds)} seeds. {begins}, each seed's own: not these lines."


def summary(made: Sequence[Claim], ours: str | None) -> list[str]:
    """Sentences that say who beats whom among methods, computed from the claims, which hold references too."""
    if ours is None:
        return ["The method of this study has no finished strength, so nothing is claimed."]
    sentences, named = [], [claim for claim in made if claim.second not in REFERENCES]
    for measure in CLAIMED:
        beaten, beaten_by, equal = tally(named, measure)
        if beaten or beaten_by or equal:
            parts = [("beats", beaten), ("is beaten by", beaten_by), ("shows no difference to", equal)]
            said = "; ".join(f"{verb} {', '.join(names)}" for verb, names in parts if names)
            sentences.append(f"On {MEASURES[measure][0]}, {called(ours)} {said}.")
    if any("°" in one for one in sentences):
        sentences.append(NOT_AFTER_HOLM.format(where="of the chosen points", count=len(made)))
    return sentences
