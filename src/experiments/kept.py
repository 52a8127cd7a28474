"""What a merge of N experts keeps of each: the merged model's score over the expert's own, task by task.

    kept_i = mean score of the merge on task i / mean score of expert i alone on task i

The interval of the mean over tasks resamples the rows of each task, for merge and expert together: what makes a row
hard cancels. A draw in which the expert scores nothing has no ratio and is drawn again. A mean of ratios gives most
weight to the tasks that their experts hardly solve, so the ratio of the means is computed beside it:

    ratio = Σ_i mean score of the merge on task i / Σ_i mean score of expert i alone on task i

Resampled ratios lie above the measured one on average, the more so the fewer rows their experts solve; so intervals
are bias-corrected percentiles. They are over rows and say nothing about other experts, other tasks or another order of
adding them. Where few rows differ resampling is too sure, so no p-value is smaller than that of swapping two merges in
rows at random.
"""

import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from src.experiments.grid import Model
from src.experiments.point_names import name_and_experts
from src.experiments.scores import DRAWS, Row, row_scores
from src.experiments.store import Record, Store
from src.metrics.bootstrap import Estimate, bias_corrected, randomised_p, resampled_means
from src.metrics.groups import EQUAL
from src.metrics.intervals import wilson

How = Literal["mean", "ratio"]
"""The mean of the tasks' shares, or the ratio of the mean scores."""


@dataclass(frozen=True)
class Kept:
    """What one merge keeps.

    Attributes:
        method: The method with its strength.
        count: Number of experts.
        seed: The seed.
        scores: Task to the mean scores of the merge and of the task's expert, where that is above 0.
        drawn: Task to (S, 2) bootstrap draws of both.
        rows: Task to number of rows.
        merged: Task to the merge's score on each row (N,), in one order for all merges; where it is known.
    """

    method: str
    count: int
    seed: int
    scores: dict[str, tuple[float, float]]
    drawn: dict[str, torch.Tensor]
    rows: dict[str, int]
    merged: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def tasks(self) -> dict[str, float]:
        """Task to kept share."""
        return {task: merged / expert for task, (merged, expert) in self.scores.items()}

    @property
    def mean(self) -> float:
        """Mean over tasks."""
        return sum(self.tasks.values()) / len(self.tasks)

    @property
    def variance(self) -> float:
        """Variance over tasks (of the sample: one task less in the denominator); 0 for a single task."""
        if len(self.tasks) < 2:
            return 0.0
        return sum((value - self.mean) ** 2 for value in self.tasks.values()) / (len(self.tasks) - 1)

    def figure(self, how: How = "mean") -> tuple[float, torch.Tensor]:
        """The mean of the shares or the ratio of the mean scores, with its (S,) bootstrap draws."""
        merged, expert = torch.tensor(list(self.scores.values()), dtype=torch.float64).unbind(1)
        drawn_merged, drawn_expert = torch.stack(list(self.drawn.values()), dim=1).unbind(2)
        if how == "mean":
            return (merged / expert).mean().item(), (drawn_merged / drawn_expert).mean(dim=1)
        return (merged.sum() / expert.sum()).item(), drawn_merged.sum(dim=1) / drawn_expert.sum(dim=1)

    def parts(self, how: How = "mean") -> dict[str, torch.Tensor]:
        """Task to what each row (N,) adds to the figure."""
        whole = sum(expert for _, expert in self.scores.values())
        weights = {
            task: whole if how == "ratio" else expert * len(self.scores) for task, (_, expert) in self.scores.items()
        }
        return {task: one / len(one) / weights[task] for task, one in self.merged.items()}

    def of(self, tasks: Collection[str]) -> "Kept":
        """What is kept of some of the tasks."""
        return replace(
            self,
            scores={task: pair for task, pair in self.scores.items() if task in tasks},
            drawn={task: draws for task, draws in self.drawn.items() if task in tasks},
            rows={task: count for task, count in self.rows.items() if task in tasks},
            merged={task: each for task, each in self.merged.items() if task in tasks},
        )


def kept_of(model: Model, alone: Mapping[tuple[str, int], Record], store: Store, *, draws: int = DRAWS) -> Kept | None:
    """What a merged model keeps; nothing where no expert of it was measured with a score above 0."""
    by_task: dict[str, dict[Row, float]] = {}
    for row, value in row_scores(store.read(model.test)).get("utility", {}).items():
        by_task.setdefault(row[0], {})[row] = value
    scores, drawn, rows, each = {}, {}, {}, {}
    for task, values in by_task.items():
        record = alone.get((task, model.seed))
        own = {} if record is None else row_scores(record)["utility"]
        pairs = torch.tensor([(value, own[row]) for row, value in values.items() if row in own], dtype=torch.float64)
        if not len(pairs) or not pairs[:, 1].any():
            continue
        merged, expert = pairs.mean(dim=0).tolist()
        scores[task], drawn[task], rows[task] = (merged, expert), _drawn(task, pairs, draws), len(pairs)
        each[task] = pairs[:, 0]
    if not scores:
        return None
    return Kept(*name_and_experts(model), model.seed, scores, drawn, rows, each)


def nothing_alone(models: Iterable[Model], alone: Mapping[tuple[str, int], Record]) -> list[str]:
    """A note on tasks whose expert scores nothing on them: no share can be kept, and means are over the others."""
    seeds = {model.seed for model in models}
    none = [
        f"{task} (seed {seed})"
        for (task, seed), record in alone.items()
        if seed in seeds and not any(row_scores(record)["utility"].values())
    ]
    why = (
        "the expert scores 0 there, so a merge can keep no share of it; means are over other tasks, where there are any"
    )
    return [f"Left out: {', '.join(none)}; {why}."] if none else []


