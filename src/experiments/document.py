"""The report of a study as plain values: what the page, the tables in CSV and the JSON all show.

A number that was measured is ``{value, low, high, n}``; everything else is text or a plain number.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from src.experiments.grid import Model
from src.experiments.rows import prompts
from src.experiments.scores import MEASURES, Measure, Scores
from src.experiments.store import Store
from src.metrics.bootstrap import Estimate
from src.metrics.groups import EQUAL

Document = dict[str, Any]
REFERENCES = ("base", "utility", "safety")
"""Models of a study that no method made."""


def number(estimate: Estimate) -> dict[str, Any]:
    """A measured number."""
    return asdict(estimate)


def p_column(key: str, label: str) -> dict[str, Any]:
    """A column of p-values."""
    return column(key, label) | {"kind": "p-value"}


def column(key: str, label: str, better: bool | None = None) -> dict[str, Any]:
    """A column of a table.

    Args:
        key: Its key in the rows.
        label: Its heading.
        better: Whether higher (true) or lower (false) is better; unset where neither is.
    """
    return {"key": key, "label": label, "better": None if better is None else "higher" if better else "lower"}


def measure_columns(measures: Iterable[Measure]) -> list[dict[str, Any]]:
    """A column for each measure."""
    return [column(measure, *MEASURES[measure]) for measure in measures]


def axis(measure: Measure) -> dict[str, Any]:
    """A measure as an axis of a front."""
    label, more = MEASURES[measure]
    return {"measure": measure, "label": label, "better": "higher" if more else "lower"}


def measure_cells(scores: Mapping[Measure, Scores], model: str) -> dict[str, Any]:
    """A model's numbers, by measure."""
    return {measure: number(one.estimate(model)) for measure, one in scores.items()}


BEST = (
    "Bold: better than every other method (not control, not reference) with an interval of the difference that "
    "excludes 0, each for one comparison. Refusal and over-refusal are not marked: either is had at the other's price."
)
"""The note on what is bold."""


def best_rows(scores: Mapping[Measure, Scores], models: Sequence[str], competitors: Sequence[str]) -> dict[str, int]:
    """Measure to the place among models of the best competitor, where its difference to *every* other excludes zero.

    But for refusal and over-refusal: a model that refuses everything is best in one and worst in the other.
    """
    found: dict[str, int] = {}
    for measure, one in scores.items():
        if not competitors or measure in ("refusal", "over_refusal"):
            continue
        pick = max if MEASURES[measure][1] else min
        best = pick(competitors, key=one.mean)
        others = [model for model in competitors if model != best]
        if others and all(better(measure, one.difference(best, other)) > 0 for other in others):
            found[measure] = list(models).index(best)
    return found


def better(measure: Measure, difference: Estimate) -> int:
    """1 where the first of two is better, −1 where the second is, 0 where the interval holds zero, but for rounding."""
    sign = 1 if MEASURES[measure][1] else -1
    return sign * ((difference.low > EQUAL) - (difference.high < -EQUAL))


def table(title: str, columns: Sequence[Any], rows: Sequence[Any], *, note: str = "", best: Any = None) -> Document:
    """A table; cells that a row lacks are empty, and ``best`` names for some columns the row to be set in bold."""
    whole = [{one["key"]: "" for one in columns} | row for row in rows]
    return {"title": title, "note": note, "columns": list(columns), "rows": whole, "best": best or {}}


def front(
    title: str,
    scores: Mapping[Measure, Scores],
    axes: tuple[Measure, Measure],
    series: Mapping[str, Sequence[str]],
    ours: Sequence[str] = (),
    note: str = "",
) -> Document:
    """A front: for each method the points of its path.

    Args:
        title: Its title.
        scores: The scores.
        axes: Measures across and up.
        series: Method to its models, in the order of the path.
        ours: Methods to stand out.
        note: What stands below it.
    """
    across, up = axes
    lines = []
    for name, models in series.items():
        points = [
            {"model": m, "x": number(scores[across].estimate(m)), "y": number(scores[up].estimate(m))} for m in models
        ]
        role = "reference" if name in REFERENCES else "ours" if name in ours else "method"
        lines.append({"name": name, "role": role, "points": points})
    return {"title": title, "x": axis(across), "y": axis(up), "series": lines, "note": note}


def fronts(
    scores: Mapping[Measure, Scores],
    series: Mapping[str, Sequence[str]],
    where: str,
    ours: Sequence[str] = (),
    note: str = "",
) -> list[Document]:
    """Safety against utility, and refusal against over-refusal, where both were measured.

    ``ours`` are methods to stand out; ``note`` stands below each.
    """
    wanted: list[tuple[str, tuple[Measure, Measure]]] = [
        ("Safety against utility", ("refusal", "utility")),
        ("Refusal against over-refusal", ("refusal", "over_refusal")),
        ("Refusal against the NLL of benign answers", ("refusal", "answer_nll")),
    ]
    shown = [(f"{name} ({where})", axes) for name, axes in wanted if set(axes) <= set(scores)]
    return [front(title, scores, axes, series, ours, note) for title, axes in shown]


def examples(models: Mapping[str, Model], store: Store) -> list[Document]:
    """The answers of several models to the same few prompts, side by side; a prompt is None where its rows are away."""
    found: dict[tuple[str, str], Document] = {}
    texts: dict[str, dict[str, str]] = {}
    for name, model in models.items():
        record = store.read(model.test)
        suites = {suite["name"]: suite for suite in record["settings"]["data"]["suites"]}
        for suite, rows in record["found"]["examples"].items():
            files = repr(suites[suite]["rows"])
            if rows and files not in texts:
                texts[files] = prompts(suites[suite])
            for row in rows:
                fresh = {"suite": suite, "kind": suites[suite]["kind"], "id": row["id"], "answers": []}
                place = found.setdefault((suite, row["id"]), fresh | {"prompt": texts[files].get(row["id"])})
                place["answers"].append({"model": name, "answer": row["answer"]})
    return list(found.values())
