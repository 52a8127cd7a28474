"""Methods compared at equal refusal: what each gives up where both refuse alike, along their whole paths.

A method's path is a curve of (refusal, cost) points, from the utility expert on; between two neighbours a cost is
interpolated linearly, which is what answering by one of the two models at random gives. The difference of two methods
is the mean over the levels of refusal that both reach. No strength is chosen, so none can be chosen luckily. Rows are
resampled, the same for both methods; the curves are drawn anew each time.

Legend of shapes: S bootstrap draws, K points of a path, L levels of refusal.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from src.experiments.document import Document, better, column, number, table
from src.experiments.scores import MEASURES, Measure, Scores, two_sided_p
from src.experiments.statements import holm, holm_note
from src.metrics.bootstrap import ENDS, Estimate

LOWEST, HIGHEST, STEP = 0.5, 0.95, 0.05
MOST_APART = 0.5
"""Refusal by which two neighbours on a path may differ: a line across a wider gap says nothing of what lies there."""
COSTS: tuple[Measure, ...] = ("over_refusal", "utility", "task_nll", "answer_nll")
NOTE = (
    f"Means over levels of refusal, {STEP:g} apart, from {LOWEST:g} to {HIGHEST:g} as far as both paths reach. Paired "
    "bootstrap over rows, 95 % intervals; a path begins at the utility expert and is linear between its points; "
    f"neighbours more than {MOST_APART:g} apart leave a gap."
)


@dataclass(frozen=True)
class Gap:
    """How two methods differ at equal refusal.

    Attributes:
        other: The method that ours is compared with.
        levels: Levels of refusal that both reach; none where the paths have no common range.
        differences: Ours − other by measure, means over the levels.
        p_values: Of no difference, by measure, after Holm's adjustment for all comparisons of ours.
    """

    other: str
    levels: tuple[float, ...]
    differences: Mapping[Measure, Estimate]
    p_values: Mapping[Measure, float]

    def wins(self, measure: Measure) -> int:
        """1 where ours is better, −1 where it is worse, 0 where the interval holds zero."""
        return better(measure, self.differences[measure])


def gaps(scores: Mapping[Measure, Scores], curves: Mapping[str, Sequence[str]], ours: str) -> list[Gap]:
    """Ours against every other method.

    Args:
        scores: Scores by measure; refusal must be among them.
        curves: Method to the models of its path.
        ours: One of the methods.
    """
    if ours not in curves or "refusal" not in scores or not scores.keys() & COSTS:
        return []
    found = []
    for other in (name for name in curves if name != ours):
        levels, drawn = differences(scores, curves[ours], curves[other])
        found.append((other, levels, {m: estimated(one, scores[m]) for m, one in drawn.items()}))
    adjusted = iter(holm([p for *_, parts in found for _, p in parts.values()]))
    return [
        Gap(other, levels, {m: one for m, (one, _) in parts.items()}, {m: next(adjusted) for m in parts})
        for other, levels, parts in found
    ]


def differences(
    scores: Mapping[Measure, Scores], ours: Sequence[str], other: Sequence[str]
) -> tuple[tuple[float, ...], dict[Measure, np.ndarray]]:
    """The levels that two paths reach, and (1 + S,) mean differences there by measure; none without refusals."""
    if "refusal" not in scores:
        return (), {}
    levels = shared_levels(scores["refusal"], ours, other)
    measures = [m for m in COSTS if m in scores] if len(levels) else []
    drawn = {m: drawn_differences(scores["refusal"], scores[m], ours, other, levels) for m in measures}
    return tuple(levels.tolist()), drawn


def meets(found: Sequence[Gap]) -> bool:
    """Whether any other path reaches a level of refusal that ours reaches."""
    return any(gap.levels for gap in found)


def common_levels(refusals: Sequence[np.ndarray]) -> np.ndarray:
    """(L,) the levels of refusal that every path reaches."""
    low, high = max(r.min() for r in refusals), min(r.max() for r in refusals)
    levels = np.arange(round((HIGHEST - LOWEST) / STEP) + 1) * STEP + LOWEST
    return levels[(levels >= low - 1e-12) & (levels <= high + 1e-12)]


def covered(levels: np.ndarray, refusals: np.ndarray) -> np.ndarray:
    """(L,) bool: whether a path has two neighbours around a level that are at most :data:`MOST_APART` apart."""
    points = np.sort(refusals)
    near = np.diff(points) <= MOST_APART + 1e-12
    inside = (levels[:, None] >= points[:-1] - 1e-12) & (levels[:, None] <= points[1:] + 1e-12)
    return np.asarray((inside & near).any(1))


def cost_at(levels: np.ndarray, refusals: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """(S, L) costs at levels of refusal, of paths (S, K); beyond a path's end its last cost."""
    order = np.argsort(refusals, axis=1, kind="stable")
    x, y = np.take_along_axis(refusals, order, 1), np.take_along_axis(costs, order, 1)
    return np.stack([np.interp(levels, a, b) for a, b in zip(x, y, strict=True)])


