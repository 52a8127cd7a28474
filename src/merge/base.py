"""What a merge method is: it turns the safety adapter into the patch that strength α multiplies."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from src.adapters.basis import CoreBasis
from src.adapters.deltas import Delta
from src.adapters.peft_files import Adapter
from src.errors import InputError
from src.fisher.base import Fisher, Representation

Coordinates = Literal["core", "weight"]
ALL: tuple[Representation, ...] = ("lowrank", "block", "kronecker", "diagonal")


@dataclass(frozen=True)
class FisherPair:
    """F_s and F_u in one set of coordinates; in weight coordinates the basis is empty."""

    safety: Fisher
    utility: Fisher
    basis: CoreBasis


@dataclass(frozen=True)
class PatchedFisher(FisherPair):
    """Both Fisher matrices, and what re-learned coefficients need beside them, all but F_u at θ0 + ΔW_u + P.

    Attributes:
        benign: F_u⁺, the utility Fisher matrix at the patched point.
        safety_mean: (D,) mean score of refusals with the data's labels.
        benign_mean: (D,) mean score of benign answers with the data's labels.
        halves: The same of two disjoint halves of the rows, where files hold them and P was not made with these rows.
        start: (D,) coefficients of P; unset where P is the safety adapter's own update.
    """

    benign: Fisher
    safety_mean: torch.Tensor
    benign_mean: torch.Tensor
    halves: "tuple[PatchedFisher, PatchedFisher] | None" = None
    start: torch.Tensor | None = None


@dataclass(frozen=True)
class FisherBesideBase(FisherPair):
    """What was measured at each expert, and the base beside it.

    Attributes:
        base: What was measured on the same rows at θ0.
        weights: W0 of each module, (O, I).
    """

    base: FisherPair
    weights: Mapping[str, Delta]


@dataclass(frozen=True)
class Patch:
    """The patch to add to ``θ0 + ΔW_u`` and what the method found on the way (numbers for the manifest)."""

    pairs: Mapping[str, Delta]
    findings: dict[str, Any] = field(default_factory=dict)


def check_patch(method: object, patch: object, updates: Sequence[Mapping[str, Delta]]) -> None:
    """Stop where a method, one of the user's own say, returns no patch of the modules of these updates.

    Raises:
        InputError: it is no patch, or a module of it has another shape than there, or is not there.
    """
    named = f"method {type(method).__name__} returned"
    if not isinstance(patch, Patch):
        raise InputError(f"{named} a {type(patch).__name__}; expected a src.merge.base.Patch")
    shapes = {name: tuple(delta.shape) for each in updates for name, delta in each.items()}
    for name, delta in patch.pairs.items():
        if shapes.get(name) != tuple(delta.shape):
            raise InputError(f"{named} {tuple(delta.shape)} for {name}; expected {shapes.get(name, 'no such module')}")


class MergeMethod(ABC):
    """A way to derive the patch. The merged model is ``θ0 + ΔW_u + α · patch``, exactly.

    Options are kept as they are given, as plain attributes of their own names: so they reach manifests and sweeps.
    """

    USE: ClassVar[str] = "alpha multiplies the patch that the method adds; 0 gives base and utility adapters alone."
    """What the command line says of every method of a kind."""
    needs_fisher = False
    coordinates: ClassVar[Coordinates] = "core"
    """Coordinates of its Fisher files."""
    representations: ClassVar[tuple[Representation, ...]] = ALL
    """Representations of Fisher matrices that it can work with."""
    measured: ClassVar[Mapping[str, str]] = {}
    """What else the ``fisher`` command must have been told, ``--model.KEY VALUE``."""
    full_rank = False
    """Whether its updates are full rank whatever its options."""
    takes_full_rank = True
    """Whether updates may be full rank, such as a TIES merge of several experts."""
    reads_utility_fisher = True
    """Whether it reads F_u; else weights of F_u have no effect."""
    beside_base = False
    """Whether it needs Fisher files measured at the base too, which its option ``base_fisher`` names."""

    @property
    def name(self) -> str:
        """The name under which results are listed."""
        return type(self).__name__

    @property
    def needs_safety(self) -> bool:
        """Whether the method works on the safety adapter."""
        return True

    @property
    def safety_point(self) -> Mapping[str, float] | None:
        """Weights of the adapters where F_s should be measured, where these options leave no choice."""
        return None

    @property
    def relearns(self) -> bool:
        """Whether it needs mean scores and the benign pass at the patched point too (:class:`PatchedFisher`)."""
        return False

    @property
    def unread(self) -> Mapping[str, str]:
        """Options that were changed and have no effect beside the others: name to with what they would have one."""
        return self.changed(self.without_effect())

    def changed(self, options: Mapping[str, str]) -> Mapping[str, str]:
        """Those of these options that are not at their defaults."""
        defaults = inspect.signature(type(self)).parameters
        return {name: what for name, what in options.items() if getattr(self, name) != defaults[name].default}

    def without_effect(self) -> Mapping[str, str]:
        """Options that nothing reads beside the others, changed or not: name to with what they are read."""
        return {}

    def base_folder(self) -> str | None:
        """Directory of Fisher files measured at the base, where it needs them too (:class:`FisherBesideBase`)."""
        return None

    def adapters(self) -> list[Adapter]:
        """Further adapters that it reads; they must be of the base of the merge."""
        return []

    @abstractmethod
    def patch(self, utility: Mapping[str, Delta], safety: Mapping[str, Delta], fisher: FisherPair | None) -> Patch:
        """Derive the patch.

        Args:
            utility: The (summed) utility update ΔW_u.
            safety: The safety update ΔW_s.
            fisher: Both Fisher matrices, where the method needs them.
        """

    def outline(
        self, utility: Mapping[str, Delta], safety: Mapping[str, Delta], fisher: FisherPair | None
    ) -> Mapping[str, Delta]:
        """An update with the patch's shapes and ranks, for a dry run; the patch itself, as most of them cost little.

        Args:
            utility: The (summed) utility update ΔW_u.
            safety: The safety update ΔW_s.
            fisher: Both Fisher matrices, where the method needs them.
        """
        return self.patch(utility, safety, fisher).pairs

    def patches(
        self,
        variants: Sequence["MergeMethod"],
        utility: Mapping[str, Delta],
        safety: Mapping[str, Delta],
        fisher: FisherPair | None,
    ) -> Iterator[Patch]:
        """Patches of several methods of this class that differ in settings only, one after the other.

        A method whose work is mostly the same for all of them (one solve for a whole path) overrides this.

        Args:
            variants: The methods, this one among them.
            utility: The (summed) utility update ΔW_u.
            safety: The safety update ΔW_s.
            fisher: Both Fisher matrices, where the method needs them.
        """
        for method in variants:
            yield method.patch(utility, safety, fisher)
