"""Re-learned coefficients of a patch from Fisher files (method.md section 5a): relative settings made absolute.

τ = t · tr(F_s)/tr(F_u⁺),   a = trust · tr(F_s)/tr(F_u),   σ ≥ rho_s · tr(F_s)/D with ‖c − c0‖ ≤ radius · ‖c0‖
"""

from typing import Any

import torch

from src.gevp.relearn import RelearnProblem, relearn
from src.merge.base import PatchedFisher


def relearned(
    fisher: PatchedFisher, whole: torch.Tensor, *, t: float, trust: float, rho_s: float, radius: float
) -> tuple[torch.Tensor, dict[str, Any]]:
    """(D,) new coefficients of a patch (D,), and numbers for the manifest.

    Args:
        fisher: Fisher matrices and mean scores.
        whole: Coefficients to start from.
        t: Relative weight of benign answers.
        trust: Relative weight of the utility trust region.
        rho_s: Relative proximal ridge, above 0.
        radius: Longest step, as a share of the norm of ``whole``.
    """
    trace = fisher.safety.trace()
    problem = RelearnProblem(
        safety=fisher.safety,
        benign=fisher.benign,
        utility=fisher.utility,
        safety_mean=fisher.safety_mean,
        benign_mean=fisher.benign_mean,
        tau=t * trace / fisher.benign.trace(),
        trust=trust * trace / fisher.utility.trace(),
        sigma=rho_s * trace / fisher.safety.dim,
    )
    length = whole.norm().item()
    made, sigma = relearn(problem, whole, radius * length)
    found = {"objective_before": problem.objective(whole, whole), "objective_after": problem.objective(made, whole)}
    # Both data sets' mean scores are of all rows: no row is left to judge by.
    found |= {"step": ((made - whole).norm() / length).item() if length else 0.0}
    return made, found | {"sigma": sigma, "tau": problem.tau, "trust": problem.trust, "held_out": None}
