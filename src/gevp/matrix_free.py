"""The leading eigenpairs of a pencil of any representations, from products with vectors alone.

Implicitly restarted Lanczos (ARPACK, through scipy) on ``(F_u + εI)⁻¹ (F_s + σI)`` in the metric F_u + εI. The inverse
is exact (:mod:`src.gevp.inverse`), so that a badly conditioned F_u costs no iterations. What costs them is eigenvalues
close together: those of directions that utility data hardly see gather under σ/ε, the more the larger the ridges and
the more uneven F_u. Where they are among those asked for, the iteration may end after ``PRODUCTS`` without them, and
says so. Residuals are at most ``RESIDUAL``; the relative error of an eigenvalue is no larger (the order of its square
over the relative gap).

Rules for filters, of a patch ``c = Σ_i a_i v_i + r`` with r orthogonal in the metric to the k eigenvectors held:

* one that keeps nothing past these (``topk``, ``energy``, ``threshold``) needs nothing else, and r is dropped;
* ``soft`` is exact: what it makes of r comes from a Krylov space (:mod:`src.gevp.krylov`), the same for every τ; where
  that would have to be larger than ``STEPS``, from conjugate gradients on
  ``(F_s + σI + τ(F_u + εI)) x = (F_s + σI) r`` for this one τ. It takes no eigenpairs, and k may be 0 for it;
* one that keeps everything gives the patch itself;
* all others would need eigenvalues that are not known, and are refused.

Legend of shapes: k eigenpairs, D coordinates, P filters, m dimensions of the Krylov space.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch

from src.gevp.eigensystem import EPS, Eigensystem, Expansion, Filter, condition, rounding, unrounded
from src.gevp.filters import MORE, Soft, TopCut
from src.gevp.inverse import Product, Ridged, ridged, ridged_product
from src.gevp.iterations import TOLERANCE, conjugate_gradients, leading_eigenpairs
from src.gevp.krylov import KrylovSpace
from src.gevp.pencil import Pencil

STEPS = 256
"""Most dimensions of a Krylov space: bounds its memory at 512 · D numbers."""


@dataclass(frozen=True, kw_only=True)
class MatrixFreeSystem(Eigensystem):
    """The k largest eigenvalues; of the others nothing is known but that they are no larger than a bound.

    Attributes:
        vectors: (k, D) eigenvectors, orthonormal in the metric.
        duals: (k, D) the metric times the eigenvectors.
        left: Product with F_s + σI.
        right: F_u + εI.
        following: Eigenvalue number k + 1; ∞ where it is not known.
    """

    vectors: torch.Tensor
    duals: torch.Tensor
    left: Product
    right: Ridged
    following: float

    @property
    def unknown(self) -> int:
        """D − k."""
        return self.dim - len(self.values)

    @property
    def unknown_at_most(self) -> float:
        """Eigenvalue number k + 1."""
        return self.following

    def coordinates(self, patch: torch.Tensor) -> torch.Tensor:
        """(k,) coefficients of a patch (D,)."""
        return self.duals @ patch.double()

    def combine(self, coefficients: torch.Tensor) -> torch.Tensor:
        """(…, D) combinations of coefficients (…, k)."""
        return coefficients @ self.vectors

    def conditions(self) -> dict[str, float | None]:
        """Condition numbers of both sides; None where singular."""
        sides = {"left": ridged(self.pencil.left, self.pencil.sigma), "right": self.right}
        return {name: condition(side.low, side.high, self.dim) for name, side in sides.items()}

    def expand(self, patch: torch.Tensor) -> "MatrixFreeExpansion":
        """A patch in the eigenbasis, as far as that is known."""
        coefficients = self.coordinates(patch)
        outside = patch.double() - self.combine(coefficients)
        # Rounding leaves a little of the eigenvectors in it.
        outside = outside - self.combine(self.coordinates(outside))
        return MatrixFreeExpansion(self, coefficients, outside, patch.double())


@dataclass(frozen=True)
class MatrixFreeExpansion(Expansion):
    """A patch in the leading eigenvectors of a pencil, and the rest of it.

    Attributes:
        patch: (D,) the patch.
    """

    system: MatrixFreeSystem
    outside: torch.Tensor
    patch: torch.Tensor
    _direct: dict[float, torch.Tensor] = field(default_factory=dict)

    @cached_property
    def _space(self) -> KrylovSpace | None:
        """Krylov space of the rest; None where there is no rest."""
        dual = self.system.right.product(self.outside)
        whole = self.coefficients.square().sum() + self.outside @ dual
        if not self.outside @ dual > TOLERANCE**2 * whole:
            return None
        largest = max(self.system.values.tolist(), default=0.0)
        return KrylovSpace(
            self.system.left,
            self.system.right.inverse,
            start=self.outside,
            dual=dual,
            vectors=self.system.vectors,
            duals=self.system.duals,
            most=STEPS,
            largest=largest,
            floor=rounding(self.system.pencil, largest),
        )

    def along(self, phis: Sequence[Filter]) -> torch.Tensor:
        """(P, D) patches filtered by each of several filters.

        Raises:
            ValueError: a filter needs eigenvalues that are not known.
        """
        return torch.stack([self._filtered(phi) for phi in phis])

    def _filtered(self, phi: Filter) -> torch.Tensor:
        system, known = self.system, len(self.coefficients)
        if (isinstance(phi, Soft) and phi.tau == 0) or (isinstance(phi, TopCut) and phi.k == system.dim):
            return self.patch
        if isinstance(phi, TopCut) and phi.k <= known:
            return system.combine(self.coefficients * (torch.arange(known) < phi.k))
        inside = system.combine(self.coefficients * phi(system.values))
        if isinstance(phi, Soft):
            return inside + self._soft_rest(phi.tau)
        if phi(torch.tensor([system.following], dtype=torch.float64)).item() != 0:
            raise ValueError(f"the filter keeps more than the {known} directions that were computed; {MORE}")
        return inside

    def _soft_rest(self, tau: float) -> torch.Tensor:
        """(D,) what ``soft`` makes of the rest."""
        if self._space is None:
            return torch.zeros_like(self.outside)
        coefficients = self._space.soft(tau)
        if coefficients is not None:
            return self._space.combine(coefficients)
        if tau not in self._direct:
            left, right = self.system.left, self.system.right.product
            diagonals = torch.stack(self.system.pencil.diagonals(), 1)
            jacobi = diagonals @ torch.tensor([1.0, tau], dtype=torch.float64)
            self._direct[tau] = conjugate_gradients(lambda v: left(v) + tau * right(v), left(self.outside), jacobi)
        return self._direct[tau]


def without_eigenpairs(pencil: Pencil) -> MatrixFreeSystem:
    """No eigenpairs at all, which is what ``soft`` needs.

    Raises:
        ValueError: the right side is not positive definite.
    """
    left, right = ridged_product(pencil.left, pencil.sigma), ridged(pencil.right, pencil.epsilon)
    if not right.low > EPS * right.high:
        raise ValueError("the right side of the pencil is not positive definite: raise the ridge rho")
    none = torch.zeros(0, pencil.dim, dtype=torch.float64)
    return MatrixFreeSystem(
        pencil=pencil, values=none[:, 0], vectors=none, duals=none, left=left, right=right, following=float("inf")
    )


def solve_matrix_free(pencil: Pencil, *, k: int) -> MatrixFreeSystem:
    """The k largest eigenpairs of a pencil.

    Args:
        pencil: Fisher matrices of any representations, one each side.
        k: Number of eigenpairs, 1 to D − 1.

    Raises:
        ValueError: k is out of range, the right side is not positive definite, or the iteration does not converge.
    """
    if not 1 <= k < pencil.dim:
        raise ValueError(f"k is {k}; expected 1 to D − 1 = {pencil.dim - 1} (the dense solver gives all)")
    system = without_eigenpairs(pencil)
    left, right = system.left, system.right.product
    start = torch.from_numpy(np.random.default_rng(0).standard_normal(pencil.dim))
    found, rows = leading_eigenpairs(left, right, system.right.inverse, count=min(k + 1, pencil.dim - 1), start=start)
    duals = torch.stack([right(row) for row in rows])
    norms = (rows * duals).sum(1).sqrt()[:, None]
    rows, duals = rows / norms, duals / norms
    if len(found) == k:
        found = torch.cat([found, _last(left, right, rows, duals, start)])
    found = unrounded(found, pencil)
    following = min(found[k - 1 :].tolist())
    return replace(system, values=found[:k], vectors=rows[:k], duals=duals[:k], following=following)


def _last(
    left: Product, right: Product, vectors: torch.Tensor, duals: torch.Tensor, start: torch.Tensor
) -> torch.Tensor:
    """(1,) the one eigenvalue that D − 1 eigenvectors (D − 1, D) leave: that of the vector orthogonal to them all."""
    for _ in range(2):
        start = start - (duals @ start) @ vectors
    return ((start @ left(start)) / (start @ right(start)))[None]
