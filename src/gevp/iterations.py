"""Iterations that need a matrix as a product with vectors alone, and say in one line when they take too long.

* conjugate gradients, preconditioned by the diagonal (Jacobi), for ``M x = b``;
* implicitly restarted Lanczos (ARPACK, through scipy) for the largest λ of ``A v = λ B v``.

Legend of shapes: k eigenpairs, D coordinates.
"""

import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, cg, eigsh

from src.gevp.inverse import Product

TOLERANCE = 1e-12
"""Relative residual of a linear solve by conjugate gradients."""
RESIDUAL = 1e-10
"""Residual of an eigenpair, relative to its eigenvalue, in the metric's norms: a tenth of what tells two apart."""
PRODUCTS = 5000
"""Most products with a matrix that an iteration takes."""
LEAST_WIDTH = 40
"""Least number of vectors that ARPACK keeps at a time."""
ONE_FORM = "or measure F_s and F_u in one representation"


def conjugate_gradients(product: Product, target: torch.Tensor, jacobi: torch.Tensor) -> torch.Tensor:
    """Solve ``M x = b`` for a symmetric positive definite M given as a product, preconditioned by its diagonal.

    Args:
        product: Product with M.
        target: (D,) b.
        jacobi: (D,) diagonal of M, above 0.

    Raises:
        ValueError: the relative residual is not 1e-12 after ``PRODUCTS`` steps: M is too badly conditioned.
    """
    scaled = _operator(lambda vector: vector / jacobi, len(target))
    found, failed = cg(
        _operator(product, len(target)), target.double().numpy(), rtol=TOLERANCE, maxiter=PRODUCTS, M=scaled
    )
    if failed or not np.isfinite(found).all():
        raise ValueError(
            f"conjugate gradients did not converge in {PRODUCTS} steps: raise the ridges rho and rho_s, {ONE_FORM}"
        )
    return torch.from_numpy(found)


def _operator(product: Product, dim: int) -> LinearOperator:
    def multiply(vector: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        return product(torch.from_numpy(np.ascontiguousarray(vector, dtype=np.float64).reshape(-1))).numpy()

    return LinearOperator((dim, dim), matvec=multiply, dtype=np.float64)


def leading_eigenpairs(
    left: Product, right: Product, inverse: Product, *, count: int, start: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest eigenvalues (k,), descending, and their eigenvectors (k, D), of ``A v = λ B v``.

    Args:
        left: Product with A, symmetric.
        right: Product with B, symmetric positive definite.
        inverse: Product with B⁻¹.
        count: k, at most D − 1.
        start: (D,) vector to start from.

    Raises:
        ValueError: they are not found within ``PRODUCTS`` products with each.
    """
    dim = len(start)
    width = min(max(2 * count + 1, LEAST_WIDTH), dim)
    a, b, solve = (_operator(product, dim) for product in (left, right, inverse))
    options = {"v0": start.numpy(), "tol": RESIDUAL, "ncv": width, "maxiter": max(1, PRODUCTS // (width - count))}
    try:
        values, vectors = eigsh(a, count, M=b, Minv=solve, which="LA", **options)
    except ArpackNoConvergence as error:
        known = len(error.eigenvalues)
        raise ValueError(
            f"the eigenvalues lie too close together: {known} of the {count} largest were found in {PRODUCTS} "
            f"products; take filter soft, which needs none, fewer eigenpairs, a smaller ridge rho_s or a larger rho, "
            f"{ONE_FORM}"
        ) from None
    order = np.argsort(-values)
    return torch.from_numpy(values[order]), torch.from_numpy(np.ascontiguousarray(vectors.T[order]))
