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

from collections.abc import Iterable, Sequence

import numpy as np
import scipy.linalg
import torch

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


def plus_ridge(matrix: torch.Tensor | None, ridge: float, size: int) -> torch.Tensor:
    """(n, n) ``matrix + ridge · I``; None is the zero matrix."""
    identity = ridge * torch.eye(size, dtype=torch.float64)
    return identity if matrix is None else matrix + identity


def extremes(matrix: torch.Tensor) -> tuple[float, float]:
    """Least and greatest eigenvalue of a symmetric matrix."""
    values = torch.linalg.eigvalsh((matrix + matrix.T) / 2)
    return values[0].item(), values[-1].item()


def solved_blocks(pencil: Pencil, blocks: Iterable[Sequence[torch.Tensor]]) -> FactoredSystem:
    """The solution of a pencil of block-diagonal matrices.

    Args:
        pencil: What is solved.
        blocks: Both sides (n, n) of each block, with their ridges.

    Raises:
        ValueError: the right side is not positive definite.
    """
    one = torch.ones(1, 1, dtype=torch.float64)
    values, factors, ends = [], [], []
    for left, right in blocks:
        value, vectors = whitened_eigh(left, right)
        values.append(value)
        factors.append(Factors(vectors, right @ vectors, one, one))
        ends.append([extremes(left), extremes(right)])
    return FactoredSystem.of(pencil, values, factors, ends)


def solve_dense(pencil: Pencil) -> FactoredSystem:
    """Solve a pencil of any representations as one dense problem of size D: O(D³) time, O(D²) memory."""
    whole = [plus_ridge(None if side is None else side.dense(), ridge, pencil.dim) for side, ridge in pencil.sides]
    return solved_blocks(pencil, [whole])
