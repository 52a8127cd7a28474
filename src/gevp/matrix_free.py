"""The leading eigenpairs of a pencil of any representations, from products with vectors alone.

Implicitly restarted Lanczos (ARPACK, through scipy) on ``(F_u + εI)⁻¹ (F_s + σI)`` in the metric F_u + εI; the inverse
is applied by conjugate gradients. The ridge bounds the condition of F_u + εI by D/ρ + 1. The ``soft`` filter needs no
eigenpair: it is the solution of ``(F_s + σI + τ(F_u + εI)) c' = (F_s + σI) c``, by conjugate gradients.

Legend of shapes: k eigenpairs, D coordinates.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, cg, eigsh

from src.fisher.base import Fisher
from src.gevp.eigensystem import Eigensystem, Expansion, Filter
from src.gevp.filters import Soft, TopCut
from src.gevp.pencil import Pencil

Product = Callable[[torch.Tensor], torch.Tensor]
TOLERANCE = 1e-12
"""Relative residual of every linear solve."""


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
    """The k largest eigenvalues; of the others nothing is known but that they are smaller.

    Attributes:
        vectors: (k, D) eigenvectors, orthonormal in the metric.
        duals: (k, D) the metric times the eigenvectors.
        left: Product with F_s + σI.
        right: Product with F_u + εI.
    """

    vectors: torch.Tensor
    duals: torch.Tensor
    left: Product
    right: Product

    @property
    def complement_value(self) -> float:
        """0, under every eigenvalue not held."""
        return 0.0

    def coordinates(self, patch: torch.Tensor) -> torch.Tensor:
        """(k,) coefficients of a patch (D,)."""
        return self.duals @ patch.double()

    def combine(self, coefficients: torch.Tensor) -> torch.Tensor:
        """(…, D) combinations of coefficients (…, k)."""
        return coefficients @ self.vectors

    def conditions(self) -> dict[str, float | None]:
        """Not known from a few eigenpairs."""
        return {"left": None, "right": None}

    def expand(self, patch: torch.Tensor) -> Expansion:
        """Not to be had: a path over filters needs every eigenpair.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"{len(self.values)} eigenpairs of {self.dim} make no path; filter one by one, with apply")

    def apply(self, patch: torch.Tensor, phi: Filter) -> torch.Tensor:
        """Filter a patch (D,).

        Raises:
            ValueError: the filter keeps directions past the k that were computed.
        """
        if isinstance(phi, Soft):
            if phi.tau == 0:
                return patch.double()
            target = self.left(patch.double())
            return conjugate_gradients(lambda vector: self.left(vector) + phi.tau * self.right(vector), target)
        whole = isinstance(phi, TopCut) and phi.k == len(self.values)
        if not whole and phi(self.values[-1:]).item() != 0:
            raise ValueError(f"the filter keeps more than the {len(self.values)} directions that were computed")
        return self.combine(phi(self.values) * self.coordinates(patch))


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
            k,
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
    found = torch.from_numpy(values[order].copy()).clamp_min(0.0)
    return MatrixFreeSystem(
        pencil=pencil, values=found, vectors=rows / norms, duals=duals / norms, left=left, right=right
    )
