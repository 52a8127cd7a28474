"""``(F + εI)⁻¹ v`` of one Fisher matrix, exactly, by the structure of its representation.

    diagonal     F = diag(f):                              v / (f + ε)
    block        F_m = U diag(f) Uᵀ:                       U diag(1/(f + ε)) Uᵀ v, module by module
    kronecker    F_m = A ⊗ B,  U = U_A ⊗ U_B,  f = f_A ⊗ f_B:                        as block
    lowrank      F = SᵀS,  S Sᵀ = Q diag(f) Qᵀ:            (v − Sᵀ Q diag(1/(f + ε)) Qᵀ S v) / ε      (Woodbury)

One step of refinement repairs what subtracting nearly equal vectors costs where ε is small. The extreme eigenvalues
come with it, and so the condition of F + εI. Cost: D, Σ (p·q)³, Σ p³ + q³ or n² D + n³, then that of a few products.

Legend of shapes: n scores, D coordinates, a and b sides of a module's eigenbases (b = 1 for a block).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from src.fisher.base import Fisher
from src.fisher.block import BlockFisher
from src.fisher.diagonal import DiagonalFisher
from src.fisher.kronecker import KroneckerFisher
from src.fisher.lowrank import LowRankFisher
from src.gevp.stack import ScoreStack

Product = Callable[[torch.Tensor], torch.Tensor]
Found = tuple[tuple[float, float], Product]
"""Least and greatest eigenvalue of F, and the inverse of F + εI."""


@dataclass(frozen=True)
class Ridged:
    """``F + εI`` and its inverse.

    Attributes:
        product: ``v ↦ (F + εI) v``.
        unrefined: ``v ↦ (F + εI)⁻¹ v``.
        low: Least eigenvalue, the ridge included.
        high: Greatest eigenvalue.
    """

    product: Product
    unrefined: Product
    low: float
    high: float

    def inverse(self, vector: torch.Tensor) -> torch.Tensor:
        """(D,) ``(F + εI)⁻¹ v``, refined once."""
        found = self.unrefined(vector)
        return found + self.unrefined(vector - self.product(found))


def ridged_product(fisher: Fisher | None, ridge: float) -> Product:
    """``v ↦ (F + ridge · I) v``; None is the zero matrix."""
    if fisher is None:
        return lambda vector: ridge * vector
    return lambda vector: fisher.matvec(vector) + ridge * vector


def ridged(fisher: Fisher | None, ridge: float) -> Ridged:
    """``F + ridge · I`` of any representation; None is the zero matrix.

    Eigenvalues of F under 0 are rounding, and 0. With no ridge, ``inverse`` is of use only where F is definite.

    Raises:
        ValueError: the representation is no matrix.
    """
    if fisher is None:
        (low, high), inverse = _of_diagonal(torch.zeros(1, dtype=torch.float64), ridge)
    elif isinstance(fisher, LowRankFisher):
        (low, high), inverse = _of_scores(fisher, ridge)
    elif isinstance(fisher, DiagonalFisher):
        (low, high), inverse = _of_diagonal(fisher.diagonal(), ridge)
    elif isinstance(fisher, BlockFisher | KroneckerFisher):
        (low, high), inverse = _of_modules(fisher, ridge)
    else:
        raise ValueError(f"representation {fisher.representation}: expected lowrank, block, kronecker or diagonal")
    return Ridged(ridged_product(fisher, ridge), inverse, low + ridge, high + ridge)


def _of_diagonal(entries: torch.Tensor, ridge: float) -> Found:
    return (entries.min().item(), entries.max().item()), lambda vector: vector.double() / (entries + ridge)


def _of_scores(fisher: LowRankFisher, ridge: float) -> Found:
    stack = ScoreStack([fisher], [1.0])
    values, q = torch.linalg.eigh(stack.gram())
    values = values.clamp_min(0.0)
    low = values[-fisher.dim].item() if len(values) >= fisher.dim else 0.0

    def inverse(vector: torch.Tensor) -> torch.Tensor:
        inner = q @ ((q.T @ stack.times(vector)) / (values + ridge))
        return (vector - stack.transposed(inner)) / ridge

    return (low, values[-1].item()), inverse


def _of_modules(fisher: BlockFisher | KroneckerFisher, ridge: float) -> Found:
    bases = list(_bases(fisher))
    ends = [(values.min().item(), values.max().item()) for _, _, values in bases]

    def inverse(vector: torch.Tensor) -> torch.Tensor:
        found = []
        for (left, right, values), part in zip(bases, fisher.split(vector).values(), strict=True):
            inside = (left.T @ part.view(values.shape) @ right) / (values + ridge)
            found.append((left @ inside @ right.T).flatten())
        return torch.cat(found)

    return (min(low for low, _ in ends), max(high for _, high in ends)), inverse


def _bases(fisher: BlockFisher | KroneckerFisher) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Eigenbases (a, a) and (b, b) of each module and its eigenvalues (a, b)."""
    one = torch.ones(1, 1, dtype=torch.float64)
    for name in fisher.shapes:
        sides = fisher.factors(name) if isinstance(fisher, KroneckerFisher) else (fisher.module_block(name), one)
        (alpha, left), (beta, right) = (torch.linalg.eigh((side + side.T) / 2) for side in sides)
        yield left, right, torch.outer(alpha.clamp_min(0.0), beta.clamp_min(0.0))
