"""Bootstrap intervals over examples (B. Efron, 1979): percentiles of the mean of resampled rows.

For two models on the same rows the *differences* are resampled, so that what makes a row hard cancels. The draws are
keyed by a seed: the same values give the same interval.

Where all scores are equal, resampling them says nothing. Of a mean of scores in [0, 1] the interval is then Wilson's
(of a share no score of that range is surer). A difference of yes/no scores has an interval that is never narrower than
Tango's score interval. Other scores in [0, 1] whose differences are all equal may differ otherwise in a share of rows
not seen, at most Wilson's upper end of 0 in n, and then by as much as 1: for yes/no scores that is Tango's, too. Scores
without bounds are resampled all the same.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from src.metrics.intervals import tango, wilson

ENDS = torch.tensor([0.025, 0.975], dtype=torch.float64)
DRAWS = 10_000
EQUAL = 1e-12
"""Differences of scores in [0, 1] that are closer are equal but for rounding."""


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


def resampled_means(values: torch.Tensor, *, seed: int = 0, draws: int = DRAWS) -> torch.Tensor:
    """Means (draws, …) of rows drawn with replacement from values (N, …), float64."""

    def often(count: int, generator: torch.Generator) -> torch.Tensor:
        rows = torch.randint(len(values), (count, len(values)), generator=generator)
        return torch.zeros(rows.shape, dtype=torch.float64).scatter_add_(1, rows, torch.ones(rows.shape).double())

    return _weighted_means(values, often, seed, draws)


def flipped_means(values: torch.Tensor, *, seed: int = 0, draws: int = DRAWS) -> torch.Tensor:
    """Means (draws, …) of values (N, …) under random signs of the rows, float64.

    A difference of two columns is one of models that change places in random rows (paired randomisation test).
    """

    def signs(count: int, generator: torch.Generator) -> torch.Tensor:
        return torch.randint(2, (count, len(values)), generator=generator).double() * 2 - 1

    return _weighted_means(values, signs, seed, draws)


def _weighted_means(
    values: torch.Tensor, weights: Callable[[int, torch.Generator], torch.Tensor], seed: int, draws: int
) -> torch.Tensor:
    """Means (draws, …) of values (N, …) by so many rows of weights (draws, N), a few hundred at a time."""
    generator = torch.Generator().manual_seed(seed)
    flat = values.double().reshape(len(values), -1)
    parts = [weights(min(500, draws - start), generator) @ flat / len(values) for start in range(0, draws, 500)]
    return torch.cat(parts).reshape(-1, *values.shape[1:])


def bootstrap(values: Sequence[float], *, seed: int = 0, draws: int = DRAWS) -> Estimate:
    """Mean of per-example scores with its 95 % interval: percentiles, or Wilson's where all are equal in [0, 1].

    Raises:
        ValueError: there are no scores, or some are not finite.
    """
    found = _percentiles(values, seed=seed, draws=draws)
    first = float(values[0])
    if 0 <= first <= 1 and all(value == first for value in values):
        return Estimate(first, *wilson(first * found.n, found.n), found.n)
    return found


def _percentiles(values: Sequence[float], *, seed: int, draws: int) -> Estimate:
    """Mean of values with the 95 % percentile interval of its resampled draws."""
    if not len(values):
        raise ValueError("no values to resample")
    given = torch.as_tensor(values, dtype=torch.float64)
    if not given.isfinite().all():
        raise ValueError(f"{int((~given.isfinite()).sum())} of {len(given)} values are not finite; expected numbers")
    low, high = torch.quantile(resampled_means(given, seed=seed, draws=draws), ENDS).tolist()
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
    first: Sequence[float], second: Sequence[float], *, seed: int = 0, draws: int = DRAWS
) -> Estimate:
    """Mean of ``first − second`` over the same rows with its 95 % interval, which is honest at its edges.

    Raises:
        ValueError: the numbers of values differ, there are none, or some are not finite.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} values are not of the same rows")
    pairs = [(float(a), float(b)) for a, b in zip(first, second, strict=True)]
    found = _percentiles([a - b for a, b in pairs], seed=seed, draws=draws)
    low, high = widest(pairs, found.value)
    return Estimate(found.value, min(found.low, low), max(found.high, high), found.n)


def widest(pairs: Sequence[tuple[float, float]], value: float) -> tuple[float, float]:
    """Ends that the interval of a mean difference must reach: of yes/no scores, and where resampling says nothing.

    Args:
        pairs: Scores of both on each row.
        value: The mean difference.

    Returns:
        Both ends; the value itself where neither case is given.
    """
    if all(a in (0, 1) and b in (0, 1) for a, b in pairs):
        return tango(sum(a > b for a, b in pairs), sum(a < b for a, b in pairs), len(pairs))
    if all(abs(a - b - value) < EQUAL and 0 <= min(a, b) <= max(a, b) <= 1 for a, b in pairs):
        unseen = wilson(0, len(pairs))[1]
        return value - unseen * (1 + value), value + unseen * (1 - value)
    return value, value