def _drawn(task: str, pairs: torch.Tensor, draws: int) -> torch.Tensor:
    """(S, 2) mean scores of merge and expert, of rows drawn with replacement from pairs (N, 2) of them.

    The draws are keyed by the task: the same rows of several merges are drawn alike.
    """
    seed = zlib.crc32(task.encode())
    found = torch.empty(0, 2, dtype=torch.float64)
    while len(found) < draws:
        means = resampled_means(pairs, seed=seed, draws=draws)
        found, seed = torch.cat([found, means[means[:, 1] > 0]]), seed + 1
    return found[:draws]


def grouped(kept: Sequence[Kept]) -> dict[str, dict[int, list[Kept]]]:
    """Method to number of experts to seeds."""
    found: dict[str, dict[int, list[Kept]]] = {}
    for one in kept:
        found.setdefault(one.method, {}).setdefault(one.count, []).append(one)
    return found


def mean_kept(found: Sequence[Kept], how: How = "mean") -> Estimate:
    """Mean over seeds of what equal merges keep, with its 95 % interval."""
    figures = [one.figure(how) for one in found]
    estimate, _ = _estimate(figures, found[0])
    if not _alike(figures):
        return estimate
    unseen = _unseen(found, how)
    return replace(estimate, low=max(0.0, estimate.value - unseen), high=estimate.value + unseen)


def _unseen(found: Sequence[Kept], how: How) -> float:
    """What more or less may be kept where resampling moves nothing: Wilson's end of 0 rows, as a share of the experts'.

    Rows not seen are taken to be of all tasks alike.
    """
    experts = torch.tensor([expert for one in found for _, expert in one.scores.values()], dtype=torch.float64)
    share = 1 / experts.mean() if how == "ratio" else (1 / experts).mean()
    return wilson(0, sum(found[0].rows.values()))[1] * float(share)


def difference(first: Sequence[Kept], second: Sequence[Kept], how: How = "mean") -> tuple[Estimate, float]:
    """What one merge keeps less what another does, of the same experts and on the same rows, mean over seeds.

    Args:
        first: One merge, seed by seed.
        second: Another of the same seeds.
        how: What is compared.

    Returns:
        The difference with its 95 % interval, and its two-sided p-value: the larger of the bootstrap's and of the
        paired randomisation test's.
    """
    figures = []
    for one, other in zip(first, second, strict=True):
        (value, drawn), (value_other, drawn_other) = one.figure(how), other.figure(how)
        figures.append((value - value_other, drawn - drawn_other))
    found, p = _estimate(figures, first[0])
    if _alike(figures):
        unseen = _unseen(first, how)
        found = replace(found, low=found.value - unseen, high=found.value + unseen)
        p = 1.0 if abs(found.value) < EQUAL else p
    return found, max(p, _swapped(first, second, how))


def _alike(figures: Sequence[tuple[float, torch.Tensor]]) -> bool:
    """Whether resampling says nothing: on each seed, all draws of a figure are the same."""
    return all(drawn.max() - drawn.min() < EQUAL for _, drawn in figures)


def _swapped(first: Sequence[Kept], second: Sequence[Kept], how: How) -> float:
    """p-value of no difference of two merges, which change places in rows at random, alike on all seeds."""
    total: dict[str, torch.Tensor] = {}
    for one, other in zip(first, second, strict=True):
        ours, theirs = one.parts(how), other.parts(how)
        for task in ours.keys() & theirs.keys():
            total[task] = total.get(task, torch.zeros(())) + ours[task] - theirs[task]
    if not total:
        return 0.0
    return randomised_p(torch.cat([total[task] for task in sorted(total)]), seed=0, draws=DRAWS)


def on_shared_tasks(kept: Sequence[Kept]) -> list[Kept]:
    """Every merge on the tasks that all merges of its seed hold; none of a seed whose merges have no task in common.

    A merge of more experts holds other tasks as well. What is kept of these says nothing about what the added experts
    did to the first ones.
    """
    shared: dict[int, set[str]] = {}
    for one in kept:
        shared[one.seed] = shared.get(one.seed, set(one.tasks)) & set(one.tasks)
    return [one.of(shared[one.seed]) for one in kept if shared[one.seed]]


def slope(found: Mapping[int, Sequence[Kept]]) -> Estimate | None:
    """Least-squares slope of the kept share per additional expert over the shared tasks, mean over seeds.

    Nothing without two numbers of experts.
    """
    seeds: dict[int, list[Kept]] = {}
    for one in on_shared_tasks([one for count in sorted(found) for one in found[count]]):
        seeds.setdefault(one.seed, []).append(one)
    several = [merges for merges in seeds.values() if len(merges) > 1]
    figures = []
    for merges in several:
        counts = torch.tensor([one.count for one in merges], dtype=torch.float64)
        centred = counts - counts.mean()
        weights = centred / (centred**2).sum()
        values, draws = zip(*(one.figure() for one in merges), strict=True)
        figures.append(((weights @ torch.tensor(values, dtype=torch.float64)).item(), weights @ torch.stack(draws)))
    return _estimate(figures, several[0][0])[0] if several else None


def _estimate(figures: Sequence[tuple[float, torch.Tensor]], first: Kept) -> tuple[Estimate, float]:
    """The mean over seeds of a number with its draws, and its p-value; ``first`` says how many rows each has."""
    values, draws = zip(*figures, strict=True)
    value = sum(values) / len(values)
    low, high, p = bias_corrected(value, torch.stack(draws).mean(dim=0))
    return Estimate(value, low, high, sum(first.rows.values())), p
