"""Combinations that work in bases of the experts' own column and row spaces: low-rank in, low-rank out.

Everything is derived from singular triplets of ``s·B·A``, so it does not depend on how an update is factored.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from src.adapters.deltas import Deltas, DenseDelta, lowrank, matrix
from src.adapters.geometry import spaces
from src.adapters.pairs import LowRankPair
from src.errors import InputError
from src.merge.combination import Combination, Combined, Expert, common_shape, module_names
from src.merge.combinations.ties import Ties


@dataclass(frozen=True)
class Part:
    """One expert's update of one module, as singular triplets ``U diag(σ) Vᵀ``."""

    key: str
    weight: float
    u: torch.Tensor
    sigma: torch.Tensor
    v: torch.Tensor

    def times_right(self, left: torch.Tensor) -> torch.Tensor:
        """``leftᵀ U diag(σ) Vᵀ``."""
        return ((left.T @ self.u) * self.sigma) @ self.v.T


class Subspace(Combination):
    """A combination whose result for a module follows from the triplets of the experts that have it."""

    takes_full_rank = False

    @abstractmethod
    def module(self, name: str, parts: Sequence[Part], shape: tuple[int, int]) -> tuple[LowRankPair, dict[str, Any]]:
        """Merge one module; returns its update and findings.

        Args:
            name: The module.
            parts: Experts that have it, at least one with a non-zero update.
            shape: (O, I).
        """

    def combine(self, experts: Sequence[Expert]) -> Combined:
        """Merge module by module; a module whose updates are all zero is left out."""
        try:
            pairs = [(expert, lowrank(expert.deltas)) for expert in experts]
        except ValueError as error:
            raise InputError(f"{self.name} works in the factors of low-rank updates; {error}") from None
        deltas: Deltas = {}
        findings: dict[str, Any] = {}
        for name in module_names(experts):
            shape = common_shape(name, experts)
            parts = [Part(e.key, e.weight, *spaces(given[name])) for e, given in pairs if name in given]
            parts = [part for part in parts if len(part.sigma)]
            if parts:
                deltas[name], found = self.module(name, parts, shape)
                findings |= {name: found} if found else {}
        return Combined(deltas, {"modules": findings} if findings else {})


def checked_inner(inner: Combination | None, owner: str) -> Combination:
    """The combination that merges coordinates; unset means ``Ties``.

    Args:
        inner: The user's choice.
        owner: Whose ``inner`` it is, for the message.

    Raises:
        InputError: it needs a look at whole updates, and coordinates are merged one module at a time.
    """
    if isinstance(inner, Ties) and inner.trim == "global":
        raise InputError(f"{owner} inner is Ties with trim 'global'; expected 'tensor': modules are merged one by one")
    return inner or Ties()


def merge_coordinates(
    inner: Combination, name: str, parts: Sequence[Part], coordinates: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Combine the experts' coordinates in a common basis by any combination."""
    experts = [Expert(part.key, part.weight, {name: DenseDelta(c)}) for part, c in zip(parts, coordinates, strict=True)]
    return matrix(inner.combine(experts).deltas[name])
