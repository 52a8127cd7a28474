"""The safety tax: what each method's whole strength path costs in utility per safety gained (2503.00555)."""

from collections.abc import Mapping, Sequence
from typing import Any

from src.experiments.costs import cost_table
from src.experiments.document import (
    Document,
    best_rows,
    column,
    examples,
    fronts,
    measure_cells,
    measure_columns,
    number,
    table,
)
from src.experiments.grid import Grid
from src.experiments.pencils import overlap_table, pencils
from src.experiments.scores import MEASURES, Measure, Scores, Split, by_category, gathered, not_finite
from src.experiments.settings import MethodSpec
from src.experiments.store import Record, Store
from src.experiments.study import REFERENCES, Plan, Study, check_names, every_path, finished, of_methods, paths, records
from src.metrics.bootstrap import EQUAL
from src.metrics.intervals import wilson
from src.metrics.tradeoff import Tax, safety_tax


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
        scores = gathered(known)
        names = list(points)
        rows = [{"model": name} | measure_cells(scores, name) for name in names]
        columns = [column("model", "model"), *measure_columns(scores)]
        taxes = tax_rows(scores, names)
        tables = [
            table("All models", columns, rows, best=best_rows(scores, names)),
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


def _tax_cells(tax: Tax) -> dict[str, Any]:
    ratio = tax.ratio if isinstance(tax.ratio, str) else number(tax.ratio)
    return {"gain": number(tax.gain), "loss": number(tax.loss), "tax": ratio}


def tax_table(rows: Sequence[Mapping[str, Any]]) -> Document:
    """The taxes as a table."""
    columns = [column("model", "model"), column("gain", "safety gained", True), column("loss", "utility lost", False)]
    note = (
        "Utility lost per safety gained against the utility expert; undefined where the gain may be nothing. Of yes/no "
        "scores the intervals are never narrower than Tango's, so they can be wider than those of the claims."
    )
    return table("Safety tax", [*columns, column("tax", "tax", False)], rows, note=note)


def category_table(known: Mapping[str, Sequence[Record]], split: Split = "all", **options: Any) -> Document:
    """Refusal of a split's harmful prompts by category, pooled over seeds, with Wilson intervals.

    Args:
        known: Records of each model, one per seed.
        split: Which rows.
        options: How rows are divided (see :func:`src.experiments.scores.by_category`).
    """
    counts = {name: [by_category(record, split, **options) for record in seeds] for name, seeds in known.items()}
    categories = sorted({category for seeds in counts.values() for one in seeds for category in one})
    rows = []
    for name, seeds in counts.items():
        row: dict[str, Any] = {"model": name}
        for category in categories:
            hits, total = (sum(one[category][i] for one in seeds if category in one) for i in (0, 1))
            # Seeds answer the same prompts: they make the share surer, not the prompts more.
            prompts = total // len(seeds)
            low, high = wilson(hits / len(seeds), prompts)
            row[f"category {category}"] = {"value": hits / total, "low": low, "high": high, "n": prompts}
        rows.append(row)
    columns = [column("model", "model"), *(column(f"category {name}", name, True) for name in categories)]
    return table(
        "Refusal by category of harm" + (f" ({split} rows)" if split != "all" else ""),
        columns,
        rows,
        note="Means over seeds; Wilson intervals for the number of prompts.",
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
    rest = len(defined) - len(paying)
    head = f"{len(defined)} of {len(taxes)} points gained safety beyond chance."
    unsure = f"{rest} no loss is shown on {defined[0]['loss']['n']} rows, which does not prove that there is none."
    if not paying:
        return f"{head} At {unsure}"
    names, ratios = ", ".join(row["model"] for row in paying), [row["tax"]["value"] for row in paying]
    lost = f"{len(paying)} of them lost utility beyond chance ({names}), {min(ratios):.2f} to {max(ratios):.2f} per"
    return f"{head} {lost} safety gained; at {unsure}" if rest else f"{head} {lost} safety gained."
