"""Methods compared at equal refusal: what each gives up where both refuse alike, along their whole paths.

A method's path is a curve of (refusal, cost) points, from the utility expert on; between two neighbours a cost is
interpolated linearly, which is what answering by one of the two models at random gives. The difference of two methods
is the mean over the levels of refusal that both reach. No strength is chosen, so none can be chosen luckily. Rows are
resampled, the same for both methods; the curves are drawn anew each time. Where few rows differ a bootstrap is too
sure, so no p-value is smaller than that of swapping the two methods in rows at random, at the measured refusals.

Of several seeds, methods are compared on the experts of one seed at a time, as a user has them, and these differences
are averaged. A path of means over seeds at equal strengths would not do: where a strength means another refusal on
every seed, its points are means of models that lie far apart, which on a curve that bends upwards lie above each
seed's own curve; two methods on one curve would differ.

Legend of shapes: S bootstrap draws, K points of a path, L levels of refusal.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import torch

from src.experiments.document import better
from src.experiments.scores import Measure, Scores, two_sided_p
from src.experiments.statements import holm
from src.metrics.bootstrap import ENDS, Estimate, randomised_p, widest

LOWEST, HIGHEST, STEP = 0.5, 0.95, 0.05
MOST_APART = 0.5
"""Refusal by which two neighbours on a path may differ: a line across a wider gap says nothing of what lies there."""
COSTS: tuple[Measure, ...] = ("over_refusal", "utility", "task_nll", "answer_nll")
Scored = Mapping[Measure, Scores]
"""Scores by measure."""
Levels = tuple[float, ...]


@dataclass(frozen=True)
class Gap:
    """How two methods differ at equal refusal.

    Attributes:
        other: The method that ours is compared with.
        levels: Levels of refusal that both reach, on each seed; none where the paths have no common range.
        differences: Ours − other by measure: means over the levels, then over the seeds that have some.
        p_values: Of no difference, by measure, after Holm's adjustment for all comparisons of ours.
        each: The differences of each seed.
        shares: Our over-refusal as a share of the other's, by level, of means over the seeds that reach it.
        steps: Refusal between the two neighbours that are furthest apart of those that a level lies between, on our
            path and on the other's: a line across a wide step is dearer than a path that bends upwards in it.
    """

    other: str
    levels: tuple[Levels, ...]
    differences: Mapping[Measure, Estimate]
    p_values: Mapping[Measure, float]
    each: tuple[Mapping[Measure, Estimate], ...] = ()
    shares: Mapping[float, Estimate] = field(default_factory=dict)
    steps: tuple[float, float] = (0.0, 0.0)

    def wins(self, measure: Measure) -> int:
        """1 where ours is better, −1 where it is worse, 0 where the interval holds zero."""
        return better(measure, self.differences[measure])

    @property
    def met(self) -> int:
        """Number of seeds whose paths meet."""
        return sum(map(bool, self.levels))


@dataclass(frozen=True)
class _Met:
    """Two paths of one seed at the levels that both reach.

    Attributes:
        scores: Scores by measure.
        levels: (L,) the levels.
        costs: (1 + S, L) costs of ours and of the other by measure, as measured, then of resampled rows.
        rows: (N, 2) the mean over the levels of each row's costs on our path and on the other's, by measure.
    """

    scores: Scored
    levels: np.ndarray
    costs: Mapping[Measure, tuple[np.ndarray, np.ndarray]]
    rows: Mapping[Measure, np.ndarray]

    def drawn(self, measure: Measure) -> np.ndarray:
        """(1 + S,) mean differences over the levels: as measured, then of resampled rows."""
        ours, other = self.costs[measure]
        return np.asarray((ours - other).mean(1))

    def difference(self, measure: Measure) -> Estimate:
        """The difference on this seed."""
        return compared(self.drawn(measure), self.rows[measure], self.scores[measure])


def gaps(each: Sequence[Scored], curves: Mapping[str, Sequence[str]], ours: str) -> list[Gap]:
    """Ours against every other method.

    Args:
        each: Scores on each seed, rows resampled alike; refusal must be among them.
        curves: Method to the models of its path.
        ours: One of the methods.
    """
    if ours not in curves or not any("refusal" in one and one.keys() & COSTS for one in each):
        return []
    found = []
    for other in (name for name in curves if name != ours):
        paths = curves[ours], curves[other]
        own = [_meeting(scores, *paths) for scores in each]
        met = [one for one in own if len(one.levels)]
        shared = [m for m in COSTS if met and all(m in one.costs for one in met)]
        parts = {}
        for m in shared:
            drawn, rows = (np.mean(part, axis=0) for part in ([s.drawn(m) for s in met], [s.rows[m] for s in met]))
            parts[m] = compared(drawn, rows, met[0].scores[m]), p_value(drawn, rows, met[0].scores[m])
        found.append((other, paths, own, parts))
    adjusted = iter(holm([p for *_, parts in found for _, p in parts.values()]))
    return [
        Gap(
            other,
            tuple(tuple(one.levels.tolist()) for one in own),
            {m: one for m, (one, _) in parts.items()},
            {m: next(adjusted) for m in parts},
            tuple({m: one.difference(m) for m in one.costs} for one in own),
            _shares(own),
            (max(_step(one, paths[0]) for one in own), max(_step(one, paths[1]) for one in own)),
        )
        for other, paths, own, parts in found
    ]


def meets(found: Sequence[Gap]) -> bool:
    """Whether any other path reaches a level of refusal that ours reaches."""
    return any(gap.met for gap in found)


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


def point_weights(levels: np.ndarray, refusals: np.ndarray) -> np.ndarray:
    """(K,) how much each point of a path counts in the mean of its costs over the levels."""
    count = len(refusals)
    return np.asarray(cost_at(levels, np.tile(refusals, (count, 1)), np.eye(count)).mean(1))


def estimated(drawn: np.ndarray, cost: Scores) -> Estimate:
    """A number with its interval, from (1 + S,) draws: as measured, then of resampled rows."""
    low, high = np.quantile(drawn[1:], ENDS)
    return Estimate(float(drawn[0]), float(low), float(high), len(cost.rows))


def compared(drawn: np.ndarray, rows: np.ndarray, cost: Scores) -> Estimate:
    """A mean difference with its interval, honest where no row differs.

    Args:
        drawn: (1 + S,) differences: as measured, then of resampled rows.
        rows: (N, 2) costs of each row.
        cost: What was measured.
    """
    found = estimated(drawn, cost)
    low, high = widest([(a, b) for a, b in rows.tolist()], found.value, cost.groups)
    return Estimate(found.value, min(found.low, low), max(found.high, high), found.n)


def p_value(drawn: np.ndarray, rows: np.ndarray, cost: Scores) -> float:
    """Two-sided p-value of no difference (see :func:`compared`): the larger of the bootstrap's and of random swaps'."""
    difference = torch.from_numpy(rows[:, 0] - rows[:, 1])
    return max(two_sided_p(drawn[1:]), randomised_p(difference, seed=cost.seed, draws=cost.count, groups=cost.groups))


def _meeting(scores: Scored, ours: Sequence[str], other: Sequence[str]) -> _Met:
    """Two paths of one seed; without refusals they have no levels."""
    if "refusal" not in scores:
        return _Met(scores, np.empty(0), {}, {})
    refusals = [_means(scores["refusal"], path) for path in (ours, other)]
    levels = common_levels(refusals)
    for path in refusals:
        levels = levels[covered(levels, path)]
    costs, rows = {}, {}
    for measure in (m for m in COSTS if m in scores and len(levels)):
        one, two = (
            cost_at(levels, _draws(scores["refusal"], path), _draws(scores[measure], path)) for path in (ours, other)
        )
        costs[measure] = one, two
        each = zip((ours, other), refusals, strict=True)
        rows[measure] = np.stack([_rows(scores[measure], path) @ point_weights(levels, at) for path, at in each], 1)
    return _Met(scores, levels, costs, rows)


def _shares(own: Sequence[_Met]) -> dict[float, Estimate]:
    """Over-refusal of one method as a share of another's, by level; left out where the other's may be none at all."""
    met = [one for one in own if "over_refusal" in one.costs]
    found = {}
    for level in sorted(set(chain.from_iterable(one.levels.tolist() for one in met))):
        at = [(one, one.levels.tolist().index(level)) for one in met if level in one.levels]
        ours, other = (
            np.mean([one.costs["over_refusal"][side][:, place] for one, place in at], axis=0) for side in (0, 1)
        )
        if other.min() > 0:
            found[level] = estimated(ours / other, at[0][0].scores["over_refusal"])
    return found


def _step(met: _Met, path: Sequence[str]) -> float:
    """Refusal between the two neighbours on a path that are furthest apart of those that a level lies between."""
    if not len(met.levels):
        return 0.0
    points = np.sort(_means(met.scores["refusal"], path))
    inside = (met.levels[:, None] > points[:-1] + 1e-12) & (met.levels[:, None] < points[1:] - 1e-12)
    return float(np.diff(points)[inside.any(0)].max(initial=0.0))


def _rows(scores: Scores, models: Sequence[str]) -> np.ndarray:
    """(N, K) scores of the models."""
    return scores.values[:, [scores.models.index(model) for model in models]].numpy()


def _means(scores: Scores, models: Sequence[str]) -> np.ndarray:
    """(K,) their means."""
    columns = [scores.models.index(model) for model in models]
    return scores.values[:, columns].mean(0).numpy()


def _draws(scores: Scores, models: Sequence[str]) -> np.ndarray:
    """(1 + S, K) means of the models: as measured, then of resampled rows."""
    columns = [scores.models.index(model) for model in models]
    return np.concatenate([_means(scores, models)[None], scores.draws[:, columns].numpy()])
