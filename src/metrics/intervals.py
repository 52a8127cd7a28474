"""Score intervals.

Of a share: E. B. Wilson, JASA 22, 1927. Of the difference of two shares of the same rows: T. Tango, Statistics in
Medicine 17, 1998.
"""

from math import sqrt

Z95 = 1.959963984540054
ROUNDING = 1e-9


def wilson(hits: float, total: float) -> tuple[float, float]:
    """95 % interval of ``hits / total``; it stays within [0, 1] and is honest at 0 and at 1.

    Scores between 0 and 1 may count as parts of a hit: they vary less than hits do, so the interval is wide enough. The
    number of trials may be an effective one (:mod:`src.metrics.groups`).

    Raises:
        ValueError: there are no trials, or more hits than trials.
    """
    if total < 1 or not 0 <= hits <= total:
        raise ValueError(f"{hits} hits in {total} trials have no interval")
    share, z2 = hits / total, Z95 * Z95
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = Z95 * sqrt(share * (1 - share) / total + z2 / (4 * total * total)) / (1 + z2 / total)
    # At the ends the bound is exactly 0 or 1; rounding must not move it past.
    return (0.0 if hits == 0 else centre - half), (1.0 if hits == total else centre + half)


def tango(first: float, second: float, total: float) -> tuple[float, float]:
    """95 % interval of the difference ``(first − second) / total`` of two yes/no scores of the same rows.

    It holds the differences Δ that the score test does not reject: ``(b − c − nΔ)² ≤ z² n (2q + Δ(1 − Δ))``, with q the
    likeliest share of rows that only the second has where the difference is Δ. It is honest at −1, 0 and 1.

    Args:
        first: Rows that only the first has (b).
        second: Rows that only the second has (c).
        total: Number of rows (n); with an effective one, the others are that times their shares.

    Raises:
        ValueError: there are no rows, or fewer than those that differ.
    """
    if total < 1 or min(first, second) < 0 or first + second > total * (1 + ROUNDING):
        raise ValueError(f"{first} and {second} of {total} pairs differ; expected at most all of them")
    value = (first - second) / total
    return _rejected(first, second, total, value, -1.0), _rejected(first, second, total, value, 1.0)


def _rejected(b: float, c: float, n: float, inside: float, outside: float) -> float:
    """Where between a difference that the score test accepts and an end of [−1, 1] it begins to reject, by halving."""
    for _ in range(60):
        middle = (inside + outside) / 2
        q = _only_second(b, c, n, middle)
        if (b - c - n * middle) ** 2 <= Z95 * Z95 * n * (2 * q + middle * (1 - middle)):
            inside = middle
        else:
            outside = middle
    return outside


def _only_second(b: float, c: float, n: float, difference: float) -> float:
    """Likeliest share of rows that only the second has, given the difference of the shares."""
    linear = (2 * n - b + c) * difference - b - c
    root = sqrt(max(0.0, linear * linear + 8 * n * c * difference * (1 - difference)))
    return (root - linear) / (4 * n)
