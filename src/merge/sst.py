"""SST-Merge: keep the part of the safety patch that safety data care about and benign data do not.

The pencil (F_s + σI) v = λ (F_u + εI) v is solved in the core space of the safety adapter and the patch is filtered by
its eigenvalues (method.md sections 2 to 5), or its coefficients are learned anew (section 5a). The controls that every
claim needs (section 7) are settings.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from src.adapters.pairs import LowRankPair
from src.errors import InputError
from src.fisher.base import Fisher
from src.gevp.controls import random_projection
from src.gevp.diagnostics import kept_by_module, summary
from src.gevp.eigensystem import Eigensystem, Expansion
from src.gevp.filters import Cut, Soft, cut_at, position, soft, threshold, topk
from src.gevp.heldout import Fold, curve, energy_position, mean_kept, split_rows
from src.gevp.pencil import Pencil, PencilControl, make_pencil
from src.gevp.relearn import RelearnProblem, relearn
from src.gevp.solve import solve
from src.merge.base import FisherPair, MergeMethod, Patch

OUTSIDE_TOLERANCE = 1e-3

FilterName = Literal["soft", "topk", "energy", "threshold"]
Control = Literal["none", "random", "safety_only", "utility_only", "swapped"]


@dataclass(frozen=True)
class PatchedFisher(FisherPair):
    """Both Fisher matrices, and what re-learned coefficients need beside them, all at θ0 + ΔW_u + P.

    Attributes:
        benign: F_u⁺, the utility Fisher matrix at the patched point.
        safety_mean: (D,) mean score of refusals with the data's labels.
        benign_mean: (D,) mean score of benign answers with the data's labels.
    """

    benign: Fisher
    safety_mean: torch.Tensor
    benign_mean: torch.Tensor


class Sst(MergeMethod):
    """Filter the safety patch by the eigenvalues of F_s v = λ (F_u + εI) v, in the safety adapter's core space.

    Args:
        filter: ``soft`` multiplies each eigen-direction by λ/(λ + τ); ``threshold`` keeps those with λ > τ; ``topk``
            keeps the k largest λ; ``energy`` the fewest that keep a share of the safety energy of held-out rows.
        t: Exchange rate of ``soft`` and ``threshold``, relative: τ = t · tr(F_s)/tr(F_u). Larger values give up more
            of the patch where utility data care. No unit; at least 0. With ``relearn``, the weight of benign answers.
        k: Number of directions that ``topk`` keeps, 1 to D.
        share: Share of the held-out safety energy that ``energy`` keeps, above 0 and at most 1.
        rho: Ridge on F_u, relative: ε = rho · tr(F_u)/D. Above 0.
        rho_s: Ridge on F_s, relative: σ = rho_s · tr(F_s)/D. Keeps the patch where no calibration row has looked; 0
            drops it there. At least 0, above 0 with ``relearn``.
        control: A control in the method's place: ``random`` directions, as many as the filter keeps; ``safety_only``
            (F_u a multiple of the identity), ``utility_only`` (F_s one), ``swapped`` Fisher matrices.
        coefficients: ``filter`` the patch, or ``relearn`` its coefficients in one step on mean signed scores.
        trust: Weight of the utility trust region of ``relearn``, relative: a = trust · tr(F_s)/tr(F_u). At least 0.
        seed: Seed of the random directions.
        holdout_seed: Seed of the split of calibration rows for the reported energies.
    """

    needs_fisher = True

    def __init__(
        self,
        filter: FilterName = "soft",
        t: float = 10.0,
        k: int | None = None,
        share: float | None = None,
        rho: float = 0.1,
        rho_s: float = 10.0,
        control: Control = "none",
        coefficients: Literal["filter", "relearn"] = "filter",
        trust: float = 10.0,
        seed: int = 0,
        holdout_seed: int = 0,
    ) -> None:
        if not 0 < rho < float("inf"):
            raise InputError(f"method.rho is {rho}; expected a number above 0")
        for key, value in (("rho_s", rho_s), ("t", t), ("trust", trust)):
            if not 0 <= value < float("inf"):
                raise InputError(f"method.{key} is {value}; expected a number of at least 0")
        _check_filter(filter, k, share)
        if control == "random" and filter == "soft":
            raise InputError("method.control is 'random' with filter 'soft'; expected topk, energy or threshold")
        if coefficients == "relearn" and (filter != "soft" or control != "none" or rho_s == 0):
            raise InputError(
                f"method.coefficients is 'relearn' with filter {filter!r}, control {control!r} and rho_s {rho_s}; "
                "expected filter soft, control none and rho_s above 0: nothing is filtered"
            )
        self.filter, self.t, self.k, self.share, self.rho, self.rho_s = filter, t, k, share, rho, rho_s
        self.control, self.coefficients, self.trust = control, coefficients, trust
        self.seed, self.holdout_seed = seed, holdout_seed

    @property
    def name(self) -> str:
        """SST with its filter, and its control where it is one."""
        if self.coefficients == "relearn":
            return "SST relearn"
        return f"SST {self.filter}" + ("" if self.control == "none" else f" ({self.control})")

    def patch(
        self, utility: Mapping[str, LowRankPair], safety: Mapping[str, LowRankPair], fisher: FisherPair | None
    ) -> Patch:
        """Solve the pencil and filter the safety update, or learn its coefficients anew.

        Raises:
            InputError: k is out of range, the safety update lies outside the Fisher matrices' core space, the filter
                needs held-out rows and there are none, or mean scores for ``relearn`` are missing.
        """
        if fisher is None:
            raise InputError("method Sst needs both Fisher files: pass --fisher")
        outside = fisher.basis.residual(safety)
        if outside > OUTSIDE_TOLERANCE:
            raise InputError(
                f"the Fisher files are of another safety adapter: {outside:.1%} of this one lies outside their space"
            )
        whole = fisher.basis.coordinates(safety)
        try:
            if self.coefficients == "relearn":
                made, findings = self._relearned(fisher, whole)
            else:
                made, findings = self._filtered(fisher, whole)
        except ValueError as error:
            raise error if isinstance(error, InputError) else InputError(f"method Sst: {error}") from None
        findings |= {
            "patch_norm_kept": (made.norm() / whole.norm()).item(),
            "kept_by_module": kept_by_module(made, whole, fisher.basis.shapes),
        }
        return Patch(fisher.basis.patch(made), findings)

    def _filtered(self, fisher: FisherPair, whole: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        expansion = self._solve(fisher.safety, fisher.utility).expand(whole)
        folds = split_rows(fisher.safety, fisher.utility, whole, self._pencil, seed=self.holdout_seed)
        where = self._position(expansion.system, folds)
        phi = self._phi(expansion.system, where)
        findings = summary(expansion.system) | {"representation": fisher.safety.representation}
        findings["directions_kept"] = phi.k if isinstance(phi, Cut) else None
        findings["held_out"] = findings["held_out_curve"] = None
        if folds is not None:
            patches = [
                self._selected(fold.expansion, self._phi(fold.expansion.system, where), fold.fitted, whole)
                for fold in folds
            ]
            findings |= {"held_out": mean_kept(folds, patches), "held_out_curve": curve(folds)}
        return self._selected(expansion, phi, fisher.utility, whole), findings

    def _pencil(self, safety: Fisher, utility: Fisher) -> Pencil:
        control: PencilControl = "none" if self.control == "random" else self.control
        return make_pencil(safety, utility, rho=self.rho, rho_s=self.rho_s, control=control)

    def _solve(self, safety: Fisher, utility: Fisher) -> Eigensystem:
        return solve(self._pencil(safety, utility))

    def _position(self, system: Eigensystem, folds: list[Fold] | None) -> float | None:
        """Where the spectrum is cut (0 to 1): what a k of all rows and a k of half of them have in common."""
        if self.k is not None:
            try:
                return position(system, topk(system, self.k).k)
            except ValueError as error:
                # The filter names the setting that is out of range; here it gets its full name.
                raise InputError(f"method.{error}") from None
        if self.share is None:
            return None
        if folds is None:
            raise InputError(
                "method.filter 'energy' chooses k on held-out rows; expected Fisher files of at least 4 rows each, "
                "halves kept apart"
            )
        return energy_position(folds, self.share)

    def _phi(self, system: Eigensystem, where: float | None = None) -> Soft | Cut:
        if where is not None:
            return cut_at(system, where)
        tau = self.t * system.trace_ratio
        return soft(tau) if self.filter == "soft" else threshold(system, tau)

    def _selected(self, expansion: Expansion, phi: Soft | Cut, utility: Fisher, whole: torch.Tensor) -> torch.Tensor:
        if self.control == "random" and isinstance(phi, Cut):
            return random_projection(whole, utility, expansion.system.epsilon, k=phi.k, seed=self.seed)
        return expansion.at(phi)

    def _relearned(self, fisher: FisherPair, whole: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        if not isinstance(fisher, PatchedFisher):
            raise InputError(
                "method.coefficients 'relearn' needs mean scores of both data sets and the utility Fisher matrix at "
                "the patched point; the Fisher files hold none"
            )
        trace, utility = fisher.safety.trace(), fisher.utility.trace()
        problem = RelearnProblem(
            safety=fisher.safety,
            benign=fisher.benign,
            utility=fisher.utility,
            safety_mean=fisher.safety_mean,
            benign_mean=fisher.benign_mean,
            tau=self.t * trace / fisher.benign.trace(),
            trust=self.trust * trace / utility,
            sigma=self.rho_s * trace / fisher.safety.dim,
        )
        made = relearn(problem, whole)
        found = {"objective_before": problem.objective(whole, whole), "objective_after": problem.objective(made, whole)}
        # Both data sets' mean scores are of all rows: no row is left to judge by.
        return made, found | {"sigma": problem.sigma, "tau": problem.tau, "trust": problem.trust, "held_out": None}


def _check_filter(filter: FilterName, k: int | None, share: float | None) -> None:
    """Each filter takes its own setting and no other's."""
    if (k is None) == (filter == "topk"):
        raise InputError(f"method.filter is {filter!r} and method.k is {k}; topk needs k, {filter} takes none")
    if (share is None) == (filter == "energy"):
        raise InputError(
            f"method.filter is {filter!r} and method.share is {share}; energy needs share, others take none"
        )
    if k is not None and k < 1:
        raise InputError(f"method.k is {k}; expected at least 1")
    if share is not None and not 0 < share <= 1:
        raise InputError(f"method.share is {share}; expected a number above 0 and at most 1")
