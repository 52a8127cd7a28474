"""The pencil of two low-rank Fisher matrices, solved exactly through Gram matrices.

With the scaled scores stacked, ``S = [G_s/√n_s; G_u/√n_u]`` and ``S Sᵀ = Q Λ Qᵀ``, the columns of ``Z = Sᵀ Q Λ^(-1/2)``
are an orthonormal basis of everything that the data have seen, and

    Zᵀ F_s Z = Λ^½ Q_sᵀ Q_s Λ^½,     Zᵀ F_u Z = Λ^½ Q_uᵀ Q_u Λ^½

so the D-dimensional pencil becomes a dense one of size m ≤ n_s + n_u. Cost O((n_s+n_u)² D + (n_s+n_u)³), memory O(n²)
beside the scores; no D × D matrix is formed (method.md sections 4 and 5).

Rules for awkward inputs: each side enters the Gram matrix at trace 1, so that neither hides the other; directions under
``SPAN_TOLERANCE`` of its largest eigenvalue (√ of it in scores: 3e-7) are rounding and count as unseen. A Gram matrix
squares: a direction whose scores are s times the largest carries a relative error of about 1e-16/s², so 1e-4 at
s = 1e-6 (condition 1e12), where the other solvers reach 1e-5 and better.

Legend of shapes: N scores of both data sets, m dimensions of their span, D coordinates.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from src.fisher.base import Fisher
from src.fisher.lowrank import LowRankFisher
from src.gevp.dense import extremes, whitened_eigh
from src.gevp.eigensystem import Eigensystem, condition
from src.gevp.pencil import Pencil, make_pencil
from src.gevp.stack import ScoreStack

SPAN_TOLERANCE = 1e-13
"""Eigenvalues of the Gram matrix under this share of the largest are rounding, not directions (float64)."""


@dataclass(frozen=True, kw_only=True)
class LowRankSystem(Eigensystem):
    """A pencil solved in the span of the scores; the rest is the complement.

    Attributes:
        stack: Both data sets' scores, each scaled to trace 1.
        to_span: (N, m): ``Z = Sᵀ to_span`` is an orthonormal basis (D, m) of the span.
        vectors: (m, m) eigenvectors in the basis Z.
        left: (m, m) ``Zᵀ (F_s + σI) Z``.
        right: (m, m) ``Zᵀ (F_u + εI) Z``.
    """

    stack: ScoreStack
    to_span: torch.Tensor
    vectors: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor

    def coordinates(self, patch: torch.Tensor) -> torch.Tensor:
        """(m,) coefficients ``Vᵀ (F_u + εI) c`` of a patch (D,)."""
        inside: torch.Tensor = self.to_span.T @ self.stack.times(patch)
        return self.vectors.T @ (self.right @ inside)

    def combine(self, coefficients: torch.Tensor) -> torch.Tensor:
        """(…, D) combinations ``V a`` of coefficients (…, m)."""
        return self.stack.transposed((coefficients @ self.vectors.T) @ self.to_span.T)

    def conditions(self) -> dict[str, float | None]:
        """Condition numbers of both sides, the complement's ridge included."""
        found: dict[str, float | None] = {}
        for name, matrix, ridge in (("left", self.left, self.sigma), ("right", self.right, self.epsilon)):
            low, high = extremes(matrix)
            if self.complement_dim:
                low, high = min(low, ridge), max(high, ridge)
            found[name] = condition(low, high, self.dim)
        return found


def solve_lowrank(safety: LowRankFisher, utility: LowRankFisher, *, rho: float, rho_s: float) -> LowRankSystem:
    """Solve ``(F_s + σI) v = λ (F_u + εI) v``; arguments and errors as in :func:`src.gevp.pencil.make_pencil`."""
    return lowrank_system(make_pencil(safety, utility, rho=rho, rho_s=rho_s))


def lowrank_system(pencil: Pencil) -> LowRankSystem:
    """Solve the pencil of two :class:`LowRankFisher`; a side that is None is its ridge alone.

    Raises:
        ValueError: a side has another representation, or the right side is not positive definite.
    """
    sides: list[LowRankFisher] = []
    for side in (pencil.left, pencil.right):
        if side is not None and not isinstance(side, LowRankFisher):
            raise ValueError(f"representation {side.representation}; expected lowrank")
        sides += [] if side is None else [side]
    traces = [side.trace() for side in sides]
    stack = ScoreStack(sides, [trace**-0.5 for trace in traces])
    spectrum, q = torch.linalg.eigh(stack.gram())
    kept = spectrum > SPAN_TOLERANCE * spectrum[-1]
    spectrum, q = spectrum[kept], q[:, kept]
    parts = (q * spectrum.sqrt()).split(stack.rows)
    grams = (trace * (part.T @ part) for trace, part in zip(traces, parts, strict=True))
    left = _projected(pencil.left, grams, pencil.sigma, len(spectrum))
    right = _projected(pencil.right, grams, pencil.epsilon, len(spectrum))
    values, vectors = whitened_eigh(left, right)
    return LowRankSystem(
        pencil=pencil,
        values=values.clamp_min(0.0),
        stack=stack,
        to_span=q / spectrum.sqrt(),
        vectors=vectors,
        left=left,
        right=right,
    )


def _projected(side: Fisher | None, grams: Iterator[torch.Tensor], ridge: float, size: int) -> torch.Tensor:
    identity = ridge * torch.eye(size, dtype=torch.float64)
    return identity if side is None else next(grams) + identity
