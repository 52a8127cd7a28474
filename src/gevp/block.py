"""The pencil of two block-diagonal Fisher matrices: one dense pencil per module, with the same two ridges for all.

    (F_{s,m} + σI) v = λ (F_{u,m} + εI) v

The ridges are those of the whole matrices (ε = ρ tr(F_u)/D over all modules), so the block pencil is exactly the dense
pencil of the block-diagonal matrices. Cost Σ (p·q)³.
"""

import torch

from src.fisher.block import BlockFisher
from src.gevp.dense import extremes, whitened_eigh
from src.gevp.eigensystem import condition
from src.gevp.factored import FactoredSystem, Factors
from src.gevp.pencil import Pencil


def solve_block(pencil: Pencil) -> FactoredSystem:
    """Solve the pencil of two :class:`BlockFisher`; a side that is None is its ridge alone.

    Raises:
        ValueError: the modules differ, or the right side is not positive definite.
    """
    sides = [side for side in (pencil.left, pencil.right) if side is not None]
    shapes = common_shapes(sides)
    one = torch.ones(1, 1, dtype=torch.float64)
    values, factors, lows, highs = [], [], [], []
    for name, (p, q) in shapes.items():
        left, right = (
            _block(side, name, p * q) + ridge * torch.eye(p * q, dtype=torch.float64)
            for side, ridge in ((pencil.left, pencil.sigma), (pencil.right, pencil.epsilon))
        )
        value, vectors = whitened_eigh(left, right)
        values.append(value)
        factors.append(Factors(vectors, right @ vectors, one, one))
        low, high = zip(extremes(left), extremes(right), strict=True)
        lows.append(low)
        highs.append(high)
    conditions = [
        condition(min(low), max(high), pencil.dim)
        for low, high in zip(zip(*lows, strict=True), zip(*highs, strict=True), strict=True)
    ]
    return FactoredSystem.of(pencil, values, factors, left_condition=conditions[0], right_condition=conditions[1])


def common_shapes(sides: list) -> dict[str, tuple[int, int]]:  # type: ignore[type-arg]
    """The modules of both sides.

    Raises:
        ValueError: they differ.
    """
    if any(list(side.shapes.items()) != list(sides[0].shapes.items()) for side in sides):
        raise ValueError("F_s and F_u are of different modules; measure both in one run")
    shapes: dict[str, tuple[int, int]] = sides[0].shapes
    return shapes


def _block(fisher: object, name: str, size: int) -> torch.Tensor:
    if isinstance(fisher, BlockFisher):
        return fisher.block(name)
    return torch.zeros(size, size, dtype=torch.float64)
