"""The core space: orthonormal bases of an adapter's column and row spaces, and patches written in them.

    P_m = U_m C_m V_mᵀ,   U_m (O, p), V_m (I, q) orthonormal, C_m (p, q) free

The coordinates of all modules are concatenated to one vector c of length D = sum of p·q. Bases come from the singular
vectors of the update itself, so they do not depend on how it is factored into B and A. The core space of several
adapters is that of 2509.17786 (bases of the stacked factors), of the factors ``U √σ`` and ``√σ Vᵀ`` that every
factoring shares.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from src.adapters.deltas import Delta, left_product, squared_norm
from src.adapters.geometry import orthonormal, spaces
from src.adapters.pairs import LowRankPair, Pairs, weighted_sum
from src.adapters.truncate import from_triplets


@dataclass(frozen=True)
class CoreBasis:
    """Bases ``u`` (O, p) and ``v`` (I, q) per module, float64, in the order of the coordinates."""

    u: dict[str, torch.Tensor]
    v: dict[str, torch.Tensor]

    @property
    def modules(self) -> list[str]:
        """Module names in the order of the coordinates."""
        return list(self.u)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(p, q) of each module's core."""
        return {name: (self.u[name].shape[1], self.v[name].shape[1]) for name in self.u}

    @property
    def dim(self) -> int:
        """D, the number of coordinates."""
        return sum(p * q for p, q in self.shapes.values())

    def digest(self) -> str:
        """SHA-256 of the bases rounded to float32: two Fisher files with one digest share coordinates."""
        digest = hashlib.sha256()
        for name in self.modules:
            digest.update(name.encode())
            for matrix in (self.u[name], self.v[name]):
                digest.update(matrix.to(torch.float32).contiguous().numpy().tobytes())
        return digest.hexdigest()

    def coordinates(self, deltas: Mapping[str, Delta]) -> torch.Tensor:
        """(D,) coordinates ``vec(Uᵀ ΔW V)`` of an update, projected on the core space; float64."""
        parts = []
        for name, (p, q) in self.shapes.items():
            if name not in deltas:
                core = torch.zeros(p, q, dtype=torch.float64)
            elif isinstance(delta := deltas[name], LowRankPair):
                core = (self.u[name].T @ delta.b.double()) @ (delta.a.double() @ self.v[name])
            else:
                core = left_product(self.u[name], delta) @ self.v[name]
            parts.append(core.reshape(-1))
        return torch.cat(parts)

    def patch(self, coordinates: torch.Tensor) -> Pairs:
        """The update with these coordinates as pairs ``(U C, Vᵀ)`` of rank q."""
        sizes = [p * q for p, q in self.shapes.values()]
        cores = torch.split(coordinates.double(), sizes)
        return {
            name: LowRankPair(self.v[name].T.contiguous(), self.u[name] @ core.reshape(self.shapes[name]))
            for name, core in zip(self.modules, cores, strict=True)
        }

    def residual(self, deltas: Mapping[str, Delta]) -> float:
        """Share of an update's Frobenius norm outside the core space (0: written exactly; 1: entirely outside)."""
        total = sum(squared_norm(delta) for delta in deltas.values())
        inside = self.coordinates(deltas).square().sum().item()
        return max(0.0, 1.0 - inside / total) ** 0.5 if total > 0 else 0.0


def core_basis(adapters: Sequence[Mapping[str, LowRankPair]]) -> CoreBasis:
    """Bases that span all the given adapters: one adapter gives ``basis: safety``, several ``basis: union``.

    Directions of vanishing singular values (:func:`~src.adapters.geometry.spaces`) are dropped, and so is a module
    without any update.

    Raises:
        ValueError: no adapter updates anything.
    """
    if len(adapters) == 1:
        spans = {name: (u, v) for name, pair in adapters[0].items() for u, _, v in (spaces(pair),)}
    else:
        balanced = [{name: from_triplets(*spaces(pair)) for name, pair in pairs.items()} for pairs in adapters]
        stacked = weighted_sum(balanced, [1.0] * len(adapters))
        spans = {name: (orthonormal([pair.b])[0], orthonormal([pair.a.T])[0]) for name, pair in stacked.items()}
    spans = {name: span for name, span in spans.items() if span[0].shape[1] and span[1].shape[1]}
    if not spans:
        raise ValueError("the adapters update no module: every delta is zero")
    return CoreBasis({n: u for n, (u, _) in spans.items()}, {n: v for n, (_, v) in spans.items()})
