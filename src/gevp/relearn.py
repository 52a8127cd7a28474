"""Re-learned coefficients: one Gauss-Newton step inside the safety core.

    min_c  ½ (c−c0)ᵀ(F_s + τF_u⁺ + σI)(c−c0) − (c−c0)ᵀ(g_s + τg_u⁺) + ½ a cᵀF_u c

A Fisher matrix is sign-blind, a mean score is not. With d = c − c0 the minimum solves

    (F_s + τF_u⁺ + aF_u + σI) d = g_s + τg_u⁺ − aF_u c0

and σ > 0 makes it the only one. In a control a matrix is left out, and a multiple of the identity in its place: in
F_s's and F_u⁺'s it is a larger σ, in aF_u's a term ½ s‖c‖², which adds s to the ridge and −s c0 to the right side.

The quadratic model holds near c0 only: mean scores of a few hundred rows point along
thousands of directions that no Fisher matrix of those rows opposes, so with a small σ the step is many times as long as
the patch, and the model is destroyed. Where a radius is given, σ is the smallest, from the problem's own on, whose step
is no longer than it: the trust-region step of Moré and Sorensen (SIAM J. Sci. Stat. Comput. 4, 1983).

For low-rank matrices ``S = [G_s/√n_s; √τ G_u⁺/√n_u⁺; √a G_u/√n_u]`` and Woodbury's identity ``(σI + SᵀS)⁻¹ b =
(b − Sᵀ(σI + SSᵀ)⁻¹ S b)/σ`` leave one factorisation of size N; other representations go by conjugate
gradients, preconditioned by the diagonal.

Legend of shapes: N scores of all three matrices, D coordinates.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from math import inf

import torch

from src.fisher.base import Fisher
from src.fisher.lowrank import LowRankFisher
from src.gevp.iterations import conjugate_gradients
from src.gevp.kronecker_ridge import KroneckerRidge
from src.gevp.stack import ScoreStack

SHORTEST = 0.99
"""A step of at least this share of the radius is long enough."""


@dataclass(frozen=True)
class RelearnProblem:
    """What the step is made of.

    Attributes:
        safety: F_s on refusals, at the patched point; None is the zero matrix.
        benign: F_u⁺ on benign answers, at the patched point; None is the zero matrix.
        utility: F_u on benign answers, at θ0 + ΔW_u: the trust region; None is the zero matrix.
        safety_mean: (D,) g_s, mean score of refusals with the data's labels, at the patched point.
        benign_mean: (D,) g_u⁺, mean score of benign answers with the data's labels, at the patched point.
        tau: Weight τ of benign answers, at least 0.
        trust: Weight a of the trust region, at least 0.
        sigma: Proximal ridge σ, above 0.
        shrink: Weight s of ½‖c‖², at least 0.
    """

    safety: Fisher | None
    benign: Fisher | None
    utility: Fisher | None
    safety_mean: torch.Tensor
    benign_mean: torch.Tensor
    tau: float
    trust: float
    sigma: float
    shrink: float = 0.0

    def __post_init__(self) -> None:
        others = self.tau, self.trust, self.shrink
        if not (0 < self.sigma < float("inf") and all(0 <= value < float("inf") for value in others)):
            raise ValueError(
                f"sigma is {self.sigma}, tau {self.tau}, trust {self.trust}, shrink {self.shrink}; "
                "expected sigma above 0, others at least 0"
            )
        dims = [*(fisher.dim for fisher, _ in self.terms), len(self.safety_mean), len(self.benign_mean)]
        if len(set(dims)) > 1:
            raise ValueError(f"Fisher matrices and mean scores have {dims} coordinates; expected the same in each")

    @property
    def terms(self) -> list[tuple[Fisher, float]]:
        """The matrices of the left side and their weights."""
        three = (self.safety, 1.0), (self.benign, self.tau), (self.utility, self.trust)
        return [(fisher, weight) for fisher, weight in three if fisher is not None]

    def product(self, vector: torch.Tensor) -> torch.Tensor:
        """(D,) ``(F_s + τF_u⁺ + aF_u + (σ + s)I) v``."""
        total = (self.sigma + self.shrink) * vector.double()
        for fisher, weight in self.terms:
            total += weight * fisher.matvec(vector)
        return total

    def within(self, ridge: KroneckerRidge) -> "RelearnProblem":
        """The same problem with σK in place of σI, in the coordinates in which K is the identity; s has to be 0.

        Raises:
            ValueError: a matrix is not held as scores.
        """
        if self.shrink:
            raise ValueError(f"shrink is {self.shrink}; expected 0 beside a ridge of Kronecker form")
        safety, benign, utility = (
            None if side is None else ridge.fisher(side) for side in (self.safety, self.benign, self.utility)
        )
        g_s, g_u = ridge.scores(self.safety_mean), ridge.scores(self.benign_mean)
        return replace(self, safety=safety, benign=benign, utility=utility, safety_mean=g_s, benign_mean=g_u)

    def target(self, start: torch.Tensor) -> torch.Tensor:
        """(D,) right side at c0 (D,), in float64."""
        total = self.safety_mean.double() + self.tau * self.benign_mean.double() - self.shrink * start.double()
        return total if self.utility is None else total - self.trust * self.utility.matvec(start)

    def objective(self, coefficients: torch.Tensor, start: torch.Tensor) -> float:
        """The function that is minimised, at c (D,), from c0 (D,)."""
        step = coefficients.double() - start.double()
        total = self.sigma * step.square().sum() + self.shrink * coefficients.double().square().sum()
        for fisher, weight in self.terms:
            total += weight * fisher.energy(coefficients if fisher is self.utility else step)
        return float(0.5 * total - step @ (self.safety_mean.double() + self.tau * self.benign_mean.double()))


def relearn(problem: RelearnProblem, start: torch.Tensor, radius: float = inf) -> tuple[torch.Tensor, float]:
    """(D,) coefficients c of the step from c0 (D,), in float64, and the σ that was used.

    Args:
        problem: What the step is made of.
        start: c0.
        radius: Longest step ‖c − c0‖; infinite takes the problem's σ as it is.

    Raises:
        ValueError: σ is too small to be seen beside the matrices.
    """
    target = problem.target(start)
    steps = _steps(problem, target)
    if radius == 0:
        return start.double(), problem.sigma
    sigma, step = _within(steps, problem.sigma, target.norm().item() / radius, radius)
    return start.double() + step, sigma


@dataclass(frozen=True)
class _Steps:
    """Steps of a problem by their σ.

    Attributes:
        at: The step (D,).
        norm: Its norm without forming it, where that is cheaper; close to it unless σ is tiny beside the matrices.
    """

    at: Callable[[float], torch.Tensor]
    norm: Callable[[float], float] | None = None


def _within(steps: _Steps, low: float, high: float, radius: float) -> tuple[float, torch.Tensor]:
    """The smallest σ from ``low`` on whose step is no longer than the radius, and that step.

    It is looked for by norms alone where they are cheap, and by the steps themselves where what that finds is not it.
    """
    at = lru_cache(maxsize=1)(steps.at)  # the last step alone: each is (D,)
    if steps.norm is not None:
        sigma = _fitting(steps.norm, low, high, radius)
        length = at(sigma).norm()
        if length <= radius and (sigma == low or length >= SHORTEST * radius):
            return sigma, at(sigma)
    sigma = _fitting(lambda s: at(s).norm().item(), low, high, radius)
    return sigma, at(sigma)


def _fitting(norm: Callable[[float], float], low: float, high: float, radius: float) -> float:
    """The least σ if its step is no longer than the radius, else one whose step is SHORTEST to 1 times the radius.

    A step shrinks as σ grows, and at ‖target‖/radius it is short enough, the matrices being positive semi-definite.

    Args:
        norm: From σ to the norm of its step.
        low: The least σ.
        high: A σ whose step is short enough.
        radius: Longest step.
    """
    if norm(low) <= radius:
        return low
    length = norm(high)
    while length < SHORTEST * radius and high > (1 + 1e-9) * low:
        middle = (low * high) ** 0.5
        tried = norm(middle)
        if tried > radius:
            low = middle
        else:
            high, length = middle, tried
    return high


def _steps(problem: RelearnProblem, target: torch.Tensor) -> _Steps:
    """Steps by σ; what does not depend on σ is computed once.

    With G = SSᵀ, v = S b and x = (G + ridge I)⁻¹ v the norm of (b − Sᵀx)/ridge is that of ‖b‖² − 2xᵀv + xᵀGx.
    """
    shrink = problem.shrink
    sides = [(fisher, weight**0.5) for fisher, weight in problem.terms if isinstance(fisher, LowRankFisher)]
    if len(sides) < len(problem.terms):
        whole = torch.stack([weight * fisher.diagonal() for fisher, weight in problem.terms]).sum(0) + shrink
        return _Steps(lambda sigma: conjugate_gradients(replace(problem, sigma=sigma).product, target, whole + sigma))
    stack = ScoreStack([fisher for fisher, _ in sides], [weight for _, weight in sides])
    gram, inner, square = stack.gram(), stack.times(target), target.square().sum()

    def factor(ridge: float) -> torch.Tensor:
        ridged = gram.clone()
        ridged.diagonal().add_(ridge)
        lower, failed = torch.linalg.cholesky_ex(ridged)
        if failed:
            raise ValueError("the ridge drowns in rounding, and no step is defined: raise the ridge rho_s")
        return lower

    def norm(sigma: float) -> float:
        ridge = sigma + shrink
        x = torch.cholesky_solve(inner[:, None], factor(ridge)).squeeze(1)
        return (square - 2 * x @ inner + x @ (gram @ x)).clamp_min(0).sqrt().item() / ridge

    def at(sigma: float) -> torch.Tensor:
        ridge = sigma + shrink
        lower = factor(ridge)

        def solve(right: torch.Tensor) -> torch.Tensor:
            x = torch.cholesky_solve(stack.times(right)[:, None], lower).squeeze(1)
            return (right - stack.transposed(x)) / ridge

        step = solve(target)
        # Woodbury subtracts nearly equal vectors where σ is small: one step of refinement repairs what that costs.
        return step + solve(target - replace(problem, sigma=sigma).product(step))

    return _Steps(at, norm)
