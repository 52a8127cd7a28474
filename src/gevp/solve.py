"""Which solver a pencil gets: the one made for its representation, or a dense one where two representations meet."""

from src.gevp.block import solve_block
from src.gevp.dense import solve_dense
from src.gevp.diagonal import solve_diagonal
from src.gevp.eigensystem import Eigensystem
from src.gevp.kronecker import solve_kronecker
from src.gevp.lowrank import lowrank_system
from src.gevp.pencil import Pencil

DENSE_LIMIT = 4096
"""Most coordinates for which a pencil of unlike representations is solved as a dense one (0.4 GiB, a minute)."""
SOLVERS = {"lowrank": lowrank_system, "block": solve_block, "kronecker": solve_kronecker, "diagonal": solve_diagonal}


def solve(pencil: Pencil) -> Eigensystem:
    """All eigenpairs of a pencil.

    Raises:
        ValueError: the sides have different representations and D is above ``DENSE_LIMIT``.
    """
    kinds = {side.representation for side in (pencil.left, pencil.right) if side is not None}
    if len(kinds) == 1:
        return SOLVERS[kinds.pop()](pencil)
    if pencil.dim > DENSE_LIMIT:
        raise ValueError(
            f"F_s and F_u have the representations {sorted(kinds)} at D = {pencil.dim}; expected one representation, "
            f"or at most {DENSE_LIMIT} coordinates"
        )
    return solve_dense(pencil)
