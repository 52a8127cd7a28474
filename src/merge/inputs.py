"""What a merge works on: adapters and Fisher files, read and checked to belong together."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from src.adapters.base_weights import BaseWeights
from src.adapters.basis import CoreBasis
from src.adapters.checks import check_base, check_compatible
from src.adapters.peft_config import Layout
from src.adapters.peft_files import Adapter, read_adapter
from src.errors import InputError
from src.fisher.files import load_fisher
from src.merge.base import FisherPair
from src.merge.combination import Expert

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inputs:
    """Adapters of a merge.

    Attributes:
        experts: Utility adapters, in the user's order.
        weights: One per expert.
        safety: The safety adapter, where there is one.
        fisher: Both Fisher matrices, where the method needs them.
        seen: Hashes of the prompts that any of them was trained or calibrated on.
    """

    experts: list[Adapter]
    weights: list[float]
    safety: Adapter | None
    fisher: FisherPair | None
    seen: frozenset[str]

    @property
    def adapters(self) -> list[Adapter]:
        """All adapters, the safety adapter last."""
        return [*self.experts, *([self.safety] if self.safety else [])]

    @property
    def layout(self) -> Layout:
        """Which modules are embeddings, and whether layers store transposed weights."""
        total = Layout()
        for adapter in self.adapters:
            total |= adapter.layout
        return total

    def as_experts(self) -> list[Expert]:
        """What a combination works on; the weights' hash names an expert, whatever its position or path."""
        return [Expert(e.sha256, w, e.updates) for e, w in zip(self.experts, self.weights, strict=True)]


def read_inputs(
    utility: Sequence[str],
    weights: list[float] | None,
    safety: str | None,
    fisher: str | None,
    *,
    needs_fisher: bool,
    base: BaseWeights | None = None,
) -> Inputs:
    """Read and check everything that a merge needs.

    Args:
        utility: Utility adapters.
        weights: Their weights; unset means 1 for each.
        safety: The safety adapter, if any.
        fisher: Directory of the Fisher files, if any.
        needs_fisher: Whether the method needs them.
        base: The base's weights, for adapters whose updates are not low-rank.

    Raises:
        InputError: something is missing, broken or belongs to another model.
    """
    if not utility:
        raise InputError("utility is empty; expected at least one adapter")
    experts = [read_adapter(path, base) for path in utility]
    given = weights or [1.0] * len(experts)
    if len(given) != len(experts):
        raise InputError(f"utility_weights: {len(given)} weights for {len(experts)} adapters")
    patcher = read_adapter(safety, base) if safety is not None else None
    adapters = [*experts, *([patcher] if patcher else [])]
    check_compatible(adapters)
    pair, seen = None, set[str]()
    if needs_fisher:
        if patcher is None:
            raise InputError("this method needs the safety adapter that its Fisher files were measured for: --safety")
        pair, seen = _fisher_pair(fisher, experts, patcher)
    return Inputs(experts, given, patcher, pair, frozenset(seen).union(*(adapter.seen for adapter in adapters)))


def _fisher_pair(folder: str | None, experts: list[Adapter], safety: Adapter) -> tuple[FisherPair, set[str]]:
    """Both Fisher matrices, checked to belong to these adapters."""
    if folder is None:
        raise InputError(
            "this method needs both Fisher files: pass --fisher DIRECTORY (made by `python -m src fisher`)"
        )
    files = {name: load_fisher(Path(folder) / f"{name}.safetensors") for name in ("safety", "utility")}
    hashes = [expert.sha256 for expert in experts]
    for name, file in files.items():
        path = Path(folder) / f"{name}.safetensors"
        if file.record["pass"] != name:
            raise InputError(f"{path}: holds the {file.record['pass']} pass; expected the {name} pass")
        check_base(safety, file.record["base"]["name"], file.record["base"]["fingerprint"], what=f"the base of {path}")
        if file.record["safety"]["sha256"] != safety.sha256:
            raise InputError(
                f"{path}: measured for the safety adapter {file.record['safety']['path']}, not {safety.name}"
            )
        if [entry["sha256"] for entry in file.record["utility"]] != hashes:
            names = ", ".join(entry["path"] for entry in file.record["utility"])
            raise InputError(
                f"{path}: measured at the utility adapters {names}; those of this merge have other weights"
            )
    one, two = files["safety"], files["utility"]
    if one.record["basis_sha256"] != two.record["basis_sha256"]:
        raise InputError(f"{folder}: the two Fisher files use different coordinates; measure both in one run")
    seen = {prompt for file in files.values() for prompt in file.record["seen"]}
    return FisherPair(one.fisher, two.fisher, CoreBasis(one.u, one.v)), seen
