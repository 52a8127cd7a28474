"""Filters φ(λ): which share of each eigen-direction of a patch is kept.

* ``soft``: λ / (λ + τ), the solution of ``min_c (c−c0)ᵀ(F_s+σI)(c−c0) + τ cᵀ(F_u+εI)c``
* ``threshold``: 1 if λ > τ
* ``topk``: 1 for the k largest λ, the projection on the safety subspace in the metric F_u + εI
* ``energy``: ``topk`` at the smallest k from which on a share of the safety energy of held-out rows is kept
  (:func:`src.gevp.heldout.energy_position`)

Where a solver has computed the leading eigenpairs alone, a filter that keeps more than these and less than everything
is refused; ``soft`` needs none of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from src.gevp.eigensystem import NOISE, Eigensystem

TIE = 1e-9
"""Eigenvalues this close, relatively, are one eigenvalue: its eigenvectors are an arbitrary basis of their span."""
MORE = "expected fewer, or more eigenpairs of the matrix-free solver (--method.eigenpairs)"


@dataclass(frozen=True)
class Soft:
    """λ / (λ + τ); τ = 0 keeps everything."""

    tau: float

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        """Factors of eigenvalues."""
        return torch.ones_like(values) if self.tau == 0 else values / (values + self.tau)


@dataclass(frozen=True)
class Cut:
    """1 for eigenvalues above a threshold, of which there are k."""

    above: float
    k: int

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        """Factors of eigenvalues."""
        return (values > self.above).to(values.dtype)


class TopCut(Cut):
    """A cut by rank: exactly the k largest, whatever is known of the others."""


def soft(tau: float) -> Soft:
    """λ / (λ + τ) for an exchange rate τ ≥ 0 in units of safety energy per utility energy; τ = 0 keeps everything.

    Raises:
        ValueError: τ is negative or not a number.
    """
    return Soft(_rate(tau))


def threshold(system: Eigensystem, tau: float) -> Cut:
    """1 if λ > τ.

    Raises:
        ValueError: τ is negative or not a number, or more eigenvalues may lie above it than were computed.
    """
    above, known = _rate(tau), system.ordered()
    if system.unknown_at_most > above:
        least = f" (down to {known[-1]:.3g})" if len(known) else ""
        raise ValueError(
            f"tau is {tau:.3g}: the filter keeps more than the {len(known)} directions that were computed{least}; "
            f"{MORE}"
        )
    return Cut(above, int((known > above).sum()))


def topk(system: Eigensystem, k: int) -> TopCut:
    """1 for the k largest of all D eigenvalues.

    Raises:
        ValueError: k is out of 1..D, more than were computed and less than D, or the cut falls inside an eigenvalue's
            multiplicity (such as the complement's), where it would depend on an arbitrary basis.
    """
    if not 1 <= k <= system.dim:
        raise ValueError(f"k is {k}; expected 1 to D = {system.dim}")
    ordered = system.ordered()
    if len(ordered) < k < system.dim:
        raise ValueError(f"k is {k}, and {len(ordered)} of {system.dim} eigenpairs were computed; {MORE}")
    levels = _levels(system)
    allowed = _allowed(system, levels)
    if k not in allowed:
        below, above = allowed[allowed < k], allowed[allowed > k]
        least = below[-1].item() if len(below) else 0
        unseen = abs(ordered[k - 1] - system.complement_value) <= TIE * system.complement_value
        what = " that no calibration row has seen" if unseen and system.complement_dim else ""
        raise ValueError(
            f"k is {k}, which cuts through {above[0] - least} directions{what} (one eigenvalue, "
            f"{ordered[k - 1]:.3g}); expected {f'at most {least} or ' if least else ''}at least {above[0]}"
        )
    return _cut(system, levels, k)


def number_of_cuts(system: Eigensystem) -> int:
    """Number of valid cuts, the whole patch among them."""
    return len(_allowed(system, _levels(system)))


def position(system: Eigensystem, k: int) -> float:
    """Where a cut stands among all valid ones, 0 to 1: what carries over to the spectrum of other rows.

    Directions that no row has seen have one eigenvalue, σ/ε, and are kept together or not at all. Cuts above it have
    the places up to ½, the others those beyond: whatever the numbers of rows, no rounding takes one for the other.
    """
    allowed, seen = _parted(system)
    return _place(int((allowed < k).sum()), len(allowed), seen)


def cut_positions(system: Eigensystem, most: int) -> list[float]:
    """Positions of at most so many valid cuts, evenly spaced among all, the first and the whole patch among them."""
    allowed, seen = _parted(system)
    number, last = min(most, len(allowed)), len(allowed) - 1
    chosen = {round(i / (number - 1) * last) for i in range(number - 1)} | {last}
    return [_place(index, len(allowed), seen) for index in sorted(chosen)]


def cut_at(system: Eigensystem, where: float) -> TopCut:
    """The valid cut nearest to a position between 0 and 1."""
    return cuts_at(system, [where])[0]


def cuts_at(system: Eigensystem, positions: Sequence[float]) -> list[TopCut]:
    """The valid cut nearest to each of several positions between 0 and 1."""
    levels, cuts = _levels(system), []
    allowed, seen = _parted(system)
    for where in positions:
        index = _index(where, len(allowed), seen)
        if system.unknown and where < 1 and len(allowed) > 1:
            # Between the last known cut and the whole patch lie all that are not: rounding must not leap over them.
            index = min(index, len(allowed) - 2)
        cuts.append(_cut(system, levels, int(allowed[index])))
    return cuts


def _parted(system: Eigensystem) -> tuple[torch.Tensor, int]:
    """All valid cuts, and how many of them, the whole patch apart, keep eigenvalues above σ/ε alone."""
    levels, value = _levels(system), system.complement_value
    allowed, noise = _allowed(system, levels), TIE * value + NOISE * levels[0].item()
    above = int((allowed <= int((levels > value + noise).sum())).sum())
    return allowed, min(above, len(allowed) - 1)


def _place(index: int, number: int, seen: int) -> float:
    """Position of one of so many cuts."""
    if index < seen:
        return 0.5 * index / max(1, seen - 1)
    return 0.5 + 0.5 * (index - seen + 1) / (number - seen)


def _index(where: float, number: int, seen: int) -> int:
    """The cut nearest to a position: the inverse of :func:`_place`."""
    if where <= 0.5 and seen:
        return round(2 * where * (seen - 1))
    return seen + max(0, round((2 * where - 1) * (number - seen)) - 1)


def _levels(system: Eigensystem) -> torch.Tensor:
    """Known eigenvalues, descending, and the largest that the others can have."""
    bound = torch.full((min(system.unknown, 1),), system.unknown_at_most, dtype=torch.float64)
    return torch.cat([system.ordered(), bound])


def _allowed(system: Eigensystem, levels: torch.Tensor) -> torch.Tensor:
    """Every k, ascending, whose cut lies between two eigenvalues that are known to differ; D is always one."""
    distinct = levels[:-1] - levels[1:] > TIE * levels[:-1] + NOISE * levels[0]
    return torch.cat([distinct.nonzero().squeeze(1) + 1, torch.tensor([system.dim])])


def _cut(system: Eigensystem, levels: torch.Tensor, k: int) -> TopCut:
    return TopCut(((levels[k - 1] + levels[k]) / 2).item() if k < system.dim else float("-inf"), k)


def _rate(tau: float) -> float:
    if not 0 <= tau < float("inf"):
        raise ValueError(f"tau is {tau}; expected a number of at least 0")
    return tau
