"""The pencil of two diagonal Fisher matrices: ``λ_j = (f_{s,j} + σ) / (f_{u,j} + ε)``, v_j = e_j / √(f_{u,j} + ε)."""

from dataclasses import dataclass

import torch

from src.gevp.eigensystem import Eigensystem, condition
from src.gevp.pencil import Pencil, common_shapes


@dataclass(frozen=True, kw_only=True)
class DiagonalSystem(Eigensystem):
    """Solved diagonal pencil.

    Attributes:
        left: (D,) diagonal of F_s + σI.
        right: (D,) diagonal of F_u + εI.
        order: (D,) coordinate of each ranked eigenvalue.
    """

    left: torch.Tensor
    right: torch.Tensor
    order: torch.Tensor

    def coordinates(self, patch: torch.Tensor) -> torch.Tensor:
        """(D,) coefficients of a patch (D,), ranked."""
        return (self.right.sqrt() * patch.double())[self.order]

    def combine(self, coefficients: torch.Tensor) -> torch.Tensor:
        """(…, D) combinations of ranked coefficients (…, D)."""
        unranked = torch.empty_like(coefficients)
        unranked[..., self.order] = coefficients
        return unranked / self.right.sqrt()

    def conditions(self) -> dict[str, float | None]:
        """Condition numbers of both sides."""
        sides = {"left": self.left, "right": self.right}
        return {name: condition(side.min().item(), side.max().item(), 1) for name, side in sides.items()}


def solve_diagonal(pencil: Pencil) -> DiagonalSystem:
    """Solve the pencil of two :class:`src.fisher.diagonal.DiagonalFisher`; a side that is None is its ridge alone.

    Raises:
        ValueError: the modules differ.
    """
    common_shapes(pencil.left, pencil.right)
    left, right = pencil.diagonals()
    values, order = (left / right).clamp_min(0.0).sort(descending=True, stable=True)
    return DiagonalSystem(pencil=pencil, values=values, left=left, right=right, order=order)
