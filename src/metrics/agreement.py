"""Agreement and difference of two paired yes/no measurements.

Cohen's kappa ``κ = (p_o − p_e) / (1 − p_e)`` (J. Cohen, 1960) with the large-sample variance of Fleiss, Cohen and
Everitt (1969). Where that variance is 0 (all agree, or one measurement is constant) it says nothing: there the interval
is Cohen's own, which holds chance agreement fixed, with Wilson's limits of the observed agreement. McNemar's exact test
(1947) on the pairs that differ.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, sqrt

from src.metrics.intervals import Z95, wilson

NO_SPREAD = 1e-12
"""A variance of one item's kappa below this is 0 but for rounding."""


@dataclass(frozen=True)
class Pairs:
    """How often two measurements of the same items agree: both yes, first only, second only, neither."""

    both: int
    first: int
    second: int
    neither: int

    @property
    def total(self) -> int:
        """Number of items."""
        return self.both + self.first + self.second + self.neither


def count_pairs(first: Sequence[bool], second: Sequence[bool]) -> Pairs:
    """Cross table of two measurements of the same items.

    Raises:
        ValueError: their numbers differ, or there are none.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"{len(first)} and {len(second)} measurements are not pairs")
    cells = list(zip(map(bool, first), map(bool, second), strict=True))
    return Pairs(*(cells.count(cell) for cell in ((True, True), (True, False), (False, True), (False, False))))


def kappa(pairs: Pairs) -> tuple[float, float, float]:
    """Cohen's kappa and its 95 % interval, cut to [−1, 1]; NaN where both measurements are constant."""
    n = pairs.total
    p = [[pairs.both / n, pairs.first / n], [pairs.second / n, pairs.neither / n]]
    row = [sum(p[i]) for i in (0, 1)]
    column = [p[0][j] + p[1][j] for j in (0, 1)]
    observed = p[0][0] + p[1][1]
    expected = row[0] * column[0] + row[1] * column[1]
    if expected == 1:
        nan = float("nan")
        return nan, nan, nan
    value = (observed - expected) / (1 - expected)
    agree = sum(p[i][i] * (1 - (row[i] + column[i]) * (1 - value)) ** 2 for i in (0, 1))
    differ = (1 - value) ** 2 * sum(p[i][1 - i] * (column[i] + row[1 - i]) ** 2 for i in (0, 1))
    spread = agree + differ - (value - expected * (1 - value)) ** 2
    if spread < NO_SPREAD:
        low, high = ((end - expected) / (1 - expected) for end in wilson(pairs.both + pairs.neither, n))
        return value, max(-1.0, low), high
    half = Z95 * sqrt(spread / n) / (1 - expected)
    return value, max(-1.0, value - half), min(1.0, value + half)


def mcnemar(pairs: Pairs) -> float:
    """Two-sided exact p-value of McNemar's test: could the pairs that differ lean one way by chance?"""
    differ = pairs.first + pairs.second
    tail = sum(comb(differ, i) for i in range(min(pairs.first, pairs.second) + 1))
    return min(1.0, 2 * tail / 2**differ)
