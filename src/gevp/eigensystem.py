"""Eigenpairs of a ridged pencil, and the application of a filter to a patch in the metric of its right side.

    (F_s + σI) v = λ (F_u + εI) v,    Vᵀ (F_u + εI) V = I
    c' = Σ_i φ(λ_i) v_i v_iᵀ (F_u + εI) c

Where m < D eigenvectors are held, both matrices are multiples of the identity on the rest, so every direction there
is an eigenvector of λ = σ/ε: the *complement*, D − m eigenvalues that are one number. The matrix-free solver alone
knows no complement: of its D − m other eigenvalues only an upper bound is known.

Legend of shapes: m eigenvectors held, D coordinates, P filters.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from src.gevp.pencil import Pencil

NOISE = 1e-13
"""Eigenvalues, and differences of them, under this share of the largest are rounding."""
EPS = torch.finfo(torch.float64).eps
Filter = Callable[[torch.Tensor], torch.Tensor]
"""Maps eigenvalues to factors, elementwise."""


@dataclass(frozen=True, kw_only=True)
class Eigensystem(ABC):
    """Solved pencil, in float64.

    Attributes:
        pencil: What was solved.
        values: (m,) eigenvalues, descending, without rounding (:func:`unrounded`).
    """

    pencil: Pencil
    values: torch.Tensor

    @property
    def dim(self) -> int:
        """D."""
        return self.pencil.dim

    @property
    def unknown(self) -> int:
        """Number of eigenvalues that were not computed, none of them above those held; 0 where all D are known."""
        return 0

    @property
    def unknown_at_most(self) -> float:
        """Upper bound of the eigenvalues that were not computed; −∞ where there are none."""
        return float("-inf")

    @property
    def complement_dim(self) -> int:
        """D − m, where the others are known to be σ/ε."""
        return self.dim - len(self.values) - self.unknown

    @property
    def complement_value(self) -> float:
        """Eigenvalue σ/ε of the complement."""
        return self.pencil.sigma / self.pencil.epsilon

    def ordered(self) -> torch.Tensor:
        """(D − unknown,) all known eigenvalues, descending."""
        rest = torch.full((self.complement_dim,), self.complement_value, dtype=torch.float64)
        return torch.cat([self.values, rest]).sort(descending=True).values

    @abstractmethod
    def coordinates(self, patch: torch.Tensor) -> torch.Tensor:
        """(m,) coefficients ``Vᵀ (F_u + εI) c`` of a patch (D,)."""

    @abstractmethod
    def combine(self, coefficients: torch.Tensor) -> torch.Tensor:
        """(…, D) combinations ``V a`` of coefficients (…, m)."""

    @abstractmethod
    def conditions(self) -> dict[str, float | None]:
        """Condition numbers of the sides ``left`` and ``right``; None where singular or not known."""

    def expand(self, patch: torch.Tensor) -> "Expansion":
        """A patch in the eigenbasis: every filter of it then costs one small product."""
        coefficients = self.coordinates(patch)
        outside = patch.double() - self.combine(coefficients) if self.complement_dim else None
        return Expansion(self, coefficients, outside)


@dataclass(frozen=True)
class Expansion:
    """A patch in the eigenbasis of a pencil.

    Attributes:
        system: The eigenpairs.
        coefficients: (m,) ``Vᵀ (F_u + εI) c``.
        outside: (D,) the patch's part in the complement; None where there is none.
    """

    system: Eigensystem
    coefficients: torch.Tensor
    outside: torch.Tensor | None

    def at(self, phi: Filter) -> torch.Tensor:
        """(D,) patch filtered by φ; its part in the complement is multiplied by φ(σ/ε)."""
        return self.along([phi])[0]

    def along(self, phis: Sequence[Filter]) -> torch.Tensor:
        """(P, D) patches filtered by each of several filters."""
        kept = torch.stack([phi(self.system.values) for phi in phis])
        path = self.system.combine(kept * self.coefficients)
        if self.outside is None:
            return path
        rest = torch.tensor([self.system.complement_value], dtype=torch.float64)
        return path + torch.cat([phi(rest) for phi in phis])[:, None] * self.outside


def rounding(pencil: Pencil, largest: float) -> float:
    """What rounding may make of an eigenvalue 0, given the largest one; 0 where F_s has a ridge, and none is 0.

    Of a vector v of length 1 in the metric, at most ε^(-½) long, ``vᵀ F_s v`` is known to ``EPS · tr(F_s) / ε``.
    """
    if pencil.sigma > 0 or pencil.left is None:
        return 0.0
    return max(NOISE * largest, EPS * pencil.left.trace() / pencil.epsilon)


def unrounded(values: torch.Tensor, pencil: Pencil) -> torch.Tensor:
    """Eigenvalues (m,) without what only rounding made of 0, so that no filter takes it for safety energy.

    Both sides are positive semi-definite, so negative ones are 0. Where F_s has no ridge, λ = 0 for all directions that
    no safety row has seen.
    """
    return values.where(values > rounding(pencil, values.max().item()), 0.0)


def condition(low: float, high: float, size: int) -> float | None:
    """Condition number of a symmetric matrix of this size with these extreme eigenvalues; None for a singular one."""
    return high / low if low > size * EPS * high else None
