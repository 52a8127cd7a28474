"""The safety tax: what each method's whole strength path costs in utility per safety gained (2503.00555)."""

from collections.abc import Mapping, Sequence
from typing import Any

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
    number,
    p_column,
    table,
)
from src.experiments.grid import Grid
from src.experiments.pencils import overlap_table, pencils
from src.experiments.scores import MEASURES, Measure, Scores, Split, by_category, draws_for, gathered, not_finite
from src.experiments.settings import MethodSpec
from src.experiments.statements import LEVEL, NOT_AFTER_HOLM, claims, marked
from src.experiments.store import Record, Store
from src.experiments.study import Plan, Study, check_names, every_path, finished, of_methods, paths, records
from src.metrics.bootstrap import Estimate
from src.metrics.groups import EQUAL
from src.metrics.intervals import wilson
from src.metrics.tradeoff import Tax, safety_tax

LIKELIHOODS: tuple[Measure, ...] = ("task_nll", "answer_nll")
LOST: tuple[Measure, ...] = ("utility", *LIKELIHOODS)
"""What a point may lose against the utility expert: a rate, and likelihoods, which tell models apart at fewer rows."""


class SafetyTax(Study):
    """Base, utility expert, safety expert and the merges of every method's path.

    Args:
        methods: The methods.
    """

    reports_further = True

    def __init__(self, methods: list[MethodSpec]) -> None:
        check_names(methods)
        self.methods = methods

    def plan(self, grid: Grid, seeds: Sequence[int]) -> Plan:
        """References and paths for every seed."""
        return every_path(grid, self.methods, seeds)

    def report(self, plan: Plan, store: Store) -> Document:
        """Tax of every point, fronts and tables by category."""
        points, notes = finished(plan.models, store)
        known = records(points, store)
        names = list(points)
        scores = gathered(known, draws=draws_for(len(LOST) * len(names)))
        rows = [{"model": name} | measure_cells(scores, name) for name in names]
        columns = [column("model", "model"), *measure_columns(scores)]
        made = [name for name, models in points.items() if models[0].method not in REFERENCES]
        taxes = with_losses(tax_rows(scores, names), scores)
        tables = [
            table("All models", columns, rows, note=BEST, best=best_rows(scores, names, made)),
            tax_table(taxes),
            category_table(known),
            overlap_table(of_methods(points), store),
            cost_table(of_methods(points), store),
        ]
        shown = {name: seeds[0] for name, seeds in points.items()}
        return {
            "summary": [_summary(taxes) if taxes else _not_measured(scores, names)],
            "notes": [*notes, *plan.notes, *not_finite(known)],
            "fronts": fronts(scores, paths(points), "all rows"),
            "pencils": pencils({path[0]: points[path[0]] for path in paths(points).values()}, store),
            "tables": tables,
            "examples": examples(shown, store),
        }


def tax_rows(scores: Mapping[Measure, Scores], names: Sequence[str]) -> list[dict[str, Any]]:
    """The tax of every model against the utility expert; nothing where safety or utility was not measured."""
    if not {"refusal", "utility"} <= set(scores) or "utility" not in names:
        return []
    refusal, utility = scores["refusal"], scores["utility"]
    expert = refusal.models.index("utility")
    found = []
    for name in names:
        if name in REFERENCES:
            continue
        place = refusal.models.index(name)
        tax = safety_tax(
            expert_utility=utility.values[:, expert].tolist(),
            model_utility=utility.values[:, place].tolist(),
            expert_safety=refusal.values[:, expert].tolist(),
            model_safety=refusal.values[:, place].tolist(),
        )
        found.append({"model": name} | _tax_cells(tax))
    return found


def with_losses(rows: Sequence[Mapping[str, Any]], scores: Mapping[Measure, Scores]) -> list[dict[str, Any]]:
    """Rows of taxes with what is lost in likelihood, and with p-values of all losses.

    A loss in likelihood is model − utility expert, in nats; p-values are of no difference, after Holm's adjustment for
    all losses of all rows.
    """
    found = {row["model"]: dict(row) for row in rows}
    for claim in claims(scores, "utility", list(found), LOST):
        key = "loss" if claim.measure == "utility" else claim.measure
        found[claim.second][f"{key}_p"] = claim.adjusted
        if claim.measure in LIKELIHOODS:
            found[claim.second][key] = number(_negated(claim.difference))
    return list(found.values())


def _negated(one: Estimate) -> Estimate:
    return Estimate(-one.value, -one.high, -one.low, one.n)


def _tax_cells(tax: Tax) -> dict[str, Any]:
    ratio = tax.ratio if isinstance(tax.ratio, str) else number(tax.ratio)
    return {"gain": number(tax.gain), "loss": number(tax.loss), "tax": ratio}


