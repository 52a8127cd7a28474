"""SST-Merge: keep the part of the safety patch that safety data care about and benign data do not.

The pencil (F_s + σI) v = λ (F_u + εI) v is solved in the core space of the adapters and the patch is filtered by its
eigenvalues, or its coefficients are learned anew. The controls that every claim needs are settings.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from src.adapters.deltas import Delta
from src.errors import InputError
from src.fisher.base import Fisher
from src.gevp.controls import random_projection
from src.gevp.diagnostics import kept_by_module
from src.gevp.eigensystem import Eigensystem, Expansion
from src.gevp.filters import Cut, Soft, cut_at, position, soft, threshold, topk
from src.gevp.heldout import energy_position, mean_kept
from src.gevp.pencil import Pencil, PencilControl, make_pencil
from src.gevp.solve import EIGENPAIRS
from src.merge.base import FisherPair, MergeMethod, Patch, PatchedFisher
from src.merge.masked import Form, whole_patch
from src.merge.sst_relearn import RelearnSettings, relearned
from src.merge.sst_settings import (
    Coefficients,
    Control,
    FilterName,
    Ridge,
    check_filter,
    check_numbers,
    check_ridge,
    check_together,
    unread_options,
)
from src.merge.sst_solved import Solved, solve_once

log = logging.getLogger(__name__)

OUTSIDE_TOLERANCE = 1e-3
NO_FISHER = "method Sst needs both Fisher files: pass --fisher"


class Sst(MergeMethod):
    """Filter the safety patch by the eigenvalues of F_s v = λ (F_u + εI) v, in the safety adapter's core space.

    SST-Merge, this project's own method; no paper yet. Needs Fisher files in core coordinates (the default of the
    fisher command), of any representation; ``coefficients=relearn`` needs the benign pass with them. Strength alpha
    multiplies the filtered patch; sweep ``t`` to vary what the filter gives up.

    Args:
        filter: ``soft`` multiplies each eigen-direction by λ/(λ + τ); ``threshold`` keeps those with λ > τ; ``topk``
            keeps the k largest λ; ``energy`` the fewest from which on a share of the safety energy of held-out rows is
            kept, however many more are taken.
        t: Exchange rate of ``soft`` and ``threshold``, relative: τ = t · tr(F_s)/tr(F_u). Larger values give up more
            of the patch where utility data care. No unit; at least 0. With ``relearn``, the weight of benign answers.
        k: Number of directions that ``topk`` keeps, 1 to D.
        share: Least share of the safety energy of held-out rows that ``energy`` keeps, a mean over both halves of the
            rows, each judged by the cut of the other; above 0 and at most 1. Says so where only the whole patch does.
        rho: Ridge on F_u, relative: ε = rho · tr(F_u)/D. Above 0.
        rho_s: Ridge on F_s, relative: σ = rho_s · tr(F_s)/D. Keeps the patch where no calibration row has looked; 0
            drops it there. At least 0, above 0 with ``relearn``.
        control: A control in the method's place: ``random`` directions, as many as the filter keeps; ``safety_only``
            (F_u a multiple of the identity), ``utility_only`` (F_s one), ``swapped`` Fisher matrices. ``relearn`` has
            ``safety_only`` and ``utility_only``, which leave the other data set's mean score out as well.
        coefficients: ``filter`` the patch, or ``relearn`` its coefficients in one step on mean signed scores, from
            where these were measured: the whole patch, or, for a second step, a merged adapter of a first one
            (``--model.reference_safety '{logs/merged: 1.0}'`` of the fisher command).
        form: ``additive`` filters ΔW_s; ``interpolating`` filters ΔW_s − ΔW_u, which needs Fisher files of
            ``--model.basis union``, F_s of them where that patch leads: ``--model.reference_safety {safety: 1.0}``.
        trust: Weight of the utility trust region of ``relearn``, relative: a = trust · tr(F_s)/tr(F_u). At least 0.
        radius: Longest step of ``relearn``, as a share of the patch's norm; the ridge on F_s grows until the step fits.
            Above 0.
        ridge: What ``relearn`` holds a step by where no row has looked, and measures its length in: ``identity``, all
            directions alike, or ``kronecker``, by what benign rows show of each layer's inputs and outputs (K = L ⊗ R,
            1802.09568); that needs ``lowrank`` Fisher files, of at least some hundred rows.
        damping: Multiple of the identity beside a ``kronecker`` ridge of mean diagonal 1; above 0.
        eigenpairs: Leading eigenpairs to compute where F_s and F_u have different representations in more than 4 096
            coordinates: filters can keep no more than these. ``soft`` needs none, and computes none there: it then has
            no spectrum to show. At least 1.
        seed: Seed of the random directions.
        holdout_seed: Seed of the split of calibration rows for the reported energies, where the Fisher file still
            knows its rows (``lowrank``); other files, and ``relearn``, split by row id.
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
        coefficients: Coefficients = "filter",
        form: Form = "additive",
        trust: float = 10.0,
        radius: float = 0.2,
        ridge: Ridge = "identity",
        damping: float = 0.1,
        eigenpairs: int = EIGENPAIRS,
        seed: int = 0,
        holdout_seed: int = 0,
    ) -> None:
        check_numbers(rho, rho_s, t, trust, radius)
        check_filter(filter, k, share)
        check_together(filter, control, coefficients, rho_s)
        check_ridge(ridge, damping, coefficients, control)
        if eigenpairs < 1:
            raise InputError(f"method.eigenpairs is {eigenpairs}; expected at least 1")
        self.filter, self.t, self.k, self.share, self.rho, self.rho_s = filter, t, k, share, rho, rho_s
        self.control, self.coefficients, self.form, self.trust = control, coefficients, form, trust
        self.radius, self.ridge, self.damping, self.eigenpairs = radius, ridge, damping, eigenpairs
        self.seed, self.holdout_seed = seed, holdout_seed

    @property
    def name(self) -> str:
        """SST with its filter, and its form and control where they are not the usual ones."""
        what = "SST relearn" if self.coefficients == "relearn" else f"SST {self.filter}"
        shape = "" if self.form == "additive" else f" {self.form}"
        return what + shape + ("" if self.control == "none" else f" ({self.control})")

    @property
    def safety_point(self) -> dict[str, float] | None:
        """The safety adapter alone where the patch leads there."""
        return {"safety": 1.0} if self.form == "interpolating" else None

    @property
    def relearns(self) -> bool:
        """Whether mean scores and the benign pass are needed."""
        return self.coefficients == "relearn"

    def without_effect(self) -> dict[str, str]:
        """What :func:`unread_options` names."""
        return unread_options(self.filter, self.coefficients, self.ridge, self.control)

    def patch(self, utility: Mapping[str, Delta], safety: Mapping[str, Delta], fisher: FisherPair | None) -> Patch:
        """Solve the pencil and filter the patch, or learn its coefficients anew.

        Raises:
            InputError: the Fisher matrices are missing, of another space or too few rows, or a setting is out of range.
        """
        return next(self.patches([self], utility, safety, fisher))

    def outline(
        self, utility: Mapping[str, Delta], safety: Mapping[str, Delta], fisher: FisherPair | None
    ) -> Mapping[str, Delta]:
        """Zeros in the core space: no pencil is solved."""
        if fisher is None:
            raise InputError(NO_FISHER)
        self._whole(utility, safety, fisher)
        return fisher.basis.patch(torch.zeros(fisher.basis.dim, dtype=torch.float64))

    def patches(
        self,
        variants: Sequence[MergeMethod],
        utility: Mapping[str, Delta],
        safety: Mapping[str, Delta],
        fisher: FisherPair | None,
    ) -> Iterator[Patch]:
        """Patches of several settings; those that share ridges, control, form and split of rows share one solve."""
        if fisher is None:
            raise InputError(NO_FISHER)
        known: dict[tuple[Any, ...], Solved] = {}
        for method in variants:
            if not isinstance(method, Sst):
                raise TypeError(f"{type(method).__name__} among variants of Sst")
            whole = method._whole(utility, safety, fisher)
            if not whole.any():
                raise InputError(f"method Sst: the patch to filter is zero (form {method.form})")
            try:
                made, findings = method._made(fisher, whole, known)
            except ValueError as error:
                raise error if isinstance(error, InputError) else InputError(f"method Sst: {error}") from None
            kept = kept_by_module(made, whole, fisher.basis.shapes)
            norm = (made.norm() / whole.norm()).item()
            yield Patch(fisher.basis.patch(made), findings | {"patch_norm_kept": norm, "kept_by_module": kept})

    def _whole(self, utility: Mapping[str, Delta], safety: Mapping[str, Delta], fisher: FisherPair) -> torch.Tensor:
        """(D,) the patch before the filter."""
        patch = whole_patch(utility, safety, self.form)
        outside = fisher.basis.residual(patch)
        if outside > OUTSIDE_TOLERANCE and self.form == "interpolating":
            raise InputError(
                f"{outside:.1%} of ΔW_s − ΔW_u lies outside the Fisher files' space; method.form interpolating needs "
                "a run with --model.basis union"
            )
        if outside > OUTSIDE_TOLERANCE:
            raise InputError(
                f"the Fisher files are of another safety adapter: {outside:.1%} of this one lies outside their space"
            )
        return fisher.basis.coordinates(patch)

    def _made(
        self, fisher: FisherPair, whole: torch.Tensor, known: dict[tuple[Any, ...], Solved]
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        if self.relearns:
            if not isinstance(fisher, PatchedFisher):
                raise InputError(
                    "method.coefficients 'relearn' needs mean scores of both data sets and the utility Fisher matrix "
                    "at the patched point: a run with `--model.relearn true`"
                )
            if self.form == "interpolating" and fisher.start is None:
                raise InputError(
                    "method.form interpolating re-learns ΔW_s − ΔW_u, and the mean scores are those of ΔW_u + ΔW_s; "
                    "expected a run with `--model.reference_safety '{safety: 1.0}'`"
                )
            numbers = self.t, self.trust, self.rho_s, self.radius
            settings = RelearnSettings(*numbers, self.control, self.ridge, self.damping)
            return relearned(fisher, whole, settings)
        split = {"seed": self.holdout_seed, "eigenpairs": 0 if self.filter == "soft" else self.eigenpairs}
        key = (self.rho, self.rho_s, self._pencil_control, self.form, *split.values())
        if key not in known:
            known[key] = solve_once(fisher.safety, fisher.utility, whole, self._pencil, **split)
        return self._filtered(known[key])

    def _filtered(self, solved: Solved) -> tuple[torch.Tensor, dict[str, Any]]:
        expansion, folds = solved.expansion, solved.folds
        where = self._position(solved)
        phi = self._phi(expansion.system, where)
        if isinstance(phi, Cut) and phi.k == 0:
            if self.control == "random":
                raise InputError(
                    f"method.t is {self.t}: the filter keeps no direction, so method.control 'random' has none to "
                    "draw; expected a smaller t"
                )
            log.warning("method.t is %s: the filter keeps no direction, so the patch is zero; see a smaller t", self.t)
        findings = solved.findings | {"directions_kept": phi.k if isinstance(phi, Cut) else None, "held_out": None}
        if folds is not None:
            systems = [(fold.expansion, self._phi(fold.expansion.system, where), fold.fitted) for fold in folds]
            patches = [self._selected(*each, solved.whole) for each in systems]
            findings["held_out"] = mean_kept(folds, patches)
        return self._selected(expansion, phi, solved.fitted, solved.whole), findings

    @property
    def _pencil_control(self) -> PencilControl:
        return "none" if self.control == "random" else self.control

    def _pencil(self, safety: Fisher, utility: Fisher) -> Pencil:
        return make_pencil(safety, utility, rho=self.rho, rho_s=self.rho_s, control=self._pencil_control)

    def _position(self, solved: Solved) -> float | None:
        """Where the spectrum is cut (0 to 1): what a k of all rows and a k of half of them have in common."""
        system = solved.expansion.system
        if self.k is not None:
            try:
                return position(system, topk(system, self.k).k)
            except ValueError as error:
                # The filter names the setting that is out of range; here it gets its full name.
                raise InputError(f"method.{error}") from None
        if self.share is None:
            return None
        if solved.folds is None:
            raise InputError(
                "method.filter 'energy' chooses k on held-out rows; expected Fisher files of at least 4 rows each, "
                "halves kept apart, and on each half of both some energy of the patch"
            )
        where = energy_position(solved.folds, self.share)
        if where == 1:
            log.warning(
                "method.share is %s: nothing short of the whole patch keeps this share of the safety energy of "
                "held-out rows, so nothing is filtered",
                self.share,
            )
        return where

    def _phi(self, system: Eigensystem, where: float | None = None) -> Soft | Cut:
        if where is not None:
            return cut_at(system, where)
        tau = self.t * system.pencil.trace_ratio
        return soft(tau) if self.filter == "soft" else threshold(system, tau)

    def _selected(self, expansion: Expansion, phi: Soft | Cut, utility: Fisher, whole: torch.Tensor) -> torch.Tensor:
        if self.control == "random" and isinstance(phi, Cut):
            return random_projection(whole, utility, expansion.system.pencil.epsilon, k=phi.k, seed=self.seed)
        return expansion.at(phi)
