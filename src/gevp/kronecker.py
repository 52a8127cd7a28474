"""The pencil of two Kronecker-factored Fisher matrices: eigenpairs factorise per module.

    (A_s' ⊗ B_s') v = λ (A_u' ⊗ B_u') v,    A_s' a = α A_u' a,  B_s' b = β B_u' b,    λ_ij = α_i β_j,  v_ij = a_i ⊗ b_j

``A ⊗ B + εI`` is no Kronecker product, so the ridge enters by its factors, as in K-FAC (1503.05671, section 6.3):

    A' = A + π√ε I,   B' = B + √ε/π I,   π² = (tr A / p) / (tr B / q)

A' ⊗ B' is A ⊗ B + εI plus the cross terms √ε/π A ⊗ I + π√ε I ⊗ B: where no data look it is exactly εI, elsewhere a
little stiffer. Where a factor is zero the module's block is zero, and both factors are √ε I. The same rule with σ makes
the left side (σ = 0: no ridge), so that unseen directions have λ = σ/ε as in every other representation. ε and σ are
those of the whole matrices. Cost Σ p³ + q³.
"""

import torch

from src.fisher.base import Fisher
from src.fisher.kronecker import KroneckerFisher
from src.gevp.dense import extremes, whitened_eigh
from src.gevp.factored import FactoredSystem, Factors
from src.gevp.pencil import Pencil, common_shapes


def ridged_factors(
    fisher: Fisher | None, name: str, shape: tuple[int, int], ridge: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """A' (p, p) and B' (q, q) of a module; a Fisher matrix of None is zero."""
    a, b = (torch.zeros(side, side, dtype=torch.float64) for side in shape)
    if isinstance(fisher, KroneckerFisher):
        a, b = fisher.factors(name)
    mean_a, mean_b = a.trace().item() / shape[0], b.trace().item() / shape[1]
    root, pi = ridge**0.5, 1.0
    if mean_a > 0 and mean_b > 0:
        pi = (mean_a / mean_b) ** 0.5
    else:
        a, b = torch.zeros_like(a), torch.zeros_like(b)
    identities = (torch.eye(side, dtype=torch.float64) for side in shape)
    return a + pi * root * next(identities), b + root / pi * next(identities)


def solve_kronecker(pencil: Pencil) -> FactoredSystem:
    """Solve the pencil of two :class:`KroneckerFisher`; a side that is None is its ridge alone.

    Raises:
        ValueError: the modules differ, or the right side is not positive definite.
    """
    values, factors, ends = [], [], []
    for name, shape in common_shapes(pencil.left, pencil.right).items():
        (a_s, b_s), (a_u, b_u) = both = [ridged_factors(side, name, shape, ridge) for side, ridge in pencil.sides]
        alpha, left = whitened_eigh(a_s, a_u)
        beta, right = whitened_eigh(b_s, b_u)
        values.append(torch.outer(alpha.clamp_min(0.0), beta.clamp_min(0.0)))
        factors.append(Factors(left, a_u @ left, right, b_u @ right))
        pairs = [(extremes(a), extremes(b)) for a, b in both]
        ends.append([(max(a[0], 0.0) * max(b[0], 0.0), a[1] * b[1]) for a, b in pairs])
    return FactoredSystem.of(pencil, values, factors, ends)
