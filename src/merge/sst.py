"""SST-Merge: keep the part of the safety patch that safety data care about and benign data do not.

The pencil (F_s + σI) v = λ (F_u + εI) v is solved in the core space of the safety adapter and the patch is filtered by
its eigenvalues (method.md sections 2 to 5).
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch

from src.adapters.pairs import LowRankPair
from src.errors import InputError
from src.fisher.lowrank import LowRankFisher
from src.gevp.eigensystem import Eigensystem, Filter
from src.gevp.filters import soft, topk
from src.gevp.lowrank import solve_lowrank
from src.merge.base import FisherPair, MergeMethod, Patch

OUTSIDE_TOLERANCE = 1e-3


class Sst(MergeMethod):
    """Filter the safety patch by the eigenvalues of F_s v = λ (F_u + εI) v, in the safety adapter's core space.

    Args:
        filter: ``soft`` multiplies each eigen-direction by λ/(λ + τ); ``topk`` keeps the k largest λ.
        t: Exchange rate of ``soft``, relative: τ = t · tr(F_s)/tr(F_u). Larger values give up more of the patch
            where utility data care. No unit; at least 0.
        k: Number of directions that ``topk`` keeps, 1 to D.
        rho: Ridge on F_u, relative: ε = rho · tr(F_u)/D. Above 0.
        rho_s: Ridge on F_s, relative: σ = rho_s · tr(F_s)/D. Keeps the patch where no calibration row has looked; 0
            drops it there. At least 0.
        holdout_seed: Seed of the split of calibration rows for the reported energies.
    """

    needs_fisher = True

    def __init__(
        self,
        filter: Literal["soft", "topk"] = "soft",
        t: float = 10.0,
        k: int | None = None,
        rho: float = 0.1,
        rho_s: float = 10.0,
        holdout_seed: int = 0,
    ) -> None:
        if not rho > 0:
            raise InputError(f"method.rho is {rho}; expected a number above 0")
        if not rho_s >= 0 or not t >= 0:
            raise InputError(f"method.rho_s is {rho_s} and method.t is {t}; expected numbers of at least 0")
        if (k is None) == (filter == "topk"):
            raise InputError(f"method.filter is {filter!r} and method.k is {k}; topk needs k, soft takes none")
        if k is not None and k < 1:
            raise InputError(f"method.k is {k}; expected at least 1")
        self.filter, self.t, self.k = filter, t, k
        self.rho, self.rho_s, self.holdout_seed = rho, rho_s, holdout_seed

    @property
    def name(self) -> str:
        """SST with its filter."""
        return f"SST {self.filter}"

    def patch(
        self, utility: Mapping[str, LowRankPair], safety: Mapping[str, LowRankPair], fisher: FisherPair | None
    ) -> Patch:
        """Solve the pencil and filter the safety update.

        Raises:
            InputError: k is out of range, or the safety update lies outside the Fisher matrices' core space.
        """
        if fisher is None:
            raise InputError("method Sst needs both Fisher files: pass --fisher")
        outside = fisher.basis.residual(safety)
        if outside > OUTSIDE_TOLERANCE:
            raise InputError(
                f"the Fisher files are of another safety adapter: {outside:.1%} of this one lies outside their space"
            )
        whole = fisher.basis.coordinates(safety)
        system = self._solve(fisher.safety, fisher.utility)
        filtered = system.apply(whole, self._phi(system))
        findings = _spectrum(system) | {
            "patch_norm_kept": (filtered.norm() / whole.norm()).item(),
            "held_out": self._held_out(fisher, whole),
        }
        return Patch(fisher.basis.patch(filtered), findings)

    def _solve(self, safety: LowRankFisher, utility: LowRankFisher) -> Eigensystem:
        return solve_lowrank(safety, utility, rho=self.rho, rho_s=self.rho_s)

    def _phi(self, system: Eigensystem) -> Filter:
        if self.k is None:
            return soft(self.t * system.trace_ratio)
        try:
            return topk(system, self.k)
        except ValueError as error:
            raise InputError(f"method.{error}") from None

    def _held_out(self, fisher: FisherPair, whole: torch.Tensor) -> dict[str, Any] | None:
        """Shares of the patch's energies kept, on calibration rows that did not fit it (two folds, averaged).

        On the rows that fit the filter the utility tax looks hundreds of times smaller than it is. ``topk`` is not
        refitted on a half: its k belongs to the spectrum of all rows.
        """
        if self.k is not None or min(fisher.safety.count, fisher.utility.count) < 4:
            return None
        halves = [_halves(f.count, self.holdout_seed) for f in (fisher.safety, fisher.utility)]
        kept: dict[str, list[float]] = {"safety_energy_kept": [], "utility_tax_kept": []}
        for fold in (0, 1):
            fit_s, fit_u = fisher.safety.subset(halves[0][fold]), fisher.utility.subset(halves[1][fold])
            seen_s, seen_u = fisher.safety.subset(halves[0][1 - fold]), fisher.utility.subset(halves[1][1 - fold])
            system = self._solve(fit_s, fit_u)
            filtered = system.apply(whole, self._phi(system))
            kept["safety_energy_kept"].append(seen_s.energy(filtered) / seen_s.energy(whole))
            kept["utility_tax_kept"].append(seen_u.energy(filtered) / seen_u.energy(whole))
        return {name: sum(values) / len(values) for name, values in kept.items()}


def _halves(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[: count // 2], order[count // 2 :]


def _spectrum(system: Eigensystem) -> dict[str, Any]:
    values = system.values
    share = values / values.sum()
    entropy = -(share[share > 0] * share[share > 0].log()).sum()
    return {
        "dim": system.dim,
        "span": len(values),
        "epsilon": system.epsilon,
        "sigma": system.sigma,
        "complement_eigenvalue": system.complement_value,
        "largest_eigenvalues": values[:8].tolist(),
        "effective_rank": entropy.exp().item(),
    }
