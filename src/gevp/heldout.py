"""What a filtered patch keeps, measured on calibration rows that did not fit the filter.

On the rows that were fitted the utility tax looks hundreds to thousands of times smaller than it is (method.md section
8), so the rows are split in two: each half fits once and judges once, and shares are means of both.

    safety energy kept = c'ᵀ F_s c' / c0ᵀ F_s c0,     utility tax kept = c'ᵀ F_u c' / c0ᵀ F_u c0

Legend of shapes: P patches, D coordinates.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from src.fisher.base import Fisher
from src.gevp.eigensystem import Expansion
from src.gevp.filters import MORE, cut_at, position, valid_cuts
from src.gevp.pencil import Pencil
from src.gevp.solve import EIGENPAIRS, solve

CHUNK = 32
"""Filters that are applied together: bounds the memory of a path at 32 · D numbers."""
ENERGY_CUTS = 256
"""Most cuts that the ``energy`` rule compares: all of them up to this many, else so many evenly spaced."""


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

    In each fold, the smallest k that keeps it; a k belongs to the spectrum of its own rows, so what is averaged and
    handed on is its position among all cuts (0 to 1).

    Raises:
        ValueError: it takes more eigenpairs than were computed.
    """
    found = []
    for fold in folds:
        cuts = valid_cuts(fold.expansion.system, ENERGY_CUTS)
        for start in range(0, len(cuts), CHUNK):
            safety, _ = fold.kept(fold.expansion.along(cuts[start : start + CHUNK]))
            if (enough := (safety >= share).nonzero()).numel():
                k = cuts[start + int(enough[0])].k
                break
        else:
            # The last cut keeps the whole patch: its share is 1 up to rounding.
            k = cuts[-1].k
        if (system := fold.expansion.system).unknown and k == system.dim:
            raise ValueError(
                f"the {len(system.values)} leading directions, of {k}, keep less than the share {share} of the safety "
                f"energy of held-out rows; {MORE}"
            )
        found.append(position(fold.expansion.system, k))
    return sum(found) / len(found)


def curve(folds: Sequence[Fold], points: int = 33) -> dict[str, list[float]]:
    """Cumulative held-out shares over ``topk`` cuts at evenly spaced positions, means over the folds."""
    positions = [i / (points - 1) for i in range(points)]
    sides: list[list[torch.Tensor]] = [[], []]
    for fold in folds:
        cuts = [cut_at(fold.expansion.system, where) for where in positions]
        paths = [fold.expansion.along(cuts[start : start + CHUNK]) for start in range(0, points, CHUNK)]
        for side, shares in zip(sides, zip(*(fold.kept(path) for path in paths), strict=True), strict=True):
            side.append(torch.cat(shares))
    safety, utility = (torch.stack(side).mean(0).tolist() for side in sides)
    return {"position": positions, "safety_energy_kept": safety, "utility_tax_kept": utility}