def tax_table(rows: Sequence[Mapping[str, Any]]) -> Document:
    """The taxes as a table."""
    columns = [column("model", "model"), column("gain", "safety gained", True), column("loss", "utility lost", False)]
    columns.append(column("tax", "tax", False))
    note = (
        "Tax: utility lost over safety gained, against the utility expert; undefined where the gain's interval holds "
        "0. Intervals of yes/no scores are never narrower than Tango's."
    )
    labels = {"loss": "utility lost"} | {measure: f"{MEASURES[measure][0]}, added" for measure in LIKELIHOODS}
    for key, label in labels.items():
        if any(f"{key}_p" in row for row in rows):
            columns += [column(key, label, False)] if key in LIKELIHOODS else []
            columns.append(p_column(f"{key}_p", f"{label}, p (Holm)"))
    if count := _comparisons(rows):
        note += f" Intervals are for one comparison each; p-values are adjusted for all {count} losses of this table."
    return table("Safety tax", columns, rows, note=note)


def _comparisons(rows: Sequence[Mapping[str, Any]]) -> int:
    return sum(f"{measure}_p" in row for row in rows for measure in ("loss", *LIKELIHOODS))


def category_table(known: Mapping[str, Sequence[Record]], split: Split = "all", **options: Any) -> Document:
    """Refusal of a split's harmful prompts by category, pooled over seeds, with Wilson intervals.

    Args:
        known: Records of each model, one per seed.
        split: Which rows.
        options: How rows are divided (see :func:`src.experiments.scores.by_category`).
    """
    counts = {name: [by_category(record, split, **options) for record in seeds] for name, seeds in known.items()}
    categories = sorted({category for seeds in counts.values() for one in seeds for category in one})
    rows, disguised = [], False
    for name, seeds in counts.items():
        row: dict[str, Any] = {"model": name}
        for category in categories:
            hits, total, goals = (sum(one[category][i] for one in seeds if category in one) for i in (0, 1, 2))
            # Seeds answer the same prompts: they make the share surer, not the prompts more; nor do a goal's disguises.
            prompts, goals = total // len(seeds), goals // len(seeds)
            low, high = wilson(min(goals, hits / len(seeds) * (goals / prompts)), goals)
            disguised |= goals < prompts
            row[f"category {category}"] = {"value": hits / total, "low": low, "high": high, "n": prompts}
        rows.append(row)
    sizes = {name: row[f"category {name}"]["n"] for row in rows for name in categories}
    largest = sorted(categories, key=lambda name: -sizes[name])
    named = (column(f"category {name}", f"{name} (n = {sizes[name]})", True) for name in largest)
    columns = [column("model", "model"), *named]
    return table(
        "Refusal by category of harm" + (f" ({split} rows)" if split != "all" else ""),
        columns,
        rows,
        note="Categories as the rows' sources name them, the largest first; means over seeds, Wilson intervals for the "
        f"number of {'the goals of ' if disguised else ''}prompts.",
    )


def _not_measured(scores: Mapping[Measure, Scores], names: Sequence[str]) -> str:
    """Why there is no tax at all."""
    needed: tuple[Measure, ...] = ("refusal", "utility")
    missing = [MEASURES[measure][0] for measure in needed if measure not in scores]
    if "utility" not in names:
        why = "the utility expert is not finished"
    elif missing:
        why = f"{' and '.join(missing)} {'was' if len(missing) == 1 else 'were'} not measured"
    else:
        why = "no point of a method is finished"
    return f"Nothing is said about the safety tax: {why}."


def _summary(taxes: Sequence[Mapping[str, Any]]) -> str:
    """Which points pay a tax beyond chance. No lowest one is named: it would be chosen among many on these rows."""
    defined = [row for row in taxes if not isinstance(row["tax"], str)]
    if not defined:
        return "No model gained safety beyond chance against the utility expert, so no safety tax is defined."
    paying = [row for row in defined if row["loss"]["low"] > EQUAL]
    said = [f"{len(defined)} of {len(taxes)} points gained safety beyond chance."]
    if paying:
        names = ", ".join(marked(row["model"], row["loss_p"]) for row in paying)
        ratios = [row["tax"]["value"] for row in paying]
        said.append(
            f"{len(paying)} of them lost utility beyond chance ({names}), {min(ratios):.2f} to {max(ratios):.2f} of it "
            "for each 1.00 of refusal gained."
        )
    for measure in LIKELIHOODS:
        if lost := [row for row in defined if measure in row and row[measure]["low"] > EQUAL]:
            holds = sum(row[f"{measure}_p"] < LEVEL for row in lost)
            rose = f"The {MEASURES[measure][0]} rose beyond chance at {len(lost)}"
            said.append(f"{rose}, at {holds} of them after Holm's adjustment too.")
    losses = ("loss", *LIKELIHOODS)
    rest = [row for row in defined if not any(row[m]["low"] > EQUAL for m in losses if m in row)]
    if rest:
        sizes = [f"{rest[0][m]['n']} {'benign' if m == 'answer_nll' else 'task'} rows" for m in losses if m in rest[0]]
        rows = " and ".join(dict.fromkeys(sizes))
        said.append(f"At {len(rest)} no loss is shown on {rows}, which does not prove that there is none.")
    if any("°" in sentence for sentence in said):
        said.append(NOT_AFTER_HOLM.format(where="utility lost", count=_comparisons(taxes)))
    return " ".join(said)
