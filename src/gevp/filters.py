"""Filters φ(λ): which share of each eigen-direction of a patch is kept (method.md section 5).

* ``soft``: λ / (λ + τ), the solution of ``min_c (c−c0)ᵀ(F_s+σI)(c−c0) + τ cᵀ(F_u+εI)c``
* ``topk``: 1 for the k largest λ, the projection on the safety subspace in the metric F_u + εI
"""

import torch

from src.gevp.eigensystem import Eigensystem, Filter


def soft(tau: float) -> Filter:
    """λ / (λ + τ) for an exchange rate τ ≥ 0 in units of safety energy per utility energy; τ = 0 keeps everything.

    Raises:
        ValueError: τ is negative or not a number.
    """
    if not tau >= 0:
        raise ValueError(f"tau is {tau}; expected a number of at least 0")
    if tau == 0:
        return torch.ones_like
    return lambda values: values / (values + tau)


def topk(system: Eigensystem, k: int) -> Filter:
    """1 for the k largest of all D eigenvalues.

    The complement is one eigenvalue of multiplicity D − m: a cut inside it would depend on an arbitrary basis.

    Raises:
        ValueError: k is out of 1..D, or the cut falls inside an eigenvalue's multiplicity.
    """
    if not 1 <= k <= system.dim:
        raise ValueError(f"k is {k}; expected 1 to D = {system.dim}")
    if k == system.dim:
        return torch.ones_like
    above = int((system.values > system.complement_value * (1 + 1e-9)).sum()) if system.complement_dim else 0
    if above < k < above + system.complement_dim:
        raise ValueError(
            f"k is {k}, which cuts through the {system.complement_dim} directions that no calibration row has seen "
            f"(one eigenvalue, {system.complement_value:.3g}); expected 1 to {above}, or "
            f"{above + system.complement_dim} to {system.dim}"
        )
    spectrum = torch.cat([system.values, torch.full((system.complement_dim,), system.complement_value).double()])
    ordered = spectrum.sort(descending=True).values
    threshold = (ordered[k - 1] + ordered[k]) / 2
    return lambda values: (values >= threshold).to(values.dtype)
