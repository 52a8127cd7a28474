"""Combinations that work in bases of the experts' own column and row spaces: low-rank in, low-rank out.

Everything is derived from singular triplets of ``s·B·A``, so it does not depend on how an update is factored.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from src.adapters.deltas import Delta, Deltas, DenseDelta, lowrank, matrix
from src.adapters.geometry import spaces
from src.adapters.pairs import LowRankPair
from src.errors import InputError
from src.merge.combination import Combination, Combined, Expert, common_shape, module_names
from src.merge.combinations.ties import Ties


@dataclass(frozen=True)
class Part:
    """One expert's update of one module, as singular triplets ``U diag(σ) Vᵀ``; none where it changes nothing."""

    key: str
    weight: float
    u: torch.Tensor
    sigma: torch.Tensor
    v: torch.Tensor

    def times_right(self, left: torch.Tensor) -> torch.Tensor:
        """``leftᵀ U diag(σ) Vᵀ``."""
        return ((left.T @ self.u) * self.sigma) @ self.v.T


class Subspace(Combination):
    """A combination whose result for a module follows from the triplets of the experts' updates."""

    takes_full_rank = False

    @abstractmethod
    def module(self, name: str, parts: Sequence[Part], shape: tuple[int, int]) -> tuple[LowRankPair, dict[str, Any]]:
        """Merge one module; returns its update and findings.

        Args:
            name: The module.
            parts: The experts, at least one with a non-zero update.
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
            nothing = [torch.zeros(*size, dtype=torch.float64) for size in ((shape[0], 0), (0,), (shape[1], 0))]
            own = [spaces(given[name]) if name in given else nothing for _, given in pairs]
            parts = [Part(e.key, e.weight, *triplets) for e, triplets in zip(experts, own, strict=True)]
            if any(len(part.sigma) for part in parts):
                deltas[name], found = self.module(name, parts, shape)
                findings |= {name: found} if found else {}
        return Combined(deltas, {"modules": findings} if findings else {})


def checked_inner(inner: Combination | None, owner: str) -> Combination:
    """The combination that merges coordinates; unset means ``Ties``.

    Args:
        inner: The user's choice.
        owner: Whose ``inner`` it is, for the message.

    Raises:
        InputError: it needs a look at whole updates, and coordinates are merged one module at a time, or Fisher files,
            which are of weights and not of coordinates.
    """
    if inner is not None and inner.needs_fisher:
        raise InputError(
            f"{owner} inner is {type(inner).__name__}, which needs Fisher files; those are of weights, and coordinates "
            "are merged here: expected a combination without Fisher files"
        )
    if isinstance(inner, Ties) and inner.trim == "global":
        raise InputError(f"{owner} inner is Ties with trim 'global'; expected 'tensor': modules are merged one by one")
    return inner or Ties()


def merge_coordinates(
    inner: Combination, name: str, parts: Sequence[Part], coordinates: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Combine the experts' coordinates in a common basis by any combination; zero where it finds nothing to keep."""
    held: list[Delta] = [DenseDelta(c) if inner.takes_full_rank else _as_pair(c) for c in coordinates]
    experts = [Expert(part.key, part.weight, {name: delta}) for part, delta in zip(parts, held, strict=True)]
    merged = inner.combine(experts).deltas.get(name)
    return torch.zeros_like(coordinates[0]) if merged is None else matrix(merged)


def _as_pair(coordinates: torch.Tensor) -> LowRankPair:
    """The same matrix as factors, exactly."""
    return LowRankPair(coordinates, torch.eye(len(coordinates), dtype=coordinates.dtype))
