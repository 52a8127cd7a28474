"""The leading eigenpairs of a pencil of any representations, from products with vectors alone.

Implicitly restarted Lanczos (ARPACK, through scipy) on ``(F_u + εI)⁻¹ (F_s + σI)`` in the metric F_u + εI; the inverse
is applied by conjugate gradients. The ridge bounds the condition of F_u + εI by D/ρ + 1.

Rules for filters, of a patch ``c = Σ_i a_i v_i + r`` with r orthogonal in the metric to the k eigenvectors held:

* one that keeps nothing past these (``topk``, ``energy``, ``threshold``) needs nothing else, and r is dropped;
* ``soft`` is exact: what it makes of r comes from a Krylov space (:mod:`src.gevp.krylov`), the same for every τ; where
  that would have to be larger than ``STEPS``, from conjugate gradients on
  ``(F_s + σI + τ(F_u + εI)) x = (F_s + σI) r`` for this one τ;
* one that keeps everything gives the patch itself;
* all others would need eigenvalues that are not known, and are refused.

Legend of shapes: k eigenpairs, D coordinates, P filters, m dimensions of the Krylov space.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, cg, eigsh

from src.fisher.base import Fisher
from src.gevp.eigensystem import Eigensystem, Expansion, Filter, condition
from src.gevp.filters import MORE, Soft, TopCut
from src.gevp.krylov import KrylovSpace
from src.gevp.pencil import Pencil

Product = Callable[[torch.Tensor], torch.Tensor]
TOLERANCE = 1e-12
"""Relative residual of every linear solve."""
STEPS = 256
"""Most dimensions of a Krylov space: bounds its memory at 512 · D numbers."""
RESTARTS = 300
"""Most restarts of Lanczos for a condition number."""


def ridged_product(fisher: Fisher | None, ridge: float) -> Product:
    """``v ↦ (F + ridge · I) v``; None is the zero matrix."""
    if fisher is None:
        return lambda vector: ridge * vector
    return lambda vector: fisher.matvec(vector) + ridge * vector


def conjugate_gradients(product: Product, target: torch.Tensor) -> torch.Tensor:
    """Solve ``M x = b`` for a symmetric positive definite M given as a product, to a relative residual of 1e-12.

    Raises:
        ValueError: it does not converge in 20 D steps: M is singular or too badly conditioned.
    """
    found, failed = cg(
        _operator(product, len(target)), target.double().numpy(), rtol=TOLERANCE, maxiter=20 * len(target)
    )
    if failed or not np.isfinite(found).all():
        raise ValueError("conjugate gradients did not converge: raise the ridges rho and rho_s")
    return torch.from_numpy(found)


def _operator(product: Product, dim: int) -> LinearOperator:
    def multiply(vector: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        return product(torch.from_numpy(np.ascontiguousarray(vector, dtype=np.float64).reshape(-1))).numpy()

    return LinearOperator((dim, dim), matvec=multiply, dtype=np.float64)


@dataclass(frozen=True, kw_only=True)
class MatrixFreeSystem(Eigensystem):
    """The k largest eigenvalues; of the others nothing is known but that they are no larger than a bound.

    Attributes:
        vectors: (k, D) eigenvectors, orthonormal in the metric.
        duals: (k, D) the metric times the eigenvectors.
        left: Product with F_s + σI.
        right: Product with F_u + εI.
        following: Eigenvalue number k + 1.
    """

    vectors: torch.Tensor
    duals: torch.Tensor
    left: Product
    right: Product
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
        """Condition numbers of both sides by Lanczos; None where singular or not converged."""
        sides = {"left": self.left, "right": self.right}
        return {name: _condition(side, self.dim) for name, side in sides.items()}

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
        dual = self.system.right(self.outside)
        whole = self.coefficients.square().sum() + self.outside @ dual
        if not self.outside @ dual > TOLERANCE**2 * whole:
            return None
        return KrylovSpace(
            self.system.left,
            lambda vector: conjugate_gradients(self.system.right, vector),
            start=self.outside,
            dual=dual,
            vectors=self.system.vectors,
            duals=self.system.duals,
            most=STEPS,
        )

    def along(self, phis: Sequence[Filter]) -> torch.Tensor:
        """(P, D) patches filtered by each of several filters.

        Raises:
            ValueError: a filter needs eigenvalues that are not known.
        """
        return torch.stack([self._filtered(phi) for phi in phis])

    def fitted_energies(self, phi: Filter) -> tuple[float, float]:
        """``cᵀ(F_s + σI)c`` and ``cᵀ(F_u + εI)c`` of the filtered patch, by products; on the rows that were fitted."""
        made = self.at(phi)
        return (made @ self.system.left(made)).item(), (made @ self.system.right(made)).item()

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
            left, right = self.system.left, self.system.right
            self._direct[tau] = conjugate_gradients(lambda v: left(v) + tau * right(v), left(self.outside))
        return self._direct[tau]


def _condition(product: Product, dim: int) -> float | None:
    """Condition number of a symmetric matrix given as a product."""
    start = np.random.default_rng(0).standard_normal(dim)
    ends = []
    for which in ("SA", "LA"):
        options = {"which": which, "v0": start, "maxiter": RESTARTS, "return_eigenvectors": False}
        try:
            ends.append(eigsh(_operator(product, dim), 1, **options)[0])
        except ArpackNoConvergence:
            return None
    low, high = ends
    return condition(low, high, dim)


def solve_matrix_free(pencil: Pencil, *, k: int, seed: int = 0) -> MatrixFreeSystem:
    """The k largest eigenpairs of a pencil.

    Args:
        pencil: Fisher matrices of any representations, one each side.
        k: Number of eigenpairs, 1 to D − 1.
        seed: Seed of the start vector.

    Raises:
        ValueError: k is out of range, or the iteration does not converge.
    """
    if not 1 <= k < pencil.dim:
        raise ValueError(f"k is {k}; expected 1 to D − 1 = {pencil.dim - 1} (the dense solver gives all)")
    left, right = ridged_product(pencil.left, pencil.sigma), ridged_product(pencil.right, pencil.epsilon)
    start = np.random.default_rng(seed).standard_normal(pencil.dim)
    try:
        values, vectors = eigsh(
            _operator(left, pencil.dim),
            min(k + 1, pencil.dim - 1),
            M=_operator(right, pencil.dim),
            Minv=_operator(lambda vector: conjugate_gradients(right, vector), pencil.dim),
            which="LA",
            v0=start,
        )
    except ArpackNoConvergence as error:
        raise ValueError(f"the eigenvalue iteration did not converge ({error}): ask for fewer than k = {k}") from None
    order = np.argsort(-values)
    rows = torch.from_numpy(np.ascontiguousarray(vectors.T[order]))
    duals = torch.stack([right(row) for row in rows])
    norms = (rows * duals).sum(1).sqrt()[:, None]
    rows, duals = rows / norms, duals / norms
    found = torch.from_numpy(values[order].copy()).clamp_min(0.0)
    last = found[k].item() if k < len(found) else _last(left, right, rows, duals, torch.from_numpy(start))
    return MatrixFreeSystem(
        pencil=pencil,
        values=found[:k],
        vectors=rows[:k],
        duals=duals[:k],
        left=left,
        right=right,
        following=min(last, found[k - 1].item()),
    )


def _last(left: Product, right: Product, vectors: torch.Tensor, duals: torch.Tensor, start: torch.Tensor) -> float:
    """The one eigenvalue that D − 1 eigenvectors (D − 1, D) leave: that of the vector orthogonal to them all."""
    for _ in range(2):
        start = start - (duals @ start) @ vectors
    return max(0.0, (start @ left(start)).item() / (start @ right(start)).item())
