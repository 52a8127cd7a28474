"""Bootstrap intervals over examples (B. Efron, 1979): percentiles of the mean of resampled rows.

For two models on the same rows the *differences* are resampled, so that what makes a row hard cancels. The draws are
keyed by a seed: the same values give the same interval.

Where all scores are equal, resampling them says nothing. Of a mean of scores in [0, 1] the interval is then Wilson's
(of a share no score of that range is surer). A difference of yes/no scores has an interval that is never narrower than
Tango's score interval. Other scores in [0, 1] whose differences are all equal may differ otherwise in a share of rows
not seen, at most Wilson's upper end of 0 in n, and then by as much as 1: for yes/no scores that is Tango's, too. Scores
without bounds are resampled all the same. Rows that belong together are drawn together (:mod:`src.metrics.groups`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from src.metrics.groups import EQUAL, effective_rows, summed
from src.metrics.intervals import tango, wilson

ENDS = torch.tensor([0.025, 0.975], dtype=torch.float64)
DRAWS = 10_000
PORTION = 500
MOST_KEPT = 2**25
"""Weights that are kept for the next call (67 MB); of more rows or draws they are made each time."""


@dataclass(frozen=True)
class Estimate:
    """A mean over n rows with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, float | int | list[float]]:
        """The form in which metrics are written."""
        return {"value": self.value, "interval": [self.low, self.high], "n": self.n}


def resampled_means(
    values: torch.Tensor, *, seed: int = 0, draws: int = DRAWS, groups: Sequence[int] | None = None
) -> torch.Tensor:
    """Means (draws, …) of rows drawn with replacement from values (N, …), float64; of whole groups where there are."""
    sums, sizes = _units(values, groups)
    if sizes is None:
        return _weighted_sums(sums, _often, seed, draws).reshape(-1, *values.shape[1:]) / len(values)
    drawn = _weighted_sums(torch.cat([sums, sizes], 1), _often, seed, draws)
    return (drawn[:, :-1] / drawn[:, -1:]).reshape(-1, *values.shape[1:])


def flipped_means(
    values: torch.Tensor, *, seed: int = 0, draws: int = DRAWS, groups: Sequence[int] | None = None
) -> torch.Tensor:
    """Means (draws, …) of values (N, …) under random signs of the rows, float64; of whole groups where there are.

    A difference of two columns is one of models that change places in random rows (paired randomisation test).
    """
    sums, _ = _units(values, groups)
    return _weighted_sums(sums, _signs, seed, draws).reshape(-1, *values.shape[1:]) / len(values)


def _units(values: torch.Tensor, groups: Sequence[int] | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What is resampled: values (N, F) of rows, or their sums over groups with the groups' sizes (G, 1)."""
    flat = values.double().reshape(len(values), -1)
    if groups is None:
        return flat, None
    return summed(flat, groups), summed(torch.ones(len(values), 1), groups)


def _often(rows: int, draws: int, generator: torch.Generator) -> torch.Tensor:
    """How often each row is drawn (draws, N)."""
    drawn = torch.randint(rows, (draws, rows), generator=generator)
    one = torch.ones((), dtype=torch.int16).expand(drawn.shape)
    return torch.zeros(drawn.shape, dtype=torch.int16).scatter_add_(1, drawn, one)


def _signs(rows: int, draws: int, generator: torch.Generator) -> torch.Tensor:
    """A sign for each row (draws, N)."""
    return (torch.randint(2, (draws, rows), generator=generator) * 2 - 1).to(torch.int8)


Weigh = Callable[[int, int, torch.Generator], torch.Tensor]


def _portions(weigh: Weigh, rows: int, draws: int, seed: int) -> Iterator[torch.Tensor]:
    """Weights, a few hundred draws at a time."""
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, draws, PORTION):
        yield weigh(rows, min(PORTION, draws - start), generator)


@lru_cache(maxsize=4)
def _kept(weigh: Weigh, rows: int, draws: int, seed: int) -> tuple[torch.Tensor, ...]:
    """Weights that are kept: a page asks for the same draws many times."""
    return tuple(_portions(weigh, rows, draws, seed))


def _weighted_sums(values: torch.Tensor, weigh: Weigh, seed: int, draws: int) -> torch.Tensor:
    """Sums (draws, F) of values (N, F) by so many rows of weights (draws, N)."""
    found = (_kept if len(values) * draws <= MOST_KEPT else _portions)(weigh, len(values), draws, seed)
    # Used again: to ask for memory takes longer than to multiply.
    room = torch.empty(min(PORTION, draws), len(values), dtype=torch.float64)
    return torch.cat([room[: len(some)].copy_(some) @ values for some in found])


def swapped_p(swapped: torch.Tensor, value: float) -> float:
    """Two-sided p-value of a difference, from (S,) differences under random swaps."""
    return (int((swapped.abs() >= abs(value) - EQUAL).sum()) + 1) / (len(swapped) + 1)


