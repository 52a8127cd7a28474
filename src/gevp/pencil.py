"""The pencil of two Fisher matrices with a ridge on each side, and its controls.

    (F_s + σI) v = λ (F_u + εI) v,     ε = ρ tr(F_u)/D,   σ = ρ_s tr(F_s)/D

Legend: D coordinates.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from src.fisher.base import Fisher, ModuleFisher

PencilControl = Literal["none", "safety_only", "utility_only", "swapped"]


@dataclass(frozen=True)
class Pencil:
    """Both sides, each a Fisher matrix and a ridge.

    Attributes:
        left: F_s; None is the zero matrix.
        right: F_u; None is the zero matrix.
        sigma: Ridge σ of the left side.
        epsilon: Ridge ε of the right side, above 0.
        dim: D.
        trace_ratio: tr(F_s) / tr(F_u), the natural unit of an exchange rate τ.
    """

    left: Fisher | None
    right: Fisher | None
    sigma: float
    epsilon: float
    dim: int
    trace_ratio: float

    @property
    def sides(self) -> tuple[tuple[Fisher | None, float], tuple[Fisher | None, float]]:
        """Matrix and ridge of the left side, and of the right one."""
        return (self.left, self.sigma), (self.right, self.epsilon)

    def diagonals(self) -> list[torch.Tensor]:
        """Diagonals (D,) of F_s + σI and of F_u + εI."""
        zero = torch.zeros(self.dim, dtype=torch.float64)
        return [(zero if fisher is None else fisher.diagonal()) + ridge for fisher, ridge in self.sides]


def common_shapes(*sides: Fisher | None) -> dict[str, tuple[int, int]]:
    """(p, q) of each module of both sides, of which one may be None.

    Raises:
        ValueError: the modules differ.
    """
    first, *others = [side.shapes for side in sides if isinstance(side, ModuleFisher)]
    if any(list(shapes.items()) != list(first.items()) for shapes in others):
        raise ValueError("F_s and F_u are of different modules; measure both in one run")
    return first


def checked_trace(name: str, fisher: Fisher) -> float:
    """Trace of a Fisher matrix, which relative ridges and weights are multiples of.

    Raises:
        ValueError: the matrix is zero or not finite; the message names it.
    """
    trace = fisher.trace()
    if not 0 < trace < float("inf"):
        raise ValueError(f"the {name} Fisher matrix is zero or not finite (trace {trace:.3g})")
    return trace


def make_pencil(
    safety: Fisher, utility: Fisher, *, rho: float, rho_s: float, control: PencilControl = "none"
) -> Pencil:
    """The pencil of F_s and F_u, or a control in its place.

    Args:
        safety: F_s over D coordinates.
        utility: F_u over the same coordinates.
        rho: Relative ridge of the right side, above 0.
        rho_s: Relative ridge of the left side, at least 0; 0 drops what neither data set has seen.
        control: ``safety_only`` puts a multiple of the identity of the same trace in F_u's place, ``utility_only`` in
            F_s's place; ``swapped`` exchanges the matrices.

    Raises:
        ValueError: dimensions differ, a ridge is out of range, or a Fisher matrix is zero.
    """
    if safety.dim != utility.dim:
        raise ValueError(f"F_s has {safety.dim} coordinates, F_u {utility.dim}")
    if not 0 < rho < float("inf"):
        raise ValueError(f"rho is {rho}; expected a number above 0")
    if not 0 <= rho_s < float("inf"):
        raise ValueError(f"rho_s is {rho_s}; expected a number of at least 0")
    dim, sides = safety.dim, [(safety, checked_trace("safety", safety)), (utility, checked_trace("utility", utility))]
    (left, trace_l), (right, trace_r) = reversed(sides) if control == "swapped" else sides
    return Pencil(
        left=None if control == "utility_only" else left,
        right=None if control == "safety_only" else right,
        sigma=(rho_s + (control == "utility_only")) * trace_l / dim,
        epsilon=(rho + (control == "safety_only")) * trace_r / dim,
        dim=dim,
        trace_ratio=trace_l / trace_r,
    )
