"""Re-learned coefficients of a patch from Fisher files: relative settings made absolute.

τ = t · tr(F_s)/tr(F_u⁺),   a = trust · tr(F_s)/tr(F_u),   σ ≥ rho_s · tr(F_s)/D with ‖c − c0‖ ≤ radius · ‖C_s‖

With a ridge of Kronecker form (:mod:`src.gevp.kronecker_ridge`) σK stands for σI, and both norms are ‖·‖_K.

What is reported as held out is measured as for filters: each half of the rows is fitted once, by matrices and mean
scores of its own, and judged by the other half,

    safety energy kept = cᵀ F_s c / C_sᵀ F_s C_s,     utility tax kept = cᵀ F_u c / C_sᵀ F_u C_s,     means of both

A second step has no such numbers: its start was fitted to all these rows.

Controls leave a data set out, its matrices being multiples of the identity of the same trace and its mean
score zero: ``safety_only`` the benign rows, ``utility_only`` the refusals.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

from src.gevp.kronecker_ridge import kronecker_ridge
from src.gevp.pencil import checked_trace
from src.gevp.relearn import RelearnProblem, relearn
from src.merge.base import PatchedFisher
from src.merge.sst_settings import Control, Ridge


@dataclass(frozen=True)
class RelearnSettings:
    """Relative settings of a step.

    Attributes:
        t: Weight of benign answers.
        trust: Weight of the utility trust region.
        rho_s: Proximal ridge, above 0.
        radius: Longest step, as a share of the whole patch's norm.
        control: ``none``, ``safety_only`` or ``utility_only``.
        ridge: What the proximal ridge is a multiple of, and the step's length measured in: ``identity`` or
            ``kronecker``.
        damping: Multiple of the identity beside a Kronecker ridge.
    """

    t: float
    trust: float
    rho_s: float
    radius: float
    control: Control
    ridge: Ridge
    damping: float

    def problem(self, fisher: PatchedFisher) -> RelearnProblem:
        """The step's problem, in absolute numbers.

        Raises:
            ValueError: a Fisher matrix is zero or not finite.
        """
        trace = checked_trace("safety", fisher.safety)
        each = trace / fisher.safety.dim
        problem = RelearnProblem(
            safety=fisher.safety,
            benign=fisher.benign,
            utility=fisher.utility,
            safety_mean=fisher.safety_mean,
            benign_mean=fisher.benign_mean,
            tau=self.t * trace / checked_trace("benign", fisher.benign),
            trust=self.trust * trace / checked_trace("utility", fisher.utility),
            sigma=self.rho_s * each,
        )
        nothing = torch.zeros(problem.safety_mean.shape, dtype=torch.float64)
        if self.control == "utility_only":
            return replace(problem, safety=None, safety_mean=nothing, sigma=problem.sigma + each)
        if self.control == "safety_only":
            # τF_u⁺ and aF_u have t and trust times the trace of F_s.
            sigma, shrink = problem.sigma + self.t * each, self.trust * each
            return replace(problem, benign=None, utility=None, benign_mean=nothing, sigma=sigma, shrink=shrink)
        return problem


def relearned(
    fisher: PatchedFisher, whole: torch.Tensor, settings: RelearnSettings
) -> tuple[torch.Tensor, dict[str, Any]]:
    """(D,) new coefficients of a patch, and numbers for the manifest.

    Args:
        fisher: Fisher matrices, mean scores, and the coefficients where they were measured: the step starts there.
        whole: (D,) coefficients of the whole patch, in shares of whose norm the step is measured.
        settings: Relative settings.
    """
    start = whole if fisher.start is None else fisher.start
    step = _step(fisher, whole, start, settings)
    objective = step.problem.objective
    found = {"objective_before": objective(step.start, step.start), "objective_after": objective(step.end, step.start)}
    found |= {"step": ((step.end - step.start).norm() / step.length).item() if step.length else 0.0}
    found |= {"start_norm": (start.norm() / whole.norm()).item()} if step.length and fisher.start is not None else {}
    found |= {"sigma": step.sigma, "tau": step.problem.tau, "trust": step.problem.trust}
    return step.made, found | {"held_out": held_out(fisher.halves, whole, start, settings)}


@dataclass(frozen=True)
class _Step:
    """A step in the coordinates in which its ridge is σI.

    Attributes:
        problem: What it is made of.
        start: (D,) where it starts.
        end: (D,) where it ends.
        length: Norm of the whole patch.
        sigma: The ridge that was used.
        made: (D,) the coefficients where it ends, in the core space's own coordinates.
    """

    problem: RelearnProblem
    start: torch.Tensor
    end: torch.Tensor
    length: float
    sigma: float
    made: torch.Tensor


def _step(fisher: PatchedFisher, whole: torch.Tensor, start: torch.Tensor, settings: RelearnSettings) -> _Step:
    problem = settings.problem(fisher)
    if settings.ridge == "identity":
        length = whole.norm().item()
        made, sigma = relearn(problem, start, settings.radius * length)
        return _Step(problem, start, made, length, sigma, made)
    ridge = kronecker_ridge(fisher.benign, fisher.basis.shapes, settings.damping)
    within, begin = problem.within(ridge), ridge.coordinates(start)
    length = ridge.coordinates(whole).norm().item()
    end, sigma = relearn(within, begin, settings.radius * length)
    return _Step(within, begin, end, length, sigma, ridge.vectors(end))


def held_out(
    halves: tuple[PatchedFisher, PatchedFisher] | None,
    whole: torch.Tensor,
    start: torch.Tensor,
    settings: RelearnSettings,
) -> dict[str, float] | None:
    """Mean shares that a step fitted to one half of the rows keeps on the other; None where they can't be measured.

    Args:
        halves: Both halves.
        whole: (D,) coefficients of the whole patch.
        start: (D,) coefficients to start from.
        settings: Relative settings.
    """
    if halves is None:
        return None
    kept = torch.zeros(2, dtype=torch.float64)
    for fitted, judge in (halves, halves[::-1]):
        sides = judge.safety, judge.utility
        before = [side.energy(whole) for side in sides]
        if min(*before, *(f.trace() for f in (fitted.safety, fitted.benign, fitted.utility))) <= 0:
            return None
        made = _step(fitted, whole, start, settings).made
        kept += torch.tensor([side.energy(made) / energy for side, energy in zip(sides, before, strict=True)]) / 2
    return dict(zip(("safety_energy_kept", "utility_tax_kept"), kept.tolist(), strict=True))