def _means(scores: Scores, models: Sequence[str]) -> np.ndarray:
    columns = [scores.models.index(model) for model in models]
    return scores.values[:, columns].mean(0).numpy()


def _draws(scores: Scores, models: Sequence[str]) -> np.ndarray:
    """(1 + S, K) means of the models: as measured, then of resampled rows."""
    columns = [scores.models.index(model) for model in models]
    return np.concatenate([_means(scores, models)[None], scores.draws[:, columns].numpy()])


def shared_levels(refusal: Scores, ours: Sequence[str], other: Sequence[str]) -> np.ndarray:
    """(L,) the levels of refusal that two paths reach, without those in their gaps."""
    refusals = [_means(refusal, path) for path in (ours, other)]
    levels = common_levels(refusals)
    for path in refusals:
        levels = levels[covered(levels, path)]
    return levels


def drawn_differences(
    refusal: Scores, cost: Scores, ours: Sequence[str], other: Sequence[str], levels: np.ndarray
) -> np.ndarray:
    """(1 + S,) mean differences over the levels: as measured, then of resampled rows."""
    one, two = (cost_at(levels, _draws(refusal, path), _draws(cost, path)).mean(1) for path in (ours, other))
    return np.asarray(one - two)


def estimated(drawn: np.ndarray, cost: Scores) -> tuple[Estimate, float]:
    """The mean difference with its interval, and the p-value of none, from (1 + S,) draws."""
    low, high = np.quantile(drawn[1:], ENDS)
    return Estimate(float(drawn[0]), float(low), float(high), len(cost.rows)), two_sided_p(drawn[1:])


def equal_refusal_table(found: Sequence[Gap], ours: str, where: str = "test rows") -> Document:
    """Differences at equal refusal, a row for each other method; ``where`` says on which rows."""
    measures = list(dict.fromkeys(measure for gap in found for measure in gap.differences))
    columns = [column("other", f"{ours} against"), column("range", "refusal from – to")]
    for measure in measures:
        columns.append(column(measure, f"{MEASURES[measure][0]}, difference"))
        columns.append(column(f"{measure}_holm", f"{MEASURES[measure][0]}, p (Holm)"))
    rows = []
    for gap in found:
        reached = f"{gap.levels[0]:.2f} – {gap.levels[-1]:.2f}" if gap.levels else "no common range"
        cells: dict[str, Any] = {measure: number(one) for measure, one in gap.differences.items()}
        cells |= {f"{measure}_holm": p for measure, p in gap.p_values.items()}
        rows.append({"other": gap.other, "range": reached} | cells)
    claimed = [gap.p_values[measure] for gap in found for measure in gap.differences if gap.wins(measure)]
    count = sum(len(gap.p_values) for gap in found)
    note = holm_note(claimed, count, "differences whose interval excludes 0")
    return table(f"{ours} at equal refusal ({where})", columns, rows, note=f"{NOTE} {note}")


def sentences(found: Sequence[Gap], ours: str) -> list[str]:
    """Who is better at equal refusal, measure by measure."""
    said = []
    for measure in COSTS:
        results = [(gap, gap.wins(measure)) for gap in found if measure in gap.differences]
        parts = [
            f"{verb} {', '.join(_named(gap, measure) for gap in chosen)}"
            for verb, wanted in (("better than", 1), ("worse than", -1))
            if (chosen := [gap for gap, result in results if result == wanted])
        ]
        equal = [gap.other for gap, result in results if result == 0]
        parts += [f"not shown to differ from {', '.join(equal)}"] if equal else []
        if parts:
            said.append(f"At equal refusal, the {MEASURES[measure][0]} of {ours} is {'; '.join(parts)}.")
    return said


def _named(gap: Gap, measure: Measure) -> str:
    one = gap.differences[measure]
    return f"{gap.other} ({one.value:+.3f} [{one.low:+.3f}, {one.high:+.3f}])"
