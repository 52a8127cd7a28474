"""torchmetrics of the evaluation loop. All states are integers: the order of rows and ranks cannot matter."""

from collections.abc import Sequence
from typing import Any

import torch
from torchmetrics import Metric

from src.metrics.categories import categories_of
from src.metrics.groups import effective_rows, numbered
from src.metrics.intervals import wilson


class FlagRate(Metric):
    """Share of rows with a flag: ``hits / total``, over all of them and by category.

    Args:
        categories: Names of the categories that rows may belong to; every process must give the same ones.
    """

    full_state_update = False
    hits: torch.Tensor
    total: torch.Tensor

    def __init__(self, categories: Sequence[str] = ()) -> None:
        super().__init__()
        self.categories = list(categories)
        size = 1 + len(self.categories)
        self.add_state("hits", torch.zeros(size, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(size, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, flags: Sequence[bool], categories: Sequence[str] | None = None) -> None:
        """Add one row per flag, each to all its categories where there are any."""
        self.hits[0] += sum(flags)
        self.total[0] += len(flags)
        for flag, category in zip(flags, categories or (), strict=bool(categories)):
            for name in categories_of(category):
                place = 1 + self.categories.index(name)
                self.hits[place] += int(flag)
                self.total[place] += 1

    def compute(self) -> torch.Tensor:
        """The share over all categories, float64; NaN before the first row."""
        return self.hits[0].double() / self.total[0]

    def summary(self) -> dict[str, Any]:
        """Value, 95 % Wilson interval, hits and n over all processes; the same by category where there are any."""
        with self.sync_context():
            hits, total = self.hits.tolist(), self.total.tolist()
        found = share(hits[0], total[0])
        if not self.categories:
            return found
        counted = zip(self.categories, hits[1:], total[1:], strict=True)
        return found | {"categories": {name: share(h, n) for name, h, n in counted if n}}


def share(hits: int, total: int) -> dict[str, Any]:
    """A counted share with its 95 % Wilson interval."""
    return {"value": hits / total, "interval": list(wilson(hits, total)), "hits": hits, "n": total}


def share_of_goals(flags: Sequence[bool], goals: Sequence[str]) -> dict[str, Any]:
    """A counted share of rows of which several may be after one goal: ``goals`` says of how many, where they are fewer.

    The interval is Wilson's with the effective number of rows (:func:`src.metrics.groups.effective_rows`).
    """
    found = share(sum(flags), len(flags))
    groups = numbered(goals)
    if groups is None:
        return found
    rows = effective_rows([*map(float, flags)], groups)
    return found | {"interval": list(wilson(found["value"] * rows, rows)), "goals": max(groups) + 1}


def by_goal(
    counted: dict[str, Any], flags: Sequence[bool], goals: Sequence[str], categories: Sequence[str]
) -> dict[str, Any]:
    """A counted share, with the intervals of rows of which several are after one goal, its categories' too."""
    if numbered(goals) is None:
        return counted
    found = counted | share_of_goals(flags, goals)
    for category in counted.get("categories", {}):
        inside = [i for i, one in enumerate(categories) if category in categories_of(one)]
        found["categories"][category] = share_of_goals([flags[i] for i in inside], [goals[i] for i in inside])
    return found
