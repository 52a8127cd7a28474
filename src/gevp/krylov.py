"""The ``soft`` filter of a vector for every τ at once, from products alone: Lanczos in the metric of the pencil.

    A = B⁻¹ L,  L = F_s + σI,  B = F_u + εI,      A Q = Q T + β q_{m+1} e_mᵀ,      Qᵀ B Q = I,  q_1 = r / ‖r‖_B
    A (A + τ)⁻¹ r ≈ ‖r‖_B Q (I − τ (T + τI)⁻¹) e_1

A Krylov space does not change when a multiple of the identity is added to A, so one basis serves the whole path of τ.
What is missing has the metric's norm ``τ ‖(A + τ)⁻¹ q_{m+1}‖ β |e_mᵀ (T + τI)⁻¹ e_1| ‖r‖_B``, and A is positive
semi-definite, so ``β |e_mᵀ (T + τI)⁻¹ e_1|`` bounds the error relative to ``‖r‖_B`` (Saad, Iterative Methods for Sparse
Linear Systems, section 6.4): the space grows until that is small. A τ that is nearly rounding beside A's eigenvalues
asks for those of T: what only rounding made of 0 is 0, as in every solver, and filtered out.

Legend of shapes: m dimensions of the space, D coordinates, k vectors that it is kept orthogonal to.
"""

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal, solveh_banded

from src.gevp.inverse import Product

ERROR = 1e-12
"""Error of a filtered vector, relative to the vector, both in the norm of the metric."""
SMALL = 1e-7
"""A τ under this share of A's largest eigenvalue does not drown what rounding has made of zero eigenvalues."""
INVARIANT = 1e-14
"""A next vector under this share of the operator's norm is rounding: the space holds everything."""


class KrylovSpace:
    """An orthonormal basis, in the metric B, of r, Ar, A²r, …, grown as far as it is asked for.

    Args:
        left: Product with L.
        inverse: ``B⁻¹ v``.
        start: (D,) r.
        dual: (D,) B r.
        vectors: (k, D) eigenvectors that r is orthogonal to in the metric, and the space stays so; orthonormal in it.
        duals: (k, D) B times these.
        most: Largest m.
        largest: Largest eigenvalue of A, as far as it is known; 0 where it is not.
        floor: Eigenvalues up to this are rounding.
    """

    def __init__(
        self,
        left: Product,
        inverse: Product,
        *,
        start: torch.Tensor,
        dual: torch.Tensor,
        vectors: torch.Tensor,
        duals: torch.Tensor,
        most: int,
        largest: float,
        floor: float,
    ) -> None:
        self._left, self._inverse, self._most = left, inverse, most
        self._known, self._known_duals = vectors, duals
        self.norm = max(0.0, (start @ dual).item()) ** 0.5
        self._basis, self._duals = [start / self.norm], [dual / self.norm]
        self._largest, self._floor = largest, floor
        self._diagonal: list[float] = []
        self._beside: list[float] = []

    def soft(self, tau: float) -> torch.Tensor | None:
        """(m,) coefficients of the filtered r in the basis; None where the largest m is too small for this τ > 0."""
        while True:
            if self._diagonal:
                inverse = self._shifted(tau)
                if self._beside[-1] * abs(inverse[-1]) <= ERROR:
                    found = -tau * inverse
                    found[0] += 1.0
                    return torch.from_numpy(found) * self.norm
            if len(self._diagonal) == self._most:
                return None
            self._grow()

    def combine(self, coefficients: torch.Tensor) -> torch.Tensor:
        """(D,) combination of the first basis vectors, as many as there are coefficients."""
        total = torch.zeros_like(self._basis[0])
        for weight, vector in zip(coefficients.tolist(), self._basis, strict=False):
            total.add_(vector, alpha=weight)
        return total

    def _shifted(self, tau: float) -> np.ndarray:  # type: ignore[type-arg]
        """(m,) ``(T + τI)⁻¹ e_1``."""
        if len(self._diagonal) == 1 or tau <= SMALL * max(self._largest, *self._diagonal):
            values, vectors = eigh_tridiagonal(self._diagonal, self._beside[:-1])
            values[values <= self._floor] = 0.0
            return vectors @ (vectors[0] / (values + tau))  # type: ignore[no-any-return]
        bands = np.zeros((2, len(self._diagonal)))
        bands[0] = np.array(self._diagonal) + tau
        bands[1, :-1] = self._beside[:-1]
        first = np.zeros(len(self._diagonal))
        first[0] = 1.0
        return solveh_banded(bands, first, lower=True, overwrite_ab=True, overwrite_b=True)  # type: ignore[no-any-return]

    def _grow(self) -> None:
        """One step of Lanczos; β = 0 where nothing is left."""
        dual = self._left(self._basis[-1])
        size = (self._basis[-1] @ dual).item()
        self._diagonal.append(size)
        # Twice: once leaves what rounding makes of the first pass.
        for _ in range(2):
            dual = dual - self._known_duals.T @ (self._known @ dual)
            for vector, own in zip(self._basis, self._duals, strict=True):
                dual = dual - (vector @ dual) * own
        following = self._inverse(dual) if bool(dual.any()) else dual
        beta = max(0.0, (following @ dual).item()) ** 0.5
        scale = max(self._largest, *self._diagonal) + max(self._beside, default=0.0)
        if beta <= INVARIANT * scale or len(self._diagonal) + len(self._known) == len(dual):
            self._beside.append(0.0)
            return
        self._beside.append(beta)
        self._basis.append(following / beta)
        self._duals.append(dual / beta)
