"""Which solver a pencil gets: the one made for its representation, or one for any two where two representations meet.

Unlike representations are solved as one dense problem up to ``DENSE_LIMIT`` coordinates, and above that by the
matrix-free solver, which takes products with vectors and computes the leading eigenpairs alone, or none.
"""

from src.gevp.block import solve_block
from src.gevp.dense import solve_dense
from src.gevp.diagonal import solve_diagonal
from src.gevp.eigensystem import Eigensystem
from src.gevp.kronecker import solve_kronecker
from src.gevp.lowrank import lowrank_system
from src.gevp.matrix_free import solve_matrix_free, without_eigenpairs
from src.gevp.pencil import Pencil

DENSE_LIMIT = 4096
"""Most coordinates of a pencil of unlike representations that is solved as a dense one (0.8 GiB, 20 s on one core)."""
EIGENPAIRS = 64
"""Eigenpairs that the matrix-free solver computes where nothing else is asked for."""
SOLVERS = {"lowrank": lowrank_system, "block": solve_block, "kronecker": solve_kronecker, "diagonal": solve_diagonal}


def solve(pencil: Pencil, *, eigenpairs: int = EIGENPAIRS) -> Eigensystem:
    """The eigenpairs of a pencil: all of them, but for unlike representations of more than ``DENSE_LIMIT`` coordinates.

    Args:
        pencil: What to solve.
        eigenpairs: Number of leading eigenpairs that the matrix-free solver computes; 0 where the only filter is
            ``soft``, which needs none.

    Raises:
        ValueError: the right side is not positive definite, or an iteration does not converge.
    """
    kinds = {side.representation for side in (pencil.left, pencil.right) if side is not None}
    if len(kinds) == 1:
        return SOLVERS[kinds.pop()](pencil)
    if pencil.dim <= DENSE_LIMIT:
        return solve_dense(pencil)
    if eigenpairs == 0:
        return without_eigenpairs(pencil)
    return solve_matrix_free(pencil, k=min(eigenpairs, pencil.dim - 1))
