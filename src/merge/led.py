"""LED-Merging (2502.16770), as pure functions: locate, elect and keep disjoint what each expert needs.

    score = |W| ⊙ Σ_x |∇L(x)|,   e_i = top-r of base score and of expert score,   m_i = e_i minus the others' union
    θ0 + Σ λ_i m_i ⊙ ΔW_i

Scores need the summed magnitude of every weight's gradient on calibration rows (128 in the paper). No Fisher file
holds it: a diagonal is E[g²], and its root is no E|g|; a pass of its own would be needed, at the base and at each
expert. So this is no method of the command line; the caller brings the scores.
"""

from collections.abc import Sequence

import torch

from src.merge.selection import at_least, kth_magnitude


def important(scores: torch.Tensor, share: float) -> torch.Tensor:
    """(O, I) mask of the ``int(share · numel)`` largest scores of a tensor."""
    return at_least(scores, kth_magnitude(lambda: [scores], int(share * scores.numel()))) & (scores > 0)


def disjoint(elected: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Each mask without what any other one holds."""
    counts = torch.stack([mask.to(torch.int32) for mask in elected]).sum(0)
    return [mask & (counts == 1) for mask in elected]


def led(
    updates: Sequence[torch.Tensor],
    base_scores: Sequence[torch.Tensor],
    expert_scores: Sequence[torch.Tensor],
    shares: Sequence[float],
    weights: Sequence[float],
) -> torch.Tensor:
    """(O, I) merged update of one module.

    Args:
        updates: ΔW_i, (O, I) each.
        base_scores: Scores of the base on expert i's rows.
        expert_scores: Scores of expert i on its rows.
        shares: r_i, share of a tensor that is important (the paper's .1 for safety, .4 to .5 for tasks).
        weights: λ_i.
    """
    elected = [
        important(base, share) & important(expert, share)
        for base, expert, share in zip(base_scores, expert_scores, shares, strict=True)
    ]
    terms = [w * mask * delta for w, mask, delta in zip(weights, disjoint(elected), updates, strict=True)]
    return torch.stack(terms).sum(0)
