"""Eigenpairs of a ridged pencil, and the application of a filter to a patch in the metric of its right side.

    (F_s + σI) v = λ (F_u + εI) v,    Vᵀ (F_u + εI) V = I
    c' = Σ_i φ(λ_i) v_i v_iᵀ (F_u + εI) c

The scores span m of the D dimensions. On the rest both matrices are multiples of the identity, so every direction
there is an eigenvector of λ = σ/ε: the *complement*, D − m eigenvalues that are one number.

Legend of shapes: N scores of both data sets, m dimensions of their span, D coordinates.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from src.fisher.lowrank import COLUMNS

Filter = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Eigensystem:
    """Solved pencil, in float64.

    Attributes:
        values: (m,) eigenvalues in the span of the scores, descending.
        complement_value: The eigenvalue σ/ε of the other D − m directions.
        dim: D.
        epsilon: Ridge ε of F_u.
        sigma: Ridge σ of F_s.
        trace_ratio: tr(F_s) / tr(F_u), the natural unit of an exchange rate τ.
        stack: (N, D) scaled scores of both data sets (their own number format).
        scale: (N,) factor of each score.
        to_span: (N, m): ``Z = (scale · stack)ᵀ to_span`` is an orthonormal basis (D, m) of the span.
        vectors: (m, m) eigenvectors in the basis Z.
        metric: (m, m) ``Zᵀ (F_u + εI) Z``.
    """

    values: torch.Tensor
    complement_value: float
    dim: int
    epsilon: float
    sigma: float
    trace_ratio: float
    stack: torch.Tensor
    scale: torch.Tensor
    to_span: torch.Tensor
    vectors: torch.Tensor
    metric: torch.Tensor

    @property
    def complement_dim(self) -> int:
        """D − m."""
        return self.dim - len(self.values)

    def to_basis(self, patch: torch.Tensor) -> torch.Tensor:
        """(m,) coordinates ``Zᵀ c`` of a patch (D,) in the span."""
        blocks = zip(self.stack.split(COLUMNS, dim=1), patch.double().split(COLUMNS), strict=True)
        inner = torch.stack([block.double() @ part for block, part in blocks]).sum(0)
        return self.to_span.T @ (self.scale * inner)

    def from_basis(self, coordinates: torch.Tensor) -> torch.Tensor:
        """(D,) patch ``Z y`` of coordinates y (m,)."""
        weights = self.scale * (self.to_span @ coordinates)
        return torch.cat([block.double().T @ weights for block in self.stack.split(COLUMNS, dim=1)])

    def apply(self, patch: torch.Tensor, phi: Filter) -> torch.Tensor:
        """Filter a patch (D,): φ maps eigenvalues to factors; the complement is multiplied by φ(σ/ε)."""
        outside = phi(torch.tensor([self.complement_value], dtype=torch.float64)).item()
        inside = self.to_basis(patch)
        expanded = phi(self.values) * (self.vectors.T @ (self.metric @ inside))
        return outside * patch.double() + self.from_basis(self.vectors @ expanded - outside * inside)

    def eigenvectors(self) -> torch.Tensor:
        """(D, m) eigenvectors of the span, orthonormal in the metric F_u + εI; for tests and plots."""
        basis = (self.scale[:, None] * self.stack.double()).T @ self.to_span
        return basis @ self.vectors
