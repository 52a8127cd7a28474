"""A solved pencil of a patch, with what is measured on held-out rows: computed once, used by every filter of a path."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from src.fisher.base import Fisher
from src.gevp.diagnostics import summary
from src.gevp.eigensystem import Expansion
from src.gevp.heldout import Fold, curve, split_rows
from src.gevp.pencil import Pencil
from src.gevp.solve import EIGENPAIRS, solve


@dataclass(frozen=True)
class Solved:
    """A patch in the eigenbasis of all rows, and of each half of them.

    Attributes:
        whole: (D,) the unfiltered patch.
        expansion: The patch, expanded by all rows.
        fitted: F_u of all rows.
        folds: Both halves, or None where rows can't be split.
        findings: Numbers for the manifest that no filter changes.
    """

    whole: torch.Tensor
    expansion: Expansion
    fitted: Fisher
    folds: list[Fold] | None
    findings: dict[str, Any]


def solve_once(
    safety: Fisher,
    utility: Fisher,
    whole: torch.Tensor,
    make: Callable[[Fisher, Fisher], Pencil],
    *,
    seed: int,
    eigenpairs: int = EIGENPAIRS,
) -> Solved:
    """Solve a pencil on all rows, and on each half where rows can be split: three eigendecompositions at most.

    Args:
        safety: F_s.
        utility: F_u.
        whole: (D,) the unfiltered patch.
        make: The pencil of two Fisher matrices: ridges and controls.
        seed: Seed of the split of rows.
        eigenpairs: As for :func:`src.gevp.solve.solve`.
    """
    expansion = solve(make(safety, utility), eigenpairs=eigenpairs).expand(whole)
    folds = split_rows(safety, utility, whole, make, seed=seed, eigenpairs=eigenpairs)
    findings = summary(expansion.system) | {
        "representation": "+".join(dict.fromkeys([safety.representation, utility.representation]))
    }
    known = folds is not None and all(len(fold.expansion.system.values) for fold in folds)
    findings["held_out_curve"] = curve(folds) if folds is not None and known else None
    return Solved(whole, expansion, utility, folds, findings)
