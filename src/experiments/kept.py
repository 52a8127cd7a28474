"""What a merge of N experts keeps of each: the merged model's score over the expert's own, task by task.

    kept_i = mean score of the merge on task i / mean score of expert i alone on task i

The interval of the mean over tasks resamples the rows of each task (merge and expert together); the experts' means are
taken as measured in the denominators of the draws, which would otherwise be zero now and then on few rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from src.experiments.grid import Model
from src.experiments.scores import DRAWS, QUANTILES, row_scores
from src.experiments.store import Record, Store
from src.metrics.bootstrap import Estimate, resampled_means


@dataclass(frozen=True)
class Kept:
    """What one merge keeps.

    Attributes:
        method: The method with its strength.
        count: Number of experts.
        seed: The seed.
        tasks: Task to kept share; a task that its expert scored 0 on has none.
        draws: (S,) bootstrap draws of the mean over tasks.
        rows: Number of rows of all tasks together.
    """

    method: str
    count: int
    seed: int
    tasks: dict[str, float]
    draws: torch.Tensor
    rows: int

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


def kept_of(model: Model, alone: Mapping[tuple[str, int], Record], store: Store) -> Kept | None:
    """What a merged model keeps; nothing where no expert of it was measured with a score above 0."""
    by_task: dict[str, list[float]] = {}
    for (suite, _, _), value in row_scores(store.read(model.test)).get("utility", {}).items():
        by_task.setdefault(suite, []).append(value)
    tasks, draws, rows = {}, [], 0
    for number, (task, values) in enumerate(by_task.items()):
        record = alone.get((task, model.seed))
        own = [] if record is None else list(row_scores(record)["utility"].values())
        if not own or sum(own) == 0:
            continue
        expert = sum(own) / len(own)
        tasks[task] = sum(values) / len(values) / expert
        means = resampled_means(torch.tensor(values, dtype=torch.float64), seed=number, draws=DRAWS)
        draws.append(means / expert)
        rows += len(values)
    if not tasks:
        return None
    method, _, rest = model.method.rpartition(" (")
    name = method if model.strength is None else f"{method} @ {model.strength:g}"
    return Kept(name, int(rest.rstrip(")")), model.seed, tasks, torch.stack(draws).mean(dim=0), rows)


def mean_kept(found: Sequence[Kept]) -> Estimate:
    """Mean over seeds of what equal merges keep, with its 95 % interval."""
    draws = torch.stack([one.draws for one in found]).mean(dim=0)
    low, high = torch.quantile(draws, torch.tensor(QUANTILES, dtype=torch.float64)).tolist()
    return Estimate(sum(one.mean for one in found) / len(found), low, high, found[0].rows)


def slope(found: Mapping[int, Sequence[Kept]]) -> Estimate | None:
    """Least-squares slope of the kept share per additional expert; nothing with fewer than two numbers of experts."""
    if len(found) < 2:
        return None
    counts = torch.tensor(sorted(found), dtype=torch.float64)
    centred = counts - counts.mean()
    weights = centred / (centred**2).sum()
    groups = [found[int(count)] for count in counts]
    draws = torch.stack([torch.stack([one.draws for one in group]).mean(dim=0) for group in groups])
    means = torch.tensor([mean_kept(group).value for group in groups], dtype=torch.float64)
    low, high = torch.quantile(weights @ draws, torch.tensor(QUANTILES, dtype=torch.float64)).tolist()
    return Estimate((weights @ means).item(), low, high, groups[-1][0].rows)
