"""What a merge of N experts keeps of each: the merged model's score over the expert's own, task by task.

    kept_i = mean score of the merge on task i / mean score of expert i alone on task i

The interval of the mean over tasks resamples the rows of each task, for merge and expert together: what makes a row
hard cancels. A draw in which the expert scores nothing has no ratio and is drawn again.
"""

import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from src.experiments.grid import Model
from src.experiments.point_names import name_and_experts
from src.experiments.scores import DRAWS, Row, row_scores
from src.experiments.store import Record, Store
from src.metrics.bootstrap import ENDS, Estimate, resampled_means


@dataclass(frozen=True)
class Kept:
    """What one merge keeps.

    Attributes:
        method: The method with its strength.
        count: Number of experts.
        seed: The seed.
        tasks: Task to kept share; a task that its expert scored 0 on has none.
        drawn: Task to (S,) bootstrap draws of its share.
        rows: Task to number of rows.
    """

    method: str
    count: int
    seed: int
    tasks: dict[str, float]
    drawn: dict[str, torch.Tensor]
    rows: dict[str, int]

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

    @property
    def draws(self) -> torch.Tensor:
        """(S,) bootstrap draws of the mean over tasks."""
        return torch.stack(list(self.drawn.values())).mean(dim=0)

    def of(self, tasks: Collection[str]) -> "Kept":
        """What is kept of some of the tasks."""
        return replace(
            self,
            tasks={task: share for task, share in self.tasks.items() if task in tasks},
            drawn={task: draws for task, draws in self.drawn.items() if task in tasks},
            rows={task: count for task, count in self.rows.items() if task in tasks},
        )


def kept_of(model: Model, alone: Mapping[tuple[str, int], Record], store: Store) -> Kept | None:
    """What a merged model keeps; nothing where no expert of it was measured with a score above 0."""
    by_task: dict[str, dict[Row, float]] = {}
    for row, value in row_scores(store.read(model.test)).get("utility", {}).items():
        by_task.setdefault(row[0], {})[row] = value
    tasks, drawn, rows = {}, {}, {}
    for task, values in by_task.items():
        record = alone.get((task, model.seed))
        own = {} if record is None else row_scores(record)["utility"]
        pairs = torch.tensor([(value, own[row]) for row, value in values.items() if row in own], dtype=torch.float64)
        if not len(pairs) or not pairs[:, 1].any():
            continue
        merged, expert = pairs.mean(dim=0).tolist()
        tasks[task], drawn[task], rows[task] = merged / expert, _ratios(task, pairs), len(pairs)
    if not tasks:
        return None
    return Kept(*name_and_experts(model), model.seed, tasks, drawn, rows)


def nothing_alone(models: Iterable[Model], alone: Mapping[tuple[str, int], Record]) -> list[str]:
    """A note on tasks whose expert scores nothing on them: no share can be kept, and means are over the others."""
    seeds = {model.seed for model in models}
    none = [
        f"{task} (seed {seed})"
        for (task, seed), record in alone.items()
        if seed in seeds and not any(row_scores(record)["utility"].values())
    ]
    why = "the expert scores 0 there, so a merge can keep no share of it, and means are over the other tasks"
    return [f"Left out: {', '.join(none)}; {why}."] if none else []


def _ratios(task: str, pairs: torch.Tensor) -> torch.Tensor:
    """(S,) ratios of mean scores, of rows drawn with replacement from pairs (N, 2) of merge and expert.

    The draws are keyed by the task: the same rows of several merges are drawn alike.
    """
    seed = zlib.crc32(task.encode())
    found = torch.empty(0, dtype=torch.float64)
    while len(found) < DRAWS:
        merged, expert = resampled_means(pairs, seed=seed, draws=DRAWS).unbind(1)
        found, seed = torch.cat([found, (merged / expert)[expert > 0]]), seed + 1
    return found[:DRAWS]


def mean_kept(found: Sequence[Kept]) -> Estimate:
    """Mean over seeds of what equal merges keep, with its 95 % interval."""
    return _estimate([one.mean for one in found], [one.draws for one in found], found[0])


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
    values, draws = [], []
    for merges in several:
        counts = torch.tensor([one.count for one in merges], dtype=torch.float64)
        centred = counts - counts.mean()
        weights = centred / (centred**2).sum()
        values.append((weights @ torch.tensor([one.mean for one in merges], dtype=torch.float64)).item())
        draws.append(weights @ torch.stack([one.draws for one in merges]))
    return _estimate(values, draws, several[0][0]) if several else None


def _estimate(values: Sequence[float], draws: Sequence[torch.Tensor], first: Kept) -> Estimate:
    """The mean over seeds; ``first`` says how many rows each has."""
    low, high = torch.quantile(torch.stack(list(draws)).mean(dim=0), ENDS).tolist()
    return Estimate(sum(values) / len(values), low, high, sum(first.rows.values()))
