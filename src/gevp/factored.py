"""Eigenpairs that fall apart into modules, each a Kronecker product of two small eigenbases.

    V_m = L_m ⊗ R_m,    V_m K = L_m K R_mᵀ,    V_mᵀ (A_m ⊗ B_m) c = (A_m L_m)ᵀ C (B_m R_m)

A block has R_m = [1]; a dense problem is one block. Legend of shapes: D coordinates, a and b sides of a module.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from src.gevp.eigensystem import Eigensystem, condition, unrounded
from src.gevp.pencil import Pencil


@dataclass(frozen=True)
class Factors:
    """Eigenvectors of one module.

    Attributes:
        left: L, (a, a).
        left_dual: A L, (a, a): the metric times the vectors.
        right: R, (b, b).
        right_dual: B R, (b, b).
    """

    left: torch.Tensor
    left_dual: torch.Tensor
    right: torch.Tensor
    right_dual: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class FactoredSystem(Eigensystem):
    """A pencil solved module by module; eigenvalues of all modules are ranked together.

    Attributes:
        factors: Eigenvectors of each module, in the order of the coordinates.
        order: (D,) position, in the order of the modules, of each ranked eigenvalue.
        known_conditions: Condition numbers of both sides.
    """

    factors: list[Factors]
    order: torch.Tensor
    known_conditions: dict[str, float | None]

    @classmethod
    def of(
        cls,
        pencil: Pencil,
        values: Sequence[torch.Tensor],
        factors: list[Factors],
        ends: Sequence[Sequence[tuple[float, float]]],
    ) -> "FactoredSystem":
        """Rank the eigenvalues of all modules together.

        Args:
            pencil: What was solved.
            values: Eigenvalues of each module, a·b of them, row-major.
            factors: Eigenvectors of each module.
            ends: Least and greatest eigenvalue of the left side of each module, and of its right side.
        """
        flat = unrounded(torch.cat([v.reshape(-1) for v in values]), pencil)
        ranked, order = flat.sort(descending=True, stable=True)
        known = {
            name: condition(min(low for low, _ in side), max(high for _, high in side), pencil.dim)
            for name, side in zip(("left", "right"), zip(*ends, strict=True), strict=True)
        }
        return cls(pencil=pencil, values=ranked, factors=factors, order=order, known_conditions=known)

    def _shapes(self) -> list[tuple[int, int]]:
        return [(len(f.left), len(f.right)) for f in self.factors]

    def coordinates(self, patch: torch.Tensor) -> torch.Tensor:
        """(D,) coefficients ``Vᵀ (F_u + εI) c`` of a patch (D,), ranked."""
        parts = patch.double().split([a * b for a, b in self._shapes()])
        both = zip(self.factors, parts, self._shapes(), strict=True)
        return torch.cat([(f.left_dual.T @ part.view(shape) @ f.right_dual).reshape(-1) for f, part, shape in both])[
            self.order
        ]

    def combine(self, coefficients: torch.Tensor) -> torch.Tensor:
        """(…, D) combinations ``V a`` of ranked coefficients (…, D)."""
        unranked = torch.empty_like(coefficients)
        unranked[..., self.order] = coefficients
        parts = unranked.split([a * b for a, b in self._shapes()], dim=-1)
        both = zip(self.factors, parts, self._shapes(), strict=True)
        return torch.cat([(f.left @ k.unflatten(-1, shape) @ f.right.T).flatten(-2) for f, k, shape in both], dim=-1)

    def conditions(self) -> dict[str, float | None]:
        """Condition numbers of both sides."""
        return self.known_conditions
