"""The exact Fisher matrix, held as the scores of its examples: ``F = GᵀG / n`` with G (n·m, D), m draws each.

Legend of shapes: n examples, D coordinates.
"""

from dataclasses import dataclass

import torch

COLUMNS = 8192
"""Width of the column blocks in which scores are widened to float64: bounds the memory of every product."""


@dataclass(frozen=True)
class LowRankFisher:
    """Fisher information ``F = GᵀG / count``.

    Attributes:
        scores: G, (rows, D); several rows per example where labels were drawn several times (scaled by 1/√draws).
        count: n, the number of examples.
    """

    scores: torch.Tensor
    count: int

    def __post_init__(self) -> None:
        if self.scores.ndim != 2 or self.scores.shape[0] == 0 or self.count < 1:
            raise ValueError(f"a Fisher matrix needs (rows, D) scores of at least one example, not {self.scores.shape}")

    @property
    def dim(self) -> int:
        """D."""
        return self.scores.shape[1]

    def factor(self) -> torch.Tensor:
        """``G / √n`` in float64: F is its Gram matrix over columns."""
        return self.scores.double() / self.count**0.5

    def trace(self) -> float:
        """tr(F)."""
        return sum(block.double().square().sum().item() for block in self.scores.split(COLUMNS, dim=1)) / self.count

    def matvec(self, vector: torch.Tensor) -> torch.Tensor:
        """(D,) product ``F v``, in float64."""
        inner = self._times(vector)
        return torch.cat([block.double().T @ inner for block in self.scores.split(COLUMNS, dim=1)]) / self.count

    def energy(self, vector: torch.Tensor) -> float:
        """Quadratic form ``vᵀ F v``: twice the second-order change of log-likelihood along v (nats per example)."""
        return self._times(vector).square().sum().item() / self.count

    def dense(self) -> torch.Tensor:
        """(D, D) matrix, for tests."""
        return self.factor().T @ self.factor()

    def mean(self) -> torch.Tensor:
        """(D,) mean signed score, in float64."""
        return self.scores.double().sum(0) / self.count

    def subset(self, examples: torch.Tensor) -> "LowRankFisher":
        """The Fisher of some of the examples ((k,) int64 positions)."""
        draws = self.scores.shape[0] // self.count
        rows = (examples[:, None] * draws + torch.arange(draws)).reshape(-1)
        return LowRankFisher(self.scores[rows], len(examples))

    def _times(self, vector: torch.Tensor) -> torch.Tensor:
        blocks = zip(self.scores.split(COLUMNS, dim=1), vector.double().split(COLUMNS), strict=True)
        return torch.stack([block.double() @ part for block, part in blocks]).sum(0)


def concatenate(fishers: list[LowRankFisher], weights: list[float]) -> LowRankFisher:
    """The weighted mean ``Σ w_i F_i / Σ w_i`` of Fisher matrices of several data sets, as one.

    Raises:
        ValueError: dimensions differ, or a weight is negative or all are zero.
    """
    if min(weights) < 0 or sum(weights) <= 0:
        raise ValueError(f"weights {weights} must be non-negative with a positive sum")
    if len({fisher.dim for fisher in fishers}) > 1:
        raise ValueError(f"Fisher matrices of dimensions {[fisher.dim for fisher in fishers]} have no mean")
    if len(fishers) == 1:
        return fishers[0]
    total = sum(fisher.count for fisher in fishers)
    parts = [
        fisher.scores * (weight / sum(weights) * total / fisher.count) ** 0.5
        for fisher, weight in zip(fishers, weights, strict=True)
    ]
    return LowRankFisher(torch.cat(parts), total)
