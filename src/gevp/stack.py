"""The scores of several low-rank Fisher matrices as one tall stack S, never copied together, read in column blocks.

Scores may be mapped float32 files: one block of columns at a time is widened to float64, so the memory of every
product is bounded however large N · D is.

Legend of shapes: N rows of all matrices, D coordinates, k vectors.
"""

from collections.abc import Iterator, Sequence

import torch

from src.fisher.lowrank import LowRankFisher
from src.fisher.score_tables import column_blocks

ROWS = 512
"""Rows of a tile of the Gram matrix: only tiles on and above the diagonal are multiplied out."""


class ScoreStack:
    """``S = [w_1 G_1/√t_1; w_2 G_2/√t_2; …]`` (N, D), with t_i the total weight of a matrix: ``SᵀS = Σ w_i² F_i``.

    Args:
        fishers: The matrices F_i.
        factors: w_i of each.
    """

    def __init__(self, fishers: Sequence[LowRankFisher], factors: Sequence[float]) -> None:
        self._fishers = fishers
        self.scales = [w / f.total**0.5 for w, f in zip(factors, fishers, strict=True)]
        self.rows = [fisher.height for fisher in fishers]
        self.dim = fishers[0].dim

    def blocks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Column slices and the (N, columns) float64 blocks of S that they cut out."""
        total = sum(self.rows)
        for columns in column_blocks(total, self.dim):
            block = torch.empty(total, columns.stop - columns.start, dtype=torch.float64)
            for part, fisher, scale in zip(block.split(self.rows), self._fishers, self.scales, strict=True):
                part.copy_(fisher.columns(columns)).mul_(scale)
                fisher.release()
            yield columns, block

    def gram(self) -> torch.Tensor:
        """(N, N) ``S Sᵀ``."""
        size = sum(self.rows)
        total = torch.zeros(size, size, dtype=torch.float64)
        for _, block in self.blocks():
            for start in range(0, size, ROWS):
                total[start : start + ROWS, start:].addmm_(block[start : start + ROWS], block[start:].T)
        for start in range(0, size, ROWS):
            below = slice(start + ROWS, size)
            total[below, start : start + ROWS] = total[start : start + ROWS, below].T
        return total

    def times(self, vectors: torch.Tensor) -> torch.Tensor:
        """(…, N) products ``S v`` of vectors (…, D)."""
        total = torch.zeros(*vectors.shape[:-1], sum(self.rows), dtype=torch.float64)
        for columns, block in self.blocks():
            total += vectors[..., columns].double() @ block.T
        return total

    def transposed(self, weights: torch.Tensor) -> torch.Tensor:
        """(…, D) products ``Sᵀ w`` of weights (…, N)."""
        result = torch.empty(*weights.shape[:-1], self.dim, dtype=torch.float64)
        for columns, block in self.blocks():
            result[..., columns] = weights @ block
        return result
