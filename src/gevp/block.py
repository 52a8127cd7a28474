"""The pencil of two block-diagonal Fisher matrices: one dense pencil per module, with the same two ridges for all.

    (F_{s,m} + σI) v = λ (F_{u,m} + εI) v

The ridges are those of the whole matrices (ε = ρ tr(F_u)/D over all modules), so the block pencil is exactly the dense
pencil of the block-diagonal matrices. Cost Σ (p·q)³.
"""

from src.fisher.block import BlockFisher
from src.gevp.dense import plus_ridge, solved_blocks
from src.gevp.factored import FactoredSystem
from src.gevp.pencil import Pencil, common_shapes


def solve_block(pencil: Pencil) -> FactoredSystem:
    """Solve the pencil of two :class:`BlockFisher`; a side that is None is its ridge alone.

    Raises:
        ValueError: the modules differ, or the right side is not positive definite.
    """
    blocks = (
        [
            plus_ridge(side.module_block(name) if isinstance(side, BlockFisher) else None, ridge, p * q)
            for side, ridge in pencil.sides
        ]
        for name, (p, q) in common_shapes(pencil.left, pencil.right).items()
    )
    return solved_blocks(pencil, blocks)
