"""What a filtered patch keeps, measured on calibration rows that did not fit the filter.

On the rows that were fitted the utility tax looks hundreds to thousands of times smaller than it is, so the rows are
split in two: each half fits once and judges once, and shares are means of both.

    safety energy kept = c'ᵀ F_s c' / c0ᵀ F_s c0,     utility tax kept = c'ᵀ F_u c' / c0ᵀ F_u c0

Legend of shapes: P patches, D coordinates.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from src.fisher.base import Fisher
from src.gevp.eigensystem import Eigensystem, Expansion
from src.gevp.filters import MORE, cut_positions, cuts_at, number_of_cuts
from src.gevp.pencil import Pencil
from src.gevp.solve import EIGENPAIRS, solve

CHUNK = 32
"""Filters that are applied together: bounds the memory of a path at 32 · D numbers."""
ENERGY_CUTS = 256
"""Most positions that the ``energy`` rule compares: one for each cut up to this many, else evenly spaced."""
ROUNDING = 1e-12
"""A share that is missed by less is kept."""


@dataclass(frozen=True)
class Fold:
    """A patch in the eigenbasis of one half of the rows, and the Fisher matrices of the other half.

    Attributes:
        expansion: The patch, expanded by the half that fits.
        fitted: F_u of the half that fits.
        safety: F_s of the half that judges.
        utility: F_u of the half that judges.
        whole: c0ᵀ F_s c0 and c0ᵀ F_u c0 on the half that judges, both above 0.
    """

    expansion: Expansion
    fitted: Fisher
    safety: Fisher
    utility: Fisher
    whole: tuple[float, float]

    def kept(self, patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Shares (P,) of safety energy and (P,) of utility tax that patches (P, D) keep."""
        return self.safety.energies(patches) / self.whole[0], self.utility.energies(patches) / self.whole[1]


def split_rows(
    safety: Fisher,
    utility: Fisher,
    patch: torch.Tensor,
    make: Callable[[Fisher, Fisher], Pencil],
    *,
    seed: int,
    eigenpairs: int = EIGENPAIRS,
) -> list[Fold] | None:
    """Both folds, or None where rows can't be split or hold no energy of the patch.

    Args:
        safety: F_s of all rows.
        utility: F_u of all rows.
        patch: (D,) the unfiltered patch c0.
        make: The pencil of two Fisher matrices: settings and controls.
        seed: Seed of the split, where the representation still knows its rows.
        eigenpairs: As for :func:`src.gevp.solve.solve`.
    """
    halves_s, halves_u = safety.halves(seed), utility.halves(seed)
    if halves_s is None or halves_u is None or min(safety.count, utility.count) < 4:
        return None
    folds = []
    for fit in (0, 1):
        judges = halves_s[1 - fit], halves_u[1 - fit]
        whole = judges[0].energy(patch), judges[1].energy(patch)
        if min(*whole, halves_s[fit].trace(), halves_u[fit].trace()) <= 0:
            return None
        expansion = solve(make(halves_s[fit], halves_u[fit]), eigenpairs=eigenpairs).expand(patch)
        folds.append(Fold(expansion, halves_u[fit], *judges, whole))
    return folds


def mean_kept(folds: Sequence[Fold], patches: Sequence[torch.Tensor]) -> dict[str, float]:
    """Mean shares that one filtered patch (D,) per fold keeps."""
    kept = [fold.kept(patch[None]) for fold, patch in zip(folds, patches, strict=True)]
    names = ("safety_energy_kept", "utility_tax_kept")
    return {name: sum(k[i].item() for k in kept) / len(kept) for i, name in enumerate(names)}


def energy_position(folds: Sequence[Fold], share: float) -> float:
    """Where to cut so that a share of the safety energy c0ᵀF_s c0 of held-out rows is kept.

    A k belongs to the spectrum of its own rows, so what is chosen is a position among all cuts (0 to 1): the first one
    from which on the mean over both folds is at least the share. Energy on rows that did not fit may fall as k grows,
    so a cut that keeps the share is passed over where a larger one does not. What is promised:

    * at this position each fold's own cut keeps, in the mean, at least the share: ``safety_energy_kept`` of
      :func:`mean_kept`;
    * a larger share never gives a smaller position;
    * nothing about the cut that all rows have at this position: no row is left to measure it.

    Returns:
        The position; 1, the whole patch, where no other cut keeps the share.

    Raises:
        ValueError: it takes more eigenpairs than were computed.
    """
    positions = cut_positions(_finest(folds), ENERGY_CUTS)
    kept, _ = _mean_shares(folds, positions)
    # The last cut is the whole patch, whatever rounding makes of its share.
    kept[-1] = float("inf")
    least = kept.flip(0).cummin(0).values.flip(0)
    where = positions[int((least >= share - ROUNDING).nonzero()[0])]
    if where == 1 and (system := folds[0].expansion.system).unknown:
        raise ValueError(
            f"the {len(system.values)} leading directions, of {system.dim}, keep less than the share {share} of the "
            f"safety energy of held-out rows; {MORE}"
        )
    return where


def curve(folds: Sequence[Fold], points: int = 33) -> dict[str, list[float]]:
    """Cumulative held-out shares over at most so many evenly spaced ``topk`` cuts, means over the folds."""
    positions = cut_positions(_finest(folds), points)
    safety, utility = _mean_shares(folds, positions)
    return {"position": positions, "safety_energy_kept": safety.tolist(), "utility_tax_kept": utility.tolist()}


def _finest(folds: Sequence[Fold]) -> Eigensystem:
    """The spectrum with most cuts."""
    return max((fold.expansion.system for fold in folds), key=number_of_cuts)


def _mean_shares(folds: Sequence[Fold], positions: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Shares (P,) of safety energy and (P,) of utility tax that the cuts at positions keep, means over the folds."""
    found = torch.empty(len(folds), 2, len(positions), dtype=torch.float64)
    for shares, fold in zip(found, folds, strict=True):
        cuts = cuts_at(fold.expansion.system, positions)
        for start in range(0, len(cuts), CHUNK):
            some = slice(start, start + CHUNK)
            shares[:, some] = torch.stack(fold.kept(fold.expansion.along(cuts[some])))
    safety, utility = found.mean(0)
    return safety, utility
