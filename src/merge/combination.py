"""What a combination is: any number of experts in, one update ΔW_u out.

A combination is also a method for the safety adapter, which is then one more expert: the patch is what the safety
adapter changes in the combination, ``combine(ΔW_u, ΔW_s) − ΔW_u``: strength 0 is ΔW_u and strength 1 the combination.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from src.adapters.deltas import Delta, Deltas, combined
from src.fisher.base import Fisher
from src.merge.base import FisherPair, MergeMethod, Patch


@dataclass(frozen=True)
class Expert:
    """One update to combine.

    Attributes:
        key: Name that does not depend on the expert's position; random masks are drawn from it.
        weight: Its weight, as given by the user.
        deltas: Its update per module; a module that it lacks has the update zero.
        fisher: Its own Fisher matrix in weight coordinates, for combinations that need one.
        name: What the user calls it; unset is the beginning of its key. For messages.
    """

    key: str
    weight: float
    deltas: Mapping[str, Delta]
    fisher: Fisher | None = None
    name: str = ""

    @property
    def called(self) -> str:
        """Its name in messages."""
        return self.name or self.key[:12]


class KeyedDeltas(Deltas):
    """An update per module, and the name from which random masks are drawn for it.

    Args:
        deltas: Update per module.
        key: As :attr:`Expert.key`.
        name: As :attr:`Expert.name`.
    """

    def __init__(self, deltas: Mapping[str, Delta], key: str, name: str = "") -> None:
        super().__init__(deltas)
        self.key, self.name = key, name


def as_expert(deltas: Mapping[str, Delta], role: str, fisher: Fisher | None = None) -> Expert:
    """An update as an expert of weight 1; one without a name of its own goes by its role."""
    key, name = (deltas.key, deltas.name) if isinstance(deltas, KeyedDeltas) else (role, role)
    return Expert(key, 1.0, deltas, fisher, name)


@dataclass(frozen=True)
class Combined:
    """The combined update and what the method found on the way (numbers for the manifest)."""

    deltas: Deltas
    findings: dict[str, Any] = field(default_factory=dict)


class Combination(MergeMethod):
    """A way to combine experts.

    Attributes:
        weight_safety: Weight of the safety adapter where it is one more expert.
    """

    weight_safety = 1.0
    AS_METHOD: ClassVar[tuple[str, ...]] = ()
    """Options that tell of the safety adapter: ``--combine`` reads none of them."""
    USE: ClassVar[str] = (
        "--combine: the utility experts become one update. --method: the safety adapter is one more expert, of\n"
        "weight 1 where no option says otherwise, and alpha multiplies what it changes in the combination."
    )

    @abstractmethod
    def combine(self, experts: Sequence[Expert]) -> Combined:
        """Combine experts, in their order.

        Args:
            experts: At least one.
        """

    @property
    def unread_by_combine(self) -> Mapping[str, str]:
        """As :attr:`unread`, of the same options where utility adapters are combined."""
        return {**self.unread, **self.changed(dict.fromkeys(self.AS_METHOD, "--method"))}

    def sum_weights(self, weights: Sequence[float]) -> list[float] | None:
        """Weights of the plain sum of updates that experts of these weights become; nothing where it is no such sum.

        Fisher passes measure at such a sum.
        """
        return None

    def patch(self, utility: Mapping[str, Delta], safety: Mapping[str, Delta], fisher: FisherPair | None) -> Patch:
        """What the safety adapter changes when it is one more expert."""
        f_u, f_s = (None, None) if fisher is None else (fisher.utility, fisher.safety)
        one, other = as_expert(utility, "utility", f_u), as_expert(safety, "safety", f_s)
        merged = self.combine([one, replace(other, weight=self.weight_safety)])
        return Patch(combined([merged.deltas, utility], [1.0, -1.0]), merged.findings)


def module_names(experts: Sequence[Expert]) -> list[str]:
    """Every module that an expert updates, in order of first appearance."""
    return list(dict.fromkeys(name for expert in experts for name in expert.deltas))


def common_shape(name: str, experts: Sequence[Expert]) -> tuple[int, int]:
    """(O, I) of a module's update.

    Raises:
        ValueError: two experts disagree.
    """
    shapes = list(dict.fromkeys(expert.deltas[name].shape for expert in experts if name in expert.deltas))
    if len(shapes) > 1:
        raise ValueError(f"{name}: updates of shapes {shapes[0]} and {shapes[1]} cannot be merged")
    return shapes[0]
