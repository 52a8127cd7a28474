"""The pencil of two low-rank Fisher matrices, solved exactly through Gram matrices.

With the scaled scores stacked, ``S = [G_s/√n_s; G_u/√n_u]`` and ``S Sᵀ = Q Λ Qᵀ``, the columns of ``Z = Sᵀ Q Λ^(-1/2)``
are an orthonormal basis of everything that the data have seen, and

    Zᵀ F_s Z = Λ^½ Q_sᵀ Q_s Λ^½,     Zᵀ F_u Z = Λ^½ Q_uᵀ Q_u Λ^½

so the D-dimensional pencil becomes a dense one of size m ≤ n_s + n_u. Cost O((n_s+n_u)² D + (n_s+n_u)³); no D × D
matrix is formed. Memory beside the scores: at most five m × m matrices (LAPACK works in
place, its workspace is two of them), and Q and V afterwards.

Rules for awkward inputs: each side enters the Gram matrix at trace 1, so that neither hides the other; directions under
``SPAN_TOLERANCE`` of its largest eigenvalue (√ of it in scores: 3e-7) are rounding and count as unseen. A Gram matrix
squares: a direction whose scores are s times the largest carries a relative error of about 1e-16/s², so 1e-4 at
s = 1e-6 (condition 1e12), where the other solvers reach 1e-5 and better.

Legend of shapes: N scores of both data sets, m dimensions of their span, D coordinates.
"""

from dataclasses import dataclass, replace

import scipy.linalg
import torch

from src.fisher.lowrank import LowRankFisher
from src.gevp.dense import extremes, whitened_eigh
from src.gevp.eigensystem import Eigensystem, condition, unrounded
from src.gevp.pencil import Pencil
from src.gevp.stack import ScoreStack

SPAN_TOLERANCE = 1e-13
"""Eigenvalues of the Gram matrix under this share of the largest are rounding, not directions (float64)."""


@dataclass(frozen=True)
class _Side:
    """One Fisher matrix in the span: ``Zᵀ F Z = trace · Λ^½ Qᵢᵀ Qᵢ Λ^½``, with ridge · I on top.

    Attributes:
        q: (n_i, m) its rows of Q; None where the side is its ridge alone.
        trace: Its trace, where the stack holds it at trace 1.
        ridge: Its ridge.
    """

    q: torch.Tensor | None = None
    trace: float = 0.0
    ridge: float = 0.0

    def matrix(self, spectrum: torch.Tensor) -> torch.Tensor:
        """(m, m) with the ridge."""
        if self.q is None:
            return self.ridge * torch.eye(len(spectrum), dtype=torch.float64)
        part = self.q * (self.trace * spectrum).sqrt()
        found = part.T @ part
        found.diagonal().add_(self.ridge)
        return found

    def times(self, vector: torch.Tensor, spectrum: torch.Tensor) -> torch.Tensor:
        """(m,) product with the ridge."""
        if self.q is None:
            return self.ridge * vector
        root = (self.trace * spectrum).sqrt()
        return root * (self.q.T @ (self.q @ (root * vector))) + self.ridge * vector

    def extremes(self, spectrum: torch.Tensor) -> tuple[float, float]:
        """Least and greatest eigenvalue in the span, with the ridge."""
        if self.q is None:
            return self.ridge, self.ridge
        part = self.q * (self.trace * spectrum).sqrt()
        wide = part.shape[0] < part.shape[1]
        low, high = extremes(part @ part.T if wide else part.T @ part)
        return self.ridge if wide else max(low, 0.0) + self.ridge, high + self.ridge


@dataclass(frozen=True, kw_only=True)
class LowRankSystem(Eigensystem):
    """A pencil solved in the span of the scores; the rest is the complement.

    Attributes:
        stack: Both data sets' scores, each scaled to trace 1.
        spectrum: (m,) the eigenvalues Λ of its Gram matrix that are no rounding.
        q: (N, m) their eigenvectors: ``Z = Sᵀ Q Λ^(-1/2)`` is an orthonormal basis (D, m) of the span.
        vectors: (m, m) eigenvectors of the pencil in the basis Z.
        left: ``F_s + σI`` in the span.
        right: ``F_u + εI`` in the span.
    """

    stack: ScoreStack
    spectrum: torch.Tensor
    q: torch.Tensor
    vectors: torch.Tensor
    left: _Side
    right: _Side

    def coordinates(self, patch: torch.Tensor) -> torch.Tensor:
        """(m,) coefficients ``Vᵀ (F_u + εI) c`` of a patch (D,)."""
        inside = (self.q.T @ self.stack.times(patch)) / self.spectrum.sqrt()
        return self.vectors.T @ self.right.times(inside, self.spectrum)

    def combine(self, coefficients: torch.Tensor) -> torch.Tensor:
        """(…, D) combinations ``V a`` of coefficients (…, m)."""
        inside = (coefficients @ self.vectors.T) / self.spectrum.sqrt()
        return self.stack.transposed(inside @ self.q.T)

    def conditions(self) -> dict[str, float | None]:
        """Condition numbers of both sides, the complement's ridge included."""
        found: dict[str, float | None] = {}
        for name, side in (("left", self.left), ("right", self.right)):
            low, high = side.extremes(self.spectrum)
            if self.complement_dim:
                low, high = min(low, side.ridge), max(high, side.ridge)
            found[name] = condition(low, high, self.dim)
        return found


def lowrank_system(pencil: Pencil) -> LowRankSystem:
    """Solve the pencil of two :class:`LowRankFisher`; a side that is None is its ridge alone.

    Raises:
        ValueError: the right side is not positive definite.
    """
    given = [side for side in (pencil.left, pencil.right) if isinstance(side, LowRankFisher)]
    traces = [side.trace() for side in given]
    stack = ScoreStack(given, [trace**-0.5 for trace in traces])
    spectrum, q = _eigh_in_place(stack.gram())
    first = int((spectrum <= SPAN_TOLERANCE * spectrum[-1]).sum())
    spectrum, q = spectrum[first:], q[:, first:]
    parts = iter([_Side(part, trace) for part, trace in zip(q.split(stack.rows), traces, strict=True)])
    left, right = (replace(_Side() if fisher is None else next(parts), ridge=ridge) for fisher, ridge in pencil.sides)
    values, vectors = whitened_eigh(left.matrix(spectrum), right.matrix(spectrum), overwrite=True)
    return LowRankSystem(
        pencil=pencil,
        values=unrounded(values, pencil),
        stack=stack,
        spectrum=spectrum,
        q=q,
        vectors=vectors,
        left=left,
        right=right,
    )


def _eigh_in_place(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues, ascending, and eigenvectors of a symmetric matrix, in its memory."""
    values, vectors = scipy.linalg.eigh(gram.numpy().T, overwrite_a=True, check_finite=False, driver="evd")
    return torch.from_numpy(values), torch.from_numpy(vectors)
