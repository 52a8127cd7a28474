"""LED-Merging (2502.16770): locate what each expert needs, elect it at base and expert, keep it where no other does.

    s(W) = |W| ⊙ E_x |∇_W log p(x)|                                 (O, I), mean over the calibration rows
    e_i  = top-r_i of s(W0)  and  top-r_i of s(W0 + ΔW_i)           both on expert i's rows, per module
    m_i  = e_i minus the union of the others' e_j
    θ0 + Σ_i λ_i m_i ⊙ ΔW_i

The paper adds magnitudes over 128 rows; their mean ranks alike. p(x) is of the whole answer, as in the paper; the
authors' code takes the mean over its tokens, which weighs long answers less. The paper's factor α is part of λ here.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch

from src.adapters.deltas import Delta, LazyDelta, blocks, changes, combined
from src.adapters.pairs import LowRankPair
from src.errors import InputError
from src.fisher.base import Fisher
from src.fisher.magnitude import Magnitude
from src.merge.base import FisherBesideBase, FisherPair, MergeMethod, Patch
from src.merge.ranges import finite, share
from src.merge.selection import at_least, kth_magnitude
from src.merge.weight_fishers import module_fisher, per_weight


class Led(MergeMethod):
    """LED-Merging (2502.16770): of each update keep the weights that it alone needs, at the base and at itself.

    Full rank. Needs mean magnitudes (``fisher --model.coordinates weight --model.representation magnitude
    --model.labels data``) twice, of the same rows: at the experts (``--model.reference_safety '{safety: 1.0}'
    --model.reference_utility utility``), which ``--fisher`` names, and at the base (both references ``base``). The
    base's weights are read from ``--base``; unset means the base that the adapters name.

    The patch is ``Σ_i λ_i m_i ⊙ ΔW_i − ΔW_u``, as this method thins the utility update too: strength 0 is the utility
    adapter, 1 the paper's merge, and those between lie on the line that joins them. To vary the share of safety in the
    paper's own way, keep strength 1 and sweep ``weight_safety``.

    Args:
        base_fisher: Directory of Fisher files measured at the base.
        share_utility: r of ΔW_u, share of a module's weights that counts as important, above 0 to 1 (the paper's .4 to
            .5).
        share_safety: r of ΔW_s (the paper's .1).
        weight_utility: λ of ΔW_u (the paper's .9).
        weight_safety: λ of ΔW_s (the paper's .9).
    """

    full_rank = True
    needs_fisher = True
    coordinates = "weight"
    representations = ("magnitude",)
    measured: ClassVar[Mapping[str, str]] = {"labels": "data", "granularity": "sequence"}
    beside_base = True

    def __init__(
        self,
        base_fisher: str | None = None,
        share_utility: float = 0.4,
        share_safety: float = 0.1,
        weight_utility: float = 0.9,
        weight_safety: float = 0.9,
    ) -> None:
        self.base_fisher = base_fisher
        self.share_utility = share(share_utility, "method.share_utility")
        self.share_safety = share(share_safety, "method.share_safety")
        self.weight_utility = finite(weight_utility, "method.weight_utility")
        self.weight_safety = finite(weight_safety, "method.weight_safety")

    def base_folder(self) -> str:
        """Where magnitudes at the base lie.

        Raises:
            InputError: no directory was given.
        """
        if self.base_fisher is None:
            raise InputError("method Led needs Fisher files measured at the base too: pass --method.base_fisher")
        return self.base_fisher

    def patch(self, utility: Mapping[str, Delta], safety: Mapping[str, Delta], fisher: FisherPair | None) -> Patch:
        """What the merge changes in the utility update, evaluated module by module in blocks of rows.

        Raises:
            InputError: magnitudes at the experts or at the base are missing, of another form, or lack a module.
        """
        if not isinstance(fisher, FisherBesideBase):
            raise InputError("method Led needs magnitudes at experts and base: pass --fisher and --method.base_fisher")
        both = (utility, safety)
        names = dict.fromkeys(name for deltas in both for name, delta in deltas.items() if changes(delta))
        merged = {name: self._module(name, both, fisher) for name in names}
        return Patch(combined([merged, utility], [1.0, -1.0]))

    def _module(self, name: str, both: Sequence[Mapping[str, Delta]], fisher: FisherBesideBase) -> LazyDelta:
        shape = next(deltas[name] for deltas in both if name in deltas).shape
        updates = [deltas.get(name, LowRankPair.zero(shape)) for deltas in both]
        weight, base = fisher.weights[name], fisher.base
        at_base = [scores([weight], f, name) for f in (base.utility, base.safety)]
        at_expert = [
            scores([weight, delta], f, name) for delta, f in zip(updates, (fisher.utility, fisher.safety), strict=True)
        ]
        shares, weights = (self.share_utility, self.share_safety), (self.weight_utility, self.weight_safety)
        found: list[list[float]] = []

        def evaluate(rows: slice) -> torch.Tensor:
            if not found:
                found.extend([cut(s, r) for s, r in zip(every, shares, strict=True)] for every in (at_base, at_expert))
            elected = [
                important(one.block(rows), low) & important(two.block(rows), high)
                for one, two, low, high in zip(at_base, at_expert, *found, strict=True)
            ]
            return led([delta.block(rows).double() for delta in updates], elected, weights)

        return LazyDelta(shape, evaluate)


def scores(weight: Sequence[Delta], fisher: Fisher, name: str) -> LazyDelta:
    """(O, I) scores ``|W| ⊙ E|g|`` of a module, float64, read a few rows at a time.

    Args:
        weight: What W is the sum of.
        fisher: Mean magnitudes.
        name: The module.

    Raises:
        InputError: the magnitudes lack the module, or are none.
    """
    shape = weight[0].shape
    own = module_fisher(fisher, name, shape, "method Led")
    if not isinstance(own, Magnitude):
        raise InputError(f"method Led needs mean magnitudes of gradients, not {own.representation}")
    means = per_weight(own, name)

    def evaluate(rows: slice) -> torch.Tensor:
        total = torch.stack([part.block(rows).double() for part in weight]).sum(0)
        return total.abs_() * means.block(rows)

    return LazyDelta(shape, evaluate)


def cut(scores: Delta, share: float) -> float:
    """The smallest of the ``int(share · numel)`` largest scores, in float32; infinity where that is none."""
    return kth_magnitude(lambda: blocks(scores), int(share * scores.shape[0] * scores.shape[1]))


def important(scores: torch.Tensor, cut: float) -> torch.Tensor:
    """Mask of the scores that reach a cut and are not zero."""
    return at_least(scores, cut) & (scores > 0)


def disjoint(elected: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Each mask without what any other one holds."""
    counts = torch.stack([mask.to(torch.int32) for mask in elected]).sum(0)
    return [mask & (counts == 1) for mask in elected]


def led(updates: Sequence[torch.Tensor], elected: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """``Σ_i λ_i m_i ⊙ ΔW_i`` of a module, or of some rows of it.

    Args:
        updates: ΔW_i, (O, I) each.
        elected: e_i, (O, I) masks.
        weights: λ_i.
    """
    terms = [w * mask * delta for w, mask, delta in zip(weights, disjoint(elected), updates, strict=True)]
    return torch.stack(terms).sum(0)
