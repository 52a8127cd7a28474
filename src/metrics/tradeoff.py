"""What safety costs: the safety tax, drift, and numbers that sum up a front of safety against utility.

Safety tax of a model m against the utility expert u, signed (2503.00555 names the phenomenon):

    tax(m) = (utility(u) − utility(m)) / (safety(m) − safety(u))

It is utility lost per safety gained. Where the interval of the gain reaches 0 or lies below it there is no gain to
divide by (two losses would even give the sign of a bargain): the tax is *undefined*, and is said to be so instead of
being set to a number. Where the gain is sure, a few draws of its bootstrap may still hold none; a ratio of theirs could
be anything, so they count as −∞ for the lower end of the tax's interval and as +∞ for the upper one. That interval also
holds the ratios at the ends of the loss's and of the gain's own, which are honest where no draw differs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite

import torch

from src.metrics.bootstrap import ENDS, Estimate, bootstrap, paired_difference, resampled_means
from src.metrics.groups import EQUAL

UNDEFINED = "undefined: no safety gain"


@dataclass(frozen=True)
class Tax:
    """A safety tax with its parts; ``ratio`` is :data:`UNDEFINED` where the gain may be nothing."""

    loss: Estimate
    gain: Estimate
    ratio: Estimate | str


@dataclass(frozen=True)
class Point:
    """One model of a front: both coordinates are better when higher."""

    safety: float
    utility: float


def safety_tax(
    *,
    expert_utility: Sequence[float],
    model_utility: Sequence[float],
    expert_safety: Sequence[float],
    model_safety: Sequence[float],
    goals: Sequence[int] | None = None,
) -> Tax:
    """Signed utility loss per safety gain against the utility expert, from per-example scores of the same rows.

    The interval of the ratio is a bootstrap that resamples utility rows and safety rows apart, the latter by ``goals``,
    the number of each one's group, where some belong together; a draw without a gain widens it at both ends, and leaves
    the tax undefined where no end would be finite.
    """
    loss = paired_difference(expert_utility, model_utility, seed=0)
    gain = paired_difference(model_safety, expert_safety, seed=1, groups=goals)
    if gain.low <= EQUAL:
        return Tax(loss, gain, UNDEFINED)
    lost = torch.as_tensor(expert_utility).double() - torch.as_tensor(model_utility).double()
    gained = torch.as_tensor(model_safety).double() - torch.as_tensor(expert_safety).double()
    losses, gains = resampled_means(lost, seed=0), resampled_means(gained, seed=1, groups=goals)
    low, high = _ratio_interval(losses, gains)
    if not isfinite(high - low):
        return Tax(loss, gain, UNDEFINED)
    ends = [end / gain.value for end in (loss.low, loss.high)] + [loss.value / end for end in (gain.low, gain.high)]
    ratio = Estimate(loss.value / gain.value, min(low, *ends), max(high, *ends), min(loss.n, gain.n))
    return Tax(loss, gain, ratio)


def _ratio_interval(losses: torch.Tensor, gains: torch.Tensor) -> tuple[float, float]:
    """95 % interval of draws (draws,) of ``losses / gains``; one whose gain is not above 0 is beyond either end."""
    ends = [torch.where(gains > EQUAL, losses / gains, end) for end in (-inf, inf)]
    low, high = (torch.quantile(each, q).item() for each, q in zip(ends, ENDS, strict=True))
    return low, high


def drift(expert: Sequence[float], model: Sequence[float]) -> Estimate:
    """Mean absolute per-example change against the utility expert: what averages of gains and losses hide."""
    return bootstrap([abs(a - b) for a, b in zip(expert, model, strict=True)])


def safety_at_utility(points: Sequence[Point], *, reference: float, keep: float) -> float | None:
    """Highest safety among points that keep a share of the reference's utility; nothing where none does.

    Nor where the reference has none: every point would keep its share of nothing.
    """
    if reference <= 0:
        return None
    return max((p.safety for p in points if p.utility >= keep * reference), default=None)


def utility_at_attack_success(points: Sequence[tuple[float, float]], *, at_most: float) -> float | None:
    """Highest utility among (attack success, utility) points whose attacks succeed at most so often."""
    return max((utility for attack, utility in points if attack <= at_most), default=None)
