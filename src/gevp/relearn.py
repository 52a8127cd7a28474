"""Re-learned coefficients: one Gauss-Newton step inside the safety core (method.md section 5a).

    min_c  ½ (c−c0)ᵀ(F_s + τF_u⁺ + σI)(c−c0) − (c−c0)ᵀ(g_s + τg_u⁺) + ½ a cᵀF_u c

A Fisher matrix is sign-blind, a mean score is not. With d = c − c0 the minimum solves

    (F_s + τF_u⁺ + aF_u + σI) d = g_s + τg_u⁺ − aF_u c0

and σ > 0 makes it the only one. For low-rank matrices ``S = [G_s/√n_s; √τ G_u⁺/√n_u⁺; √a G_u/√n_u]`` and Woodbury's
identity ``(σI + SᵀS)⁻¹ b = (b − Sᵀ(σI + SSᵀ)⁻¹ S b)/σ`` leave one factorisation of size N; other representations go by
conjugate gradients.

Legend of shapes: N scores of all three matrices, D coordinates.
"""

from dataclasses import dataclass

import torch

from src.fisher.base import Fisher
from src.fisher.lowrank import LowRankFisher
from src.gevp.matrix_free import conjugate_gradients
from src.gevp.stack import ScoreStack


@dataclass(frozen=True)
class RelearnProblem:
    """What the step is made of.

    Attributes:
        safety: F_s on refusals, at the patched point.
        benign: F_u⁺ on benign answers, at the patched point.
        utility: F_u on benign answers, at θ0 + ΔW_u: the trust region.
        safety_mean: (D,) g_s, mean score of refusals with the data's labels, at the patched point.
        benign_mean: (D,) g_u⁺, mean score of benign answers with the data's labels, at the patched point.
        tau: Weight τ of benign answers, at least 0.
        trust: Weight a of the trust region, at least 0.
        sigma: Proximal ridge σ, above 0.
    """

    safety: Fisher
    benign: Fisher
    utility: Fisher
    safety_mean: torch.Tensor
    benign_mean: torch.Tensor
    tau: float
    trust: float
    sigma: float

    def __post_init__(self) -> None:
        if not (0 < self.sigma < float("inf") and 0 <= self.tau < float("inf") and 0 <= self.trust < float("inf")):
            raise ValueError(
                f"sigma is {self.sigma}, tau {self.tau}, trust {self.trust}; expected sigma above 0, others at least 0"
            )
        dims = [self.safety.dim, self.benign.dim, self.utility.dim, len(self.safety_mean), len(self.benign_mean)]
        if len(set(dims)) > 1:
            raise ValueError(f"Fisher matrices and mean scores have {dims} coordinates; expected the same in each")

    def product(self, vector: torch.Tensor) -> torch.Tensor:
        """(D,) ``(F_s + τF_u⁺ + aF_u + σI) v``."""
        total = self.safety.matvec(vector) + self.sigma * vector.double()
        total += self.tau * self.benign.matvec(vector)
        return total + self.trust * self.utility.matvec(vector)

    def objective(self, coefficients: torch.Tensor, start: torch.Tensor) -> float:
        """The function that is minimised, at c (D,), from c0 (D,)."""
        step = coefficients.double() - start.double()
        curvature = self.safety.energy(step) + self.tau * self.benign.energy(step) + self.sigma * step.square().sum()
        slope = step @ (self.safety_mean.double() + self.tau * self.benign_mean.double())
        return float(0.5 * curvature - slope + 0.5 * self.trust * self.utility.energy(coefficients))


def relearn(problem: RelearnProblem, start: torch.Tensor) -> torch.Tensor:
    """(D,) coefficients c of the step from c0 (D,), in float64."""
    target = problem.safety_mean.double() + problem.tau * problem.benign_mean.double()
    target = target - problem.trust * problem.utility.matvec(start)
    three = [(problem.safety, 1.0), (problem.benign, problem.tau), (problem.utility, problem.trust)]
    sides = [(fisher, weight**0.5) for fisher, weight in three if isinstance(fisher, LowRankFisher)]
    if len(sides) < len(three):
        return start.double() + conjugate_gradients(problem.product, target)
    stack = ScoreStack([fisher for fisher, _ in sides], [weight for _, weight in sides])
    gram = stack.gram()
    gram.diagonal().add_(problem.sigma)
    lower = torch.linalg.cholesky(gram)

    def solve(right: torch.Tensor) -> torch.Tensor:
        inner = torch.cholesky_solve(stack.times(right)[:, None], lower).squeeze(1)
        return (right - stack.transposed(inner)) / problem.sigma

    step = solve(target)
    # Woodbury subtracts nearly equal vectors where σ is small: one step of refinement repairs what that costs.
    return start.double() + step + solve(target - problem.product(step))
