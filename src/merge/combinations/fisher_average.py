"""Fisher-weighted averaging (2111.09832), diagonal or Kronecker-factored.

    diagonal    ΔW = Σ λ_i F_i ⊙ ΔW_i / Σ λ_i F_i
    Kronecker   Σ λ_i L_i ΔW R_i = Σ λ_i L_i ΔW_i R_i,   F_i = L_i ⊗ R_i

with λ_i ← λ_i / ‖F_i‖₂ where normalised. The base's weights cancel, so updates are averaged directly. The Kronecker
system has no closed form for more than two experts; it is symmetric positive definite and solved by conjugate
gradients. Pure functions: the statistics come from the caller.

Legend of shapes: O output features, I input features.
"""

from collections.abc import Callable, Sequence

import torch

FLOOR = 1e-6
MOST_STEPS = 1000
TOLERANCE = 1e-12


def diagonal_average(
    updates: Sequence[torch.Tensor],
    fishers: Sequence[torch.Tensor],
    weights: Sequence[float] | None = None,
    *,
    normalise: bool = True,
    floor: float = FLOOR,
) -> torch.Tensor:
    """(O, I) merged update, float64.

    Args:
        updates: ΔW_i, (O, I) each.
        fishers: Diagonal Fisher information of every weight, (O, I) each.
        weights: λ_i; unset means 1 for each.
        normalise: Divide each λ_i by the Euclidean norm of F_i.
        floor: Smallest Fisher information (after normalising): where nothing was seen the plain mean is taken.
    """
    given = weights or [1.0] * len(updates)
    scaled = []
    for fisher, weight in zip(fishers, given, strict=True):
        values = fisher.double()
        norm = values.norm().item() if normalise else 1.0
        scaled.append(weight * (values / norm if norm > 0 else values).clamp(min=floor))
    top = torch.stack([f * d.double() for f, d in zip(scaled, updates, strict=True)]).sum(0)
    return top / torch.stack(scaled).sum(0)


def kronecker_average(
    updates: Sequence[torch.Tensor],
    outputs: Sequence[torch.Tensor],
    inputs: Sequence[torch.Tensor],
    weights: Sequence[float] | None = None,
    *,
    ridge: float = FLOOR,
) -> torch.Tensor:
    """(O, I) merged update, float64.

    Args:
        updates: ΔW_i, (O, I) each.
        outputs: L_i = E[δδᵀ], (O, O) each.
        inputs: R_i = E[xxᵀ], (I, I) each.
        weights: λ_i; unset means 1 for each.
        ridge: Added to each factor, times its mean eigenvalue, so that directions unseen by all are averaged.
    """
    given = weights or [1.0] * len(updates)
    left = [w * _ridged(m, ridge) for w, m in zip(given, outputs, strict=True)]
    right = [_ridged(m, ridge) for m in inputs]
    pairs = list(zip(left, right, strict=True))
    target = torch.stack([f @ d.double() @ r for (f, r), d in zip(pairs, updates, strict=True)]).sum(0)
    start = torch.stack([d.double() for d in updates]).mean(0)
    return _conjugate_gradients(lambda x: torch.stack([f @ x @ r for f, r in pairs]).sum(0), target, start)


def _ridged(matrix: torch.Tensor, ridge: float) -> torch.Tensor:
    wide = matrix.double()
    return wide + ridge * wide.diagonal().mean() * torch.eye(len(wide), dtype=torch.float64)


def _conjugate_gradients(
    apply: Callable[[torch.Tensor], torch.Tensor], target: torch.Tensor, start: torch.Tensor
) -> torch.Tensor:
    x, residual = start, target - apply(start)
    direction, energy = residual, residual.square().sum()
    goal = TOLERANCE**2 * target.square().sum()
    for _ in range(MOST_STEPS):
        if energy <= goal:
            return x
        image = apply(direction)
        step = energy / (direction * image).sum()
        x, residual = x + step * direction, residual - step * image
        before, energy = energy, residual.square().sum()
        direction = residual + energy / before * direction
    raise ValueError(f"conjugate gradients did not converge in {MOST_STEPS} steps; a larger ridge helps")
