"""Rows that belong together: one goal in several disguises, or the same prompt twice, says less than as many others.

Goals are resampled in place of rows then (cluster bootstrap), and score intervals take the effective number of rows: n
divided by the design effect of the groups (L. Kish, Survey Sampling, 1965) and by the square of Student's quantile for
so many groups over that for n rows (E. L. Korn and B. I. Graubard, Survey Methodology 24, 1998). Wilson's interval with
that number is among the best of those compared by N. Dean and M. Pagano (JSSAM 3, 2015).
"""

from collections.abc import Hashable, Sequence

import torch
from scipy.stats import t as student

EQUAL = 1e-12
"""Scores in [0, 1], or differences of them, that are closer are equal but for rounding."""


def numbered(names: Sequence[Hashable]) -> list[int] | None:
    """The number of each row's group; nothing where no two rows share one."""
    places = {name: place for place, name in enumerate(dict.fromkeys(names))}
    return None if len(places) == len(names) else [places[name] for name in names]


def summed(values: torch.Tensor, groups: Sequence[int]) -> torch.Tensor:
    """Sums (G, F) over the rows of each group, of values (N, F); float64."""
    sums = torch.zeros(max(groups) + 1, values.shape[1], dtype=torch.float64)
    return sums.index_add_(0, torch.tensor(groups), values.double())


def effective_rows(values: Sequence[float], groups: Sequence[int] | None) -> float:
    """How many independent rows say as much about the mean of ``values`` as these.

    Where all values are equal, or the groups' means are, nothing tells how groups differ: each counts as one row.

    Args:
        values: Score of each row, or a difference of two.
        groups: The number of each row's group.
    """
    count = len(values)
    if groups is None:
        return count
    many = max(groups) + 1
    if many == 1:
        return 1.0
    centred = torch.as_tensor(values, dtype=torch.float64)
    centred = centred - centred.mean()
    if centred.abs().max() < EQUAL:
        return many
    between = summed(centred[:, None], groups).square().sum() * many / (many - 1)
    if between < EQUAL:
        return many
    effect = (between / (centred.square().sum() * count / (count - 1))).item()
    fewer = (student.ppf(0.975, count - 1) / student.ppf(0.975, many - 1)) ** 2
    return max(1.0, count / max(1.0, effect) * float(fewer))
