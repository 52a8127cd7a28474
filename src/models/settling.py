"""Choices as exact products have them, from products that round: only what is close is computed again.

A processor may multiply bfloat16 several times as fast as float32. That moves log-likelihoods by some hundredths of a
nat, which matters only where two choices are about as likely. So a batch is scored in the fast mode, its closest rows
again in the exact one; their differences tell how far rounding moves scores here, and all other rows that are not
clearly further apart are computed again, too.
"""

from collections.abc import Callable, Sequence
from itertools import combinations
from math import hypot, inf, isfinite, nan, sqrt

SURE = 8.0
"""A choice stands where it leads by so many times what rounding does (root mean square of the rows known both ways)."""
MOST_SHARED = 0.1
"""Share of a batch's tokens that may be a beginning common to its rows: it is computed again with the close ones.

With five worked examples of MMLU (a fifth of the tokens) it took a quarter longer than exact products alone.
"""
FEWEST = 2
"""Rows of a batch, at least, that are computed both ways, …"""
ONE_IN = 16
"""… and one in so many."""


def settle(
    rough: Sequence[Sequence[float]],
    weights: Sequence[Sequence[Sequence[float]]],
    exact: Callable[[list[int]], Sequence[Sequence[float]]],
) -> set[int]:
    """Compute exact scores of all rows whose choice might be another than the rough scores say.

    Args:
        rough: Scores (nats) of each row's choices, from products that round.
        weights: Of each row, one factor per choice for each way of choosing: the choice is the largest product of
            score and factor, in every one of these ways.
        exact: Computes the scores of some rows, given by their positions.

    Returns:
        The positions of rows computed exactly; of all others the choice is that of the rough scores.
    """
    leads = [min(lead(scores, factors) for factors in ways) for scores, ways in zip(rough, weights, strict=True)]
    closest = sorted(range(len(rough)), key=leads.__getitem__)
    found: set[int] = set()
    squares: list[float] = []
    wanted = closest[: max(FEWEST, len(rough) // ONE_IN)]
    while wanted:
        for row, scores in zip(wanted, exact(wanted), strict=True):
            found.add(row)
            errors = [a - b for a, b in zip(rough[row], scores, strict=True)]
            for factors in weights[row]:
                squares += [gap(*pair) ** 2 for pair in combinations(zip(errors, factors, strict=True), 2)]
        rounding = sqrt(sum(squares) / max(1, len(squares)))
        # Written so that a score that is no number is computed again, and with it all others.
        wanted = [row for row in closest if row not in found and not leads[row] > SURE * rounding]
    return found


def gap(one: tuple[float, float], other: tuple[float, float]) -> float:
    """How far apart two values are, times their factors: (w_i x_i − w_j x_j) / √(w_i² + w_j²).

    Independent errors of one size in both values move it by that size, whatever the factors.
    """
    (first, factor), (second, its_factor) = one, other
    return (factor * first - its_factor * second) / hypot(factor, its_factor)


def lead(scores: Sequence[float], factors: Sequence[float]) -> float:
    """The smallest gap of the chosen one to another: infinite for a single one, NaN where a score is no number."""
    if not all(map(isfinite, scores)):
        return nan
    given = list(zip(scores, factors, strict=True))
    best = max(range(len(given)), key=lambda i: given[i][0] * given[i][1])
    return min((gap(given[best], pair) for i, pair in enumerate(given) if i != best), default=inf)