def randomised_p(differences: torch.Tensor, *, seed: int, draws: int, groups: Sequence[int] | None = None) -> float:
    """Two-sided p-value of no mean difference of rows (N,): the paired randomisation test."""
    return swapped_p(flipped_means(differences, seed=seed, draws=draws, groups=groups), differences.mean().item())


def bootstrap(
    values: Sequence[float], *, seed: int = 0, draws: int = DRAWS, groups: Sequence[int] | None = None
) -> Estimate:
    """Mean of per-example scores with its 95 % interval: percentiles; of some in [0, 1] Wilson's where no draw differs.

    Raises:
        ValueError: there are no scores, or some are not finite.
    """
    found = _percentiles(values, seed=seed, draws=draws, groups=groups)
    if unmoved(values, found.value, groups) and all(-EQUAL <= value <= 1 + EQUAL for value in values):
        rows, value = effective_rows(values, groups), min(max(found.value, 0.0), 1.0)
        return Estimate(found.value, *wilson(value * rows, rows), found.n)
    return found


def unmoved(values: Sequence[float], mean: float, groups: Sequence[int] | None) -> bool:
    """Whether resampling says nothing: all values are the mean or, where rows belong together, all groups' means."""
    apart = torch.as_tensor(values, dtype=torch.float64) - mean
    return bool((apart if groups is None else summed(apart[:, None], groups)).abs().max() < EQUAL)


def _percentiles(values: Sequence[float], *, seed: int, draws: int, groups: Sequence[int] | None) -> Estimate:
    """Mean of values with the 95 % percentile interval of its resampled draws."""
    if not len(values):
        raise ValueError("no values to resample")
    given = torch.as_tensor(values, dtype=torch.float64)
    if not given.isfinite().all():
        raise ValueError(f"{int((~given.isfinite()).sum())} of {len(given)} values are not finite; expected numbers")
    low, high = torch.quantile(resampled_means(given, seed=seed, draws=draws, groups=groups), ENDS).tolist()
    return Estimate(given.mean().item(), low, high, len(given))


def bias_corrected(value: float, drawn: torch.Tensor) -> tuple[float, float, float]:
    """95 % interval of a number, and its two-sided p-value of being 0, from draws of it that lie to one side.

    B. Efron's bias-corrected percentiles (1981): with z₀ = Φ⁻¹(share of draws below the value; equal ones count half),
    the ends are the draws' quantiles at Φ(2 z₀ ± 1.96).

    Args:
        value: The number as measured.
        drawn: Its draws (S,).

    Returns:
        Low end, high end and p-value; the latter is at least 2 / (S + 1).
    """
    count = len(drawn)

    def place(of: float) -> float:
        """Where a number lies among the draws, in standard deviations of a normal distribution; never at the ends."""
        below, equal = int((drawn < of - EQUAL).sum()), int(((drawn - of).abs() <= EQUAL).sum())
        share = torch.tensor((below + equal / 2 + 0.5) / (count + 1), dtype=torch.float64)
        return float(torch.special.ndtri(share))

    bias = place(value)
    low, high = torch.quantile(drawn, torch.special.ndtr(2 * bias + torch.special.ndtri(ENDS))).tolist()
    tail = torch.special.ndtr(torch.tensor(place(0.0) - 2 * bias, dtype=torch.float64)).item()
    return low, high, min(1.0, 2 * max(min(tail, 1 - tail), 1 / (count + 1)))


def paired_difference(
    first: Sequence[float],
    second: Sequence[float],
    *,
    seed: int = 0,
    draws: int = DRAWS,
    groups: Sequence[int] | None = None,
) -> Estimate:
    """Mean of ``first − second`` over the same rows with its 95 % interval, which is honest at its edges.

    Raises:
        ValueError: the numbers of values differ, there are none, or some are not finite.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} values are not of the same rows")
    pairs = [(float(a), float(b)) for a, b in zip(first, second, strict=True)]
    found = _percentiles([a - b for a, b in pairs], seed=seed, draws=draws, groups=groups)
    low, high = widest(pairs, found.value, groups)
    return Estimate(found.value, min(found.low, low), max(found.high, high), found.n)


def widest(
    pairs: Sequence[tuple[float, float]], value: float, groups: Sequence[int] | None = None
) -> tuple[float, float]:
    """Ends that the interval of a mean difference must reach: of yes/no scores, and where resampling says nothing.

    Args:
        pairs: Scores of both on each row.
        value: The mean difference.
        groups: The number of each row's group, where rows belong together.

    Returns:
        Both ends; the value itself where neither case is given.
    """
    rows = effective_rows([a - b for a, b in pairs], groups)
    if all(a in (0, 1) and b in (0, 1) for a, b in pairs):
        part = rows / len(pairs)
        return tango(sum(a > b for a, b in pairs) * part, sum(a < b for a, b in pairs) * part, rows)
    bounded = all(min(a, b) >= -EQUAL and max(a, b) <= 1 + EQUAL for a, b in pairs)
    if bounded and unmoved([a - b for a, b in pairs], value, groups):
        unseen = wilson(0, rows)[1]
        return value - unseen * (1 + value), value + unseen * (1 - value)
    return value, value
