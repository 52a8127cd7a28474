"""What a merge works on: adapters and Fisher files, read and checked to belong together."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isclose, isfinite
from typing import Any

from src.adapters.base_weights import BaseWeights
from src.adapters.checks import base_revision, check_base, check_compatible
from src.adapters.peft_config import Layout
from src.adapters.peft_files import Adapter
from src.adapters.read_together import read_adapters
from src.errors import InputError
from src.merge.base import MergeMethod
from src.merge.combination import Combination, Expert
from src.merge.fishers import NONE, Calibration, read_pair, read_statistics

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inputs:
    """Adapters of a merge.

    Attributes:
        experts: Utility adapters, in the user's order.
        weights: One per expert.
        safety: The safety adapter, where there is one.
        calibration: Fisher matrices, where the method or the combination needs them.
        seen: Hashes of the prompts that any of them was trained or calibrated on.
    """

    experts: list[Adapter]
    weights: list[float]
    safety: Adapter | None
    calibration: Calibration
    seen: frozenset[str]

    @property
    def adapters(self) -> list[Adapter]:
        """All adapters, the safety adapter last."""
        return [*self.experts, *([self.safety] if self.safety else [])]

    @property
    def layout(self) -> Layout:
        """How the updates of all of them lie in the model."""
        total = Layout()
        for adapter in self.adapters:
            total |= adapter.layout
        return total

    def as_experts(self) -> list[Expert]:
        """What a combination works on; its hash names an expert, whatever its position or path."""
        statistics = self.calibration.statistics or (None,) * len(self.experts)
        each = zip(self.experts, self.weights, statistics, strict=True)
        return [Expert(e.identity, w, e.updates, fisher, e.name) for e, w, fisher in each]

    @property
    def combined_key(self) -> str:
        """The name of the utility adapters as one expert: that of the only one, or one of all, in any order."""
        return "+".join(sorted(expert.identity for expert in self.experts))


@dataclass(frozen=True)
class Calibrated:
    """Which Fisher files a merge reads.

    Attributes:
        folders: Directories, as the user named them.
        weights: Weight of each in F_u, if given.
        method: The safety method, if any.
        combine: The combination.
    """

    folders: Sequence[str]
    weights: Sequence[float] | None
    method: MergeMethod | None
    combine: Combination

    def read(self, experts: Sequence[Adapter], safety: Adapter | None, base: BaseWeights | None = None) -> Calibration:
        """Read what the stages need; nothing where they need nothing.

        Raises:
            InputError: files are missing, or do not belong to these adapters, or both stages need some.
        """
        method = self.method if self.method is not None and self.method.needs_fisher else None
        if self.combine.needs_fisher and method is not None:
            raise InputError(
                f"{type(self.combine).__name__} and {type(method).__name__} both need Fisher files; write the "
                "combination as an adapter first, measure at it, and merge that"
            )
        needy = self.combine if self.combine.needs_fisher else method
        if needy is None:
            return NONE
        if not self.folders:
            raise InputError(
                f"{type(needy).__name__} needs Fisher files: pass --fisher DIRECTORY (made by `python -m src fisher`)"
            )
        if needy is self.combine:
            if self.weights is not None:
                raise InputError("fisher_weights weigh utility Fishers of a safety method; use utility_weights")
            return read_statistics(self.folders, experts, needy)
        if safety is None:
            raise InputError("this method needs the safety adapter that its Fisher files were measured for: --safety")
        return read_pair(self.folders, self.weights, experts, safety, needy, base)


def read_inputs(
    utility: Sequence[str],
    weights: list[float] | None,
    safety: str | None,
    calibrated: Calibrated,
    base: BaseWeights | None = None,
    aliases: Sequence[str] = (),
) -> Inputs:
    """Read and check everything that a merge needs.

    Args:
        utility: Utility adapters.
        weights: Their weights; unset means 1 for each.
        safety: The safety adapter, if any.
        calibrated: The Fisher files.
        base: The base's weights, for adapters whose updates are not low-rank.
        aliases: Names that all mean the adapters' base.

    Raises:
        InputError: something is missing, broken or belongs to another model.
    """
    if not utility:
        raise InputError("utility is empty; expected at least one adapter")
    given = weights or [1.0] * len(utility)
    if len(given) != len(utility):
        raise InputError(f"utility_weights: {len(given)} weights for {len(utility)} adapters")
    if not all(isfinite(weight) for weight in given):
        raise InputError(f"utility_weights are {given}; expected finite numbers")
    adapters = read_adapters([*utility, *([safety] if safety is not None else [])], base)
    experts, patcher = adapters[: len(utility)], adapters[-1] if safety is not None else None
    check_compatible(adapters, aliases)
    further = calibrated.method.adapters() if calibrated.method is not None else []
    names, what = [*aliases, *(adapter.base for adapter in adapters)], f"that of {experts[0].name}"
    first, revision = experts[0], base_revision(adapters, experts[0].base)
    for adapter in further:
        check_base(
            adapter, first.base, first.fingerprint, what=what, aliases=names, option="--aliases", revision=revision
        )
    found = calibrated.read(experts, patcher, base)
    if found.pair is not None:
        _warn_of_other_point(found.files, calibrated.combine, given)
    seen = found.seen.union(*(adapter.seen for adapter in (*adapters, *further)))
    return Inputs(experts, given, patcher, found, seen)


def _warn_of_other_point(files: Sequence[Mapping[str, Any]], combine: Combination, given: Sequence[float]) -> None:
    """Say so where Fisher matrices were measured at another model than the one that the patch is added to."""
    at, name = combine.sum_weights(given), type(combine).__name__
    if at is None:
        log.warning(
            "%s: measured at a plain sum of the utility adapters, not at what %s makes of them; write the combination "
            "as an adapter first, measure at it, and merge that",
            files[0]["path"],
            name,
        )
        return
    for entry in files:
        known = entry["utility_weights"]
        if len(known) != len(at) or not all(isclose(one, other) for one, other in zip(known, at, strict=True)):
            log.warning("%s: measured at utility weights %s, not %s", entry["path"], known, at)
