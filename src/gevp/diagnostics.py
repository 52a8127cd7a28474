"""What a solved pencil looks like: numbers for the manifest and data for the plots.

Effective rank is the exponential of the entropy of the normalised eigenvalues (all D of them), between 1 and D.
"""

from typing import Any

import torch

from src.fisher.base import Shapes
from src.gevp.eigensystem import Eigensystem

SPECTRUM_POINTS = 256
"""Most eigenvalues written out: all of them, or so many evenly spaced ranks."""


def effective_rank(values: torch.Tensor) -> float:
    """Exponential of the entropy of values ≥ 0, normalised to sum 1; 0 where all are zero (Roy and Vetterli 2007)."""
    kept = values[values > 0].double()
    if not len(kept):
        return 0.0
    share = kept / kept.sum()
    return (-(share * share.log()).sum()).exp().item()


def summary(system: Eigensystem) -> dict[str, Any]:
    """Spectrum, effective rank and condition numbers of a solved pencil.

    Of the matrix-free solver, the spectrum is its leading part (None where nothing was computed), ``unknown`` says how
    many eigenvalues are missing, and the effective rank, which needs all of them, is None.
    """
    ordered = system.ordered()
    ranks = torch.linspace(0, len(ordered) - 1, min(SPECTRUM_POINTS, len(ordered))).round().long()
    conditions = system.conditions()
    return {
        "dim": system.dim,
        "span": len(system.values),
        "unknown": system.unknown,
        "epsilon": system.pencil.epsilon,
        "sigma": system.pencil.sigma,
        "complement_eigenvalue": system.complement_value if system.complement_dim else None,
        "largest_eigenvalues": system.values[:8].tolist(),
        "effective_rank": None if system.unknown else effective_rank(ordered),
        "condition_safety": conditions["left"],
        "condition_utility": conditions["right"],
        "spectrum": {"rank": (ranks + 1).tolist(), "value": ordered[ranks].tolist()} if len(ordered) else None,
    }


def kept_by_module(filtered: torch.Tensor, whole: torch.Tensor, shapes: Shapes) -> dict[str, float | None]:
    """Norm of each module's filtered patch over that of its whole patch; None where the whole is zero.

    Args:
        filtered: (D,) filtered patch.
        whole: (D,) patch before the filter.
        shapes: (p, q) of each module.
    """
    sizes = [p * q for p, q in shapes.values()]
    parts = zip(shapes, filtered.split(sizes), whole.split(sizes), strict=True)
    return {name: (part.norm() / norm).item() if (norm := before.norm()) > 0 else None for name, part, before in parts}
