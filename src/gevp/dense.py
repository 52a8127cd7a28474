"""The dense pencil, whitened by a Cholesky factor: the definition that the other solvers are checked against.

    F_u + εI = L Lᵀ,    L⁻¹ (F_s + σI) L⁻ᵀ = W Λ Wᵀ,    V = L⁻ᵀ W

Rules for awkward inputs, here and in every solver:

* both sides are symmetrised first, so what rounding has made unsymmetric has no say;
* a singular F_u is made definite by ε alone. Where ε drowns in rounding, the factorisation fails and says so;
* F_s may be singular or indefinite by rounding: eigenvalues under 0 are set to 0, and without a ridge on it (σ = 0)
  so are those that rounding may have made of 0 (:func:`src.gevp.eigensystem.rounding`);
* scale costs no accuracy (ridges are relative, and the Cholesky factor is backward stable under diagonal scaling).
  With a right side of condition κ, eigenvalues carry an error of about κ · 1e-16 relative to the largest.
"""

import numpy as np
import scipy.linalg
import torch

from src.fisher.base import Fisher
from src.gevp.eigensystem import condition
from src.gevp.factored import FactoredSystem, Factors
from src.gevp.pencil import Pencil


def whitened_eigh(
    left: torch.Tensor, right: torch.Tensor, *, overwrite: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised symmetric eigenpairs of ``left v = λ right v``, descending, ``Vᵀ right V = I``.

    LAPACK's ``sygvd``: ``right`` is factorised (Cholesky) and ``left`` whitened by the factor; no matrix is inverted.

    Args:
        left: (n, n) symmetric matrix, float64.
        right: (n, n) symmetric positive definite matrix, float64.
        overwrite: Work in the memory of both, which must be symmetric to the last bit that matters; they are lost.

    Raises:
        ValueError: ``right`` is not positive definite.
    """
    sides = (left, right) if overwrite else ((left + left.T) / 2, (right + right.T) / 2)
    if not all(torch.isfinite(side).all() for side in sides):
        raise ValueError("a side of the pencil is not finite")
    # Transposed views are in Fortran's order, so that LAPACK can work in place.
    arrays = (side.numpy().T for side in sides)
    try:
        values, vectors = scipy.linalg.eigh(*arrays, overwrite_a=True, overwrite_b=True, check_finite=False)
    except np.linalg.LinAlgError as error:
        if "positive definite" not in str(error):
            raise
        raise ValueError("the right side of the pencil is not positive definite: raise the ridge rho") from None
    return torch.from_numpy(values).flip(0), torch.from_numpy(vectors).flip(1)


def ridged(fisher: Fisher | None, ridge: float, dim: int) -> torch.Tensor:
    """(D, D) dense ``F + ridge · I``; None is the zero matrix."""
    identity = ridge * torch.eye(dim, dtype=torch.float64)
    return identity if fisher is None else fisher.dense() + identity


def extremes(matrix: torch.Tensor) -> tuple[float, float]:
    """Least and greatest eigenvalue of a symmetric matrix."""
    values = torch.linalg.eigvalsh((matrix + matrix.T) / 2)
    return values[0].item(), values[-1].item()


def solve_dense(pencil: Pencil) -> FactoredSystem:
    """Solve a pencil of any representations as one dense problem of size D: O(D³) time, O(D²) memory."""
    left, right = (
        ridged(side, ridge, pencil.dim) for side, ridge in ((pencil.left, pencil.sigma), (pencil.right, pencil.epsilon))
    )
    values, vectors = whitened_eigh(left, right)
    one = torch.ones(1, 1, dtype=torch.float64)
    return FactoredSystem.of(
        pencil,
        [values],
        [Factors(vectors, right @ vectors, one, one)],
        left_condition=condition(*extremes(left), pencil.dim),
        right_condition=condition(*extremes(right), pencil.dim),
    )
