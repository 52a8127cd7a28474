"""A ridge of Kronecker form: what a step costs where no calibration row has looked, guessed from where rows have.

Scores of a few hundred rows say nothing of most directions in the core space, and a ridge σI holds all of those alike.
Within a layer, though, the same rows tell well which inputs and which outputs matter: with their scores g_i as (p, q)
matrices,

    L = mean g_i g_iᵀ,     R = mean g_iᵀ g_i,     K = L ⊗ R / tr(L)

are (p, p) and (q, q), and K has the trace of the layer's Fisher matrix. That is Shampoo's preconditioner (Gupta et al.,
1802.09568), a relative of K-FAC (Martens and Grosse, 1503.05671). Over all layers K is scaled to a mean diagonal of 1
and damped by δI, and a step d is held by σK in place of σI: in coordinates K^½ d it is held by σI again, with scores
K^(-½) g. A bound on dᵀKd bounds what the step does to the model's answers to such rows, as the trust regions of
Schulman et al. (1502.05477) do; a bound on ‖d‖ takes no account of them.

Legend of shapes: p, q sides of a module's C; D coordinates; M rows of scores.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from src.fisher.base import Fisher, Shapes
from src.fisher.lowrank import LowRankFisher

CHUNK = 64
"""Scores that are taken to the ridge's coordinates together, in float64."""


@dataclass(frozen=True)
class _Side:
    """One module in the eigenbasis of its K.

    Attributes:
        left: (p, p) eigenvectors of L.
        right: (q, q) eigenvectors of R.
        root: (p, q) roots of K's eigenvalues, damped and scaled; above 0.
    """

    left: torch.Tensor
    right: torch.Tensor
    root: torch.Tensor


@dataclass(frozen=True)
class KroneckerRidge:
    """K = ⊕ L ⊗ R / tr(L), scaled and damped, and the coordinates in which it is the identity.

    Attributes:
        sides: Each module in the eigenbasis of its K, in the order of the coordinates.
    """

    sides: tuple[_Side, ...]

    def coordinates(self, vectors: torch.Tensor) -> torch.Tensor:
        """(…, D) coordinates ``c̃`` of vectors c (…, D), with ‖c̃‖² = cᵀ K c."""
        return self._each(vectors, lambda side, c: (side.left.T @ c @ side.right) * side.root)

    def scores(self, scores: torch.Tensor) -> torch.Tensor:
        """(…, D) scores in these coordinates, of scores g (…, D): gᵀc stays what it is."""
        return self._each(scores, lambda side, g: (side.left.T @ g @ side.right) / side.root)

    def vectors(self, coordinates: torch.Tensor) -> torch.Tensor:
        """(…, D) vectors c of coordinates (…, D)."""
        return self._each(coordinates, lambda side, c: side.left @ (c / side.root) @ side.right.T)

    def fisher(self, fisher: Fisher) -> LowRankFisher:
        """A Fisher matrix in these coordinates; its scores are a copy, in their own format.

        Raises:
            ValueError: it is not held as scores.
        """
        lowrank = _lowrank(fisher)
        table = torch.empty(lowrank.height, lowrank.dim, dtype=lowrank.columns(slice(0, 1)).dtype)
        whole = lowrank.scores
        for start in range(0, lowrank.height, CHUNK):
            some = slice(start, start + CHUNK)
            table[some] = self.scores(whole[some]).to(table.dtype)
        return replace(lowrank, stored=table, chosen=None)

    def _each(self, given: torch.Tensor, change: Callable[[_Side, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        lead = given.shape[:-1]
        parts = given.double().split([side.root.numel() for side in self.sides], dim=-1)
        changed = [change(s, part.reshape(*lead, *s.root.shape)) for s, part in zip(self.sides, parts, strict=True)]
        return torch.cat([part.reshape(*lead, -1) for part in changed], dim=-1)


def kronecker_ridge(fisher: Fisher, shapes: Shapes, damping: float) -> KroneckerRidge:
    """The ridge of the rows of a Fisher matrix.

    Args:
        fisher: Of benign rows, held as scores.
        shapes: (p, q) of each module in the order of the coordinates.
        damping: δ, beside a mean diagonal of 1; above 0.

    Raises:
        ValueError: the matrix is not held as scores or is zero, or δ is out of range.
    """
    if not 0 < damping < float("inf"):
        raise ValueError(f"damping is {damping}; expected a number above 0")
    lowrank, found, first = _lowrank(fisher), [], 0
    each = lowrank.trace() / lowrank.dim
    if each == 0:
        raise ValueError("the Fisher matrix of the ridge is zero")
    for p, q in shapes.values():
        scores = lowrank.columns(slice(first, first + p * q)).double().reshape(-1, p, q)
        first += p * q
        # Weighted examples carry the root of their weight, so the plain sum is the weighted one.
        rows, columns = scores.transpose(0, 1).reshape(p, -1), scores.reshape(-1, q)
        l_values, left = torch.linalg.eigh(rows @ rows.T / lowrank.total)
        r_values, right = torch.linalg.eigh(columns.T @ columns / lowrank.total)
        trace = l_values.sum()
        values = torch.outer(l_values.clamp_min(0), r_values.clamp_min(0)) / (trace if trace > 0 else 1.0)
        found.append(_Side(left, right, (values / each + damping).sqrt()))
    lowrank.release()
    return KroneckerRidge(tuple(found))


def _lowrank(fisher: Fisher) -> LowRankFisher:
    if not isinstance(fisher, LowRankFisher):
        raise ValueError(f"a ridge of Kronecker form needs lowrank Fisher files, not {fisher.representation}")
    return fisher
