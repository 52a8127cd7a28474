"""Tables and fronts of the interference study."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from src.experiments.document import Document, axis, column, measure_columns, number, table
from src.experiments.grid import Model
from src.experiments.kept import Kept, mean_kept, on_shared_tasks, slope
from src.experiments.point_names import method_and_strength, name_and_experts, of_experts
from src.experiments.scores import Measure, Scores, gathered
from src.experiments.store import Record, Store
from src.metrics.bootstrap import Estimate

SHOWN: tuple[Measure, ...] = ("refusal", "over_refusal", "attack_success", "collapse")
SAFE = 0.5
"""Share of harmful prompts that a merge refuses to be called safe in the summary."""
KEPT = {"measure": "kept", "label": "performance kept", "better": "higher"}
Points = Mapping[str, Mapping[Measure, Estimate]]


def safety_scores(models: Sequence[Model], store: Store) -> dict[str, dict[Measure, Estimate]]:
    """Refusal and the like of every merge, means over seeds."""
    points: dict[str, list[Record]] = {}
    for model in models:
        points.setdefault(of_experts(*name_and_experts(model)), []).append(store.read(model.test))
    found: dict[str, dict[Measure, Estimate]] = {}
    for name, records in points.items():
        kept = [_without_tasks(record) for record in records]
        scores: Mapping[Measure, Scores] = gathered({name: kept})
        found[name] = {measure: one.estimate(name) for measure, one in scores.items() if measure in SHOWN}
    return found


def _without_tasks(record: Record) -> Record:
    """A record without its task suites: seeds merge other tasks, and safety is measured on the same prompts."""
    suites = [suite for suite in record["settings"]["data"]["suites"] if suite["kind"] != "utility"]
    return record | {"settings": record["settings"] | {"data": record["settings"]["data"] | {"suites": suites}}}


def grouped(kept: Sequence[Kept]) -> dict[str, dict[int, list[Kept]]]:
    """Method to number of experts to seeds."""
    found: dict[str, dict[int, list[Kept]]] = {}
    for one in kept:
        found.setdefault(one.method, {}).setdefault(one.count, []).append(one)
    return found


def performance_table(kept: Sequence[Kept], scores: Points) -> Document:
    """Mean normalised performance, its variance over tasks and safety, by method and number of experts."""
    measures = [m for m in SHOWN if any(m in one for one in scores.values())]
    several = len({one.count for one in kept}) > 1
    shared = grouped(on_shared_tasks(kept)) if several else {}
    rows = []
    for method, counts in grouped(kept).items():
        comparable = shared.get(method, {})
        for count, seeds in sorted(counts.items()):
            variance = sum(one.variance for one in seeds) / len(seeds)
            row: dict[str, Any] = {"method": method, "experts": count, "kept": number(mean_kept(seeds))}
            if count in comparable:
                row["shared"] = number(mean_kept(comparable[count]))
            shown = scores.get(of_experts(method, count), {})
            rows.append(row | {"variance": variance} | {m: number(shown[m]) for m in measures if m in shown})
    columns = [column("method", "method"), column("experts", "experts"), column("kept", "performance kept", True)]
    if several:
        columns.append(column("shared", "kept of the tasks in all merges", True))
    columns += [column("variance", "variance over tasks", False)]
    columns += measure_columns(measures)
    note = (
        "Score of the merge over the score of each task's own expert, mean over tasks and seeds. Merges of more "
        "experts hold other tasks as well: numbers of experts compare on the tasks that all of them hold."
    )
    return table("Performance kept by merges of many experts", columns, rows, note=note)


def degradation_table(kept: Sequence[Kept]) -> Document:
    """Slope of the kept share per additional expert."""
    rows = []
    for method, counts in grouped(on_shared_tasks(kept)).items():
        found = slope(counts)
        rows.append({"method": method, "slope": "one number of experts only" if found is None else number(found)})
    columns = [column("method", "method"), column("slope", "change of performance kept per expert added", True)]
    note = "Least squares over the numbers of experts, on the tasks that all of them hold."
    return table("Degradation", columns, rows, note=note)


def task_table(kept: Sequence[Kept]) -> Document:
    """What every merge keeps of every task, means over the seeds that merged it."""
    tasks = list(dict.fromkeys(task for one in kept for task in one.tasks))
    rows = []
    for method, counts in grouped(kept).items():
        for count, seeds in sorted(counts.items()):
            row: dict[str, Any] = {"method": method, "experts": count}
            for task in tasks:
                values = [one.tasks[task] for one in seeds if task in one.tasks]
                row[f"task {task}"] = sum(values) / len(values) if values else ""
            rows.append(row)
    columns = [column("method", "method"), column("experts", "experts"), *(column(f"task {t}", t, True) for t in tasks)]
    return table("Performance kept, task by task", columns, rows)


def size_table(models: Sequence[Model], store: Store) -> Document:
    """Rank and kept energy of what was written."""
    rows = []
    for model in models:
        if model.made is not None and store.has_result(model.made):
            output = store.read(model.made)["found"]["output"] or {}
            rows.append(
                {
                    "model": model.test.label,
                    "form": output.get("form", ""),
                    "rank": output.get("mean_rank") or "",
                    "energy": 1.0 if output.get("form") == "exact" else output.get("kept_energy") or "",
                }
            )
    columns = [column("model", "model"), column("form", "form"), column("rank", "mean rank of a module")]
    return table("Rank and energy kept", [*columns, column("energy", "energy kept", True)], rows)


def geometry_table(records: Mapping[int, Record]) -> list[Document]:
    """Cosines and principal angles between the experts (and the safety expert, last), draw by draw.

    Args:
        records: Position of a draw of the study to the comparison of its adapters.
    """
    columns = [column("seed", "draw"), column("cosine", "mean cosine of updates"), column("columns", "column spaces")]
    columns += [column("rows", "row spaces"), column("safety", "column spaces, experts and safety")]
    rows = []
    for draw, record in records.items():
        found = record["found"]
        last = len(found["adapters"]) - 1
        pairs = [(i, j) for i in range(last) for j in range(i)]
        row = {key: sum(found[name][i][j] for i, j in pairs) / len(pairs) for key, name in MATRICES.items()}
        with_safety = sum(found["columns"][last][i] for i in range(last)) / last
        rows.append({"seed": draw} | row | {"safety": with_safety})
    note = (
        "Means over pairs of experts; for spaces the mean squared cosine of the principal angles (1: one in the other)."
        " With recipe.redraw calibration row spaces are mostly those of the adapter that all trainings begin with."
    )
    return [table("Angles between experts", columns, rows, note=note)] if rows else []


MATRICES = {"cosine": "cosines", "columns": "columns", "rows": "rows"}


def kept_front(kept: Sequence[Kept], scores: Points) -> list[Document]:
    """Performance kept of the tasks in all merges over the number of experts, and of all tasks against refusal.

    With one number of experts there is nothing to draw over it, and a method's strengths make its line.
    """
    several = len({one.count for one in kept}) > 1
    found = []
    if several:
        across = {"measure": "experts", "label": "experts merged", "better": None}
        lines = _lines(on_shared_tasks(kept), _experts, by_number=True)
        title = "Performance kept of the tasks in all merges"
        found.append({"title": title, "x": across, "y": KEPT, "series": lines})
    refusal = {name: shown["refusal"] for name, shown in scores.items() if "refusal" in shown}
    if refusal:
        known = [one for one in kept if of_experts(one.method, one.count) in refusal]
        lines = _lines(
            known, lambda seeds: number(refusal[of_experts(seeds[0].method, seeds[0].count)]), by_number=several
        )
        found.append({"title": "Refusal against performance kept", "x": axis("refusal"), "y": KEPT, "series": lines})
    return found


def _experts(seeds: Sequence[Kept]) -> Document:
    count = seeds[0].count
    return {"value": count, "low": count, "high": count, "n": len(seeds)}


def _lines(kept: Sequence[Kept], across: Callable[[Sequence[Kept]], Document], *, by_number: bool) -> list[Document]:
    """Lines through the numbers of experts of a method at a strength, or else through the strengths of a method."""
    lines: dict[str, list[Document]] = {}
    for method, counts in grouped(kept).items():
        name = method if by_number else method_and_strength(method)[0]
        for count, seeds in sorted(counts.items()):
            point = {"model": of_experts(method, count), "x": across(seeds), "y": number(mean_kept(seeds))}
            lines.setdefault(name, []).append(point)
    return [{"name": name, "points": points} for name, points in lines.items()]


def summary(kept: Sequence[Kept], scores: Points) -> list[str]:
    """Which method keeps most at the largest number of experts, of all and of the safe ones, and how sure that is."""
    if not kept:
        return ["No merge has been measured with its experts, so nothing is said about interference."]
    most = max(one.count for one in kept)
    found = {m: mean_kept(c[most]) for m, c in grouped(kept).items() if most in c}
    refusal = {m: shown["refusal"] for m in found if "refusal" in (shown := scores.get(of_experts(m, most), {}))}
    safe = {m: found[m] for m, share in refusal.items() if share.value >= SAFE}
    lines = [f"With {most} experts merged, {_best(found, refusal)}."]
    if refusal and not safe:
        lines.append(f"No method refuses {SAFE:.0%} of the harmful prompts there.")
    elif safe and max(found, key=lambda m: found[m].value) not in safe:
        lines.append(f"Of those that refuse {SAFE:.0%} of the harmful prompts or more, {_best(safe, refusal)}.")
    return lines


def _best(found: Mapping[str, Estimate], refusal: Mapping[str, Estimate]) -> str:
    best = max(found, key=lambda method: found[method].value)
    one = found[best]
    said = (
        f"{best} keeps the largest share of the experts' performance: {one.value:.2f} [{one.low:.2f}, {one.high:.2f}]"
    )
    if best in refusal:
        said += f", refusing {refusal[best].value:.2f} of the harmful prompts"
    rest = [method for method, other in found.items() if method != best and other.high >= one.low]
    return f"{said}; its interval overlaps that of {', '.join(rest)}" if rest else said
