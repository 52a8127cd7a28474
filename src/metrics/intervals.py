"""Confidence intervals of a share: Wilson's score interval (E. B. Wilson, JASA 22, 1927)."""

from math import sqrt

Z95 = 1.959963984540054


def wilson(hits: float, total: int) -> tuple[float, float]:
    """95 % interval of ``hits / total``; it stays within [0, 1] and is honest at 0 and at 1.

    Scores between 0 and 1 may count as parts of a hit: they vary less than hits do, so the interval is wide enough.

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
