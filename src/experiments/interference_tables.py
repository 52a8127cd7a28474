"""Tables and fronts of the interference study."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from src.experiments.document import Document, axis, column, measure_columns, number, table
from src.experiments.grid import Model
from src.experiments.interference_claims import KEPT, OVER_ROWS, Points
from src.experiments.kept import Kept, grouped, mean_kept, on_shared_tasks, slope
from src.experiments.point_names import method_and_strength, name_and_experts, of_experts
from src.experiments.rows import most_frequent
from src.experiments.scores import Measure, Scores, gathered
from src.experiments.store import Record, Store
from src.metrics.bootstrap import Estimate

SHOWN: tuple[Measure, ...] = ("refusal", "over_refusal", "attack_success", "collapse", "answer_nll")


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


def safety_alone(records: Sequence[Record]) -> dict[Measure, Estimate]:
    """Refusal and the like of the safety expert alone, means over seeds; nothing where it has not been measured."""
    scores = gathered({"safety": records}) if records else {}
    return {measure: one.estimate("safety") for measure, one in scores.items() if measure in SHOWN}


def _without_tasks(record: Record) -> Record:
    """A record without its task suites: seeds merge other tasks, and safety is measured on the same prompts."""
    suites = [suite for suite in record["settings"]["data"]["suites"] if suite["kind"] != "utility"]
    return record | {"settings": record["settings"] | {"data": record["settings"]["data"] | {"suites": suites}}}


def performance_table(
    merges: Iterable[tuple[str, int]], kept: Sequence[Kept], scores: Points, alone: Mapping[Measure, Estimate]
) -> Document:
    """Mean normalised performance, its variance over tasks and safety, by method and number of experts.

    Args:
        merges: Methods with their numbers of experts.
        kept: What they keep, where their experts were measured.
        scores: Their refusal and the like.
        alone: That of the safety expert alone.
    """
    measures = [m for m in SHOWN if m in alone or any(m in one for one in scores.values())]
    several = len({one.count for one in kept}) > 1
    shared = grouped(on_shared_tasks(kept)) if several else {}
    every: dict[str, set[int]] = {}
    for method, count in merges:
        every.setdefault(method, set()).add(count)
    known = grouped(kept)
    rows: list[dict[str, Any]] = []
    if alone:
        rows.append({"method": "safety expert alone"} | {m: number(alone[m]) for m in measures if m in alone})
    for method, counts in every.items():
        for count in sorted(counts):
            row: dict[str, Any] = {"method": method, "experts": count}
            if seeds := known.get(method, {}).get(count):
                row |= {measure: number(mean_kept(seeds, KEPT[measure])) for measure in KEPT}
                row["variance"] = sum(one.variance for one in seeds) / len(seeds)
            if seeds := shared.get(method, {}).get(count):
                row["shared"] = number(mean_kept(seeds))
            shown = scores.get(of_experts(method, count), {})
            rows.append(row | {m: number(shown[m]) for m in measures if m in shown})
    columns = [column("method", "method"), column("experts", "experts"), *measure_columns(KEPT)]
    if several:
        columns.append(column("shared", "kept of the tasks in all merges", True))
    columns += [column("variance", "variance over tasks", False)]
    columns += measure_columns(measures)
    note = (
        "Performance kept: score of the merge over the score of each task's own expert, mean over tasks and seeds. "
        "Tasks that their experts hardly solve weigh most in it, but not in the ratio of the mean scores. Merges of "
        "more experts hold other tasks as well: numbers of experts compare on the tasks that all of them hold. "
        f"{OVER_ROWS}"
    )
    return table("Performance kept by merges of many experts", columns, rows, note=note)


def degradation_table(kept: Sequence[Kept]) -> Document:
    """Slope of the kept share per additional expert."""
    rows = []
    for method, counts in grouped(on_shared_tasks(kept)).items():
        found = slope(counts)
        rows.append({"method": method, "slope": "one number of experts only" if found is None else number(found)})
    columns = [column("method", "method"), column("slope", "change of performance kept per expert added", True)]
    note = (
        "Least squares over the numbers of experts, on the tasks that all of them hold; the numbers themselves, in the "
        f"table before, say whether a line fits them. {OVER_ROWS}"
    )
    return table("Degradation", columns, rows, note=note)


def alone_table(alone: Mapping[tuple[str, int], Record]) -> list[Document]:
    """What every expert scores alone on its own task, mean over the rows of all seeds that trained it."""
    rows: list[dict[str, Any]] = []
    by_task: dict[str, list[Record]] = {}
    for (task, _), record in alone.items():
        by_task.setdefault(task, []).append(record)
    for task, records in by_task.items():
        one = gathered({task: records}).get("utility")
        if one is not None:
            constant = most_frequent(records[0]["settings"]["data"]["suites"][0])
            shown = {"constant": "" if constant is None else constant}
            rows.append({"task": task, "score": number(one.estimate(task))} | shown)
    columns = [column("task", "task"), column("score", "score", True)]
    columns.append(column("constant", "one answer to every prompt, the most frequent one"))
    note = (
        "Where the expert scores no more than one answer to every prompt does, a merge that always says it keeps all."
    )
    return [table("Experts alone, on their own tasks", columns, rows, note=note)] if rows else []


def hardly_learnt(table: Document) -> list[str]:
    """A note on the experts of a table of :func:`alone_table` that have learnt no more than what to answer mostly."""
    names = [row["task"] for row in table["rows"] if row["constant"] != "" and row["score"]["value"] <= row["constant"]]
    why = "score no more than one answer to every prompt would: what is kept of them says little"
    return [f"{len(names)} of {len(table['rows'])} experts ({', '.join(names)}) {why}."] if names else []


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
        row = {key: _mean([found[name][i][j] for i, j in pairs]) for key, name in MATRICES.items()}
        rows.append({"seed": draw} | row | {"safety": _mean([found["columns"][last][i] for i in range(last)])})
    note = (
        "Means over pairs of adapters that have modules in common; for spaces the mean squared cosine of the principal "
        "angles (1: one in the other)."
        " Where all trainings begin with one adapter (recipe.redraw calibration) row spaces are mostly that one's."
    )
    return [table("Angles between experts", columns, rows, note=note)] if rows else []


def _mean(values: Sequence[float | None]) -> float | str:
    """Mean of what is known; empty where nothing is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else ""


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
        up = axis("kept") | {"label": "kept of the tasks in all merges"}
        found.append({"title": title, "x": across, "y": up, "series": lines})
    refusal = {name: shown["refusal"] for name, shown in scores.items() if "refusal" in shown}
    if refusal:
        known = [one for one in kept if of_experts(one.method, one.count) in refusal]
        lines = _lines(
            known, lambda seeds: number(refusal[of_experts(seeds[0].method, seeds[0].count)]), by_number=several
        )
        title = "Refusal against performance kept"
        along = "A method's numbers of experts are joined; a point says its own on hover." if several else ""
        found.append({"title": title, "x": axis("refusal"), "y": axis("kept"), "series": lines, "note": along})
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
