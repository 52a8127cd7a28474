"""The block-diagonal Fisher matrix: exact within a module, zero between modules.

    F_m = (1/n) Σ_i g_{i,m} g_{i,m}ᵀ     (p·q, p·q)

Legend of shapes: N examples, T tokens, P vectors, p and q sides of a core, H halves of the examples.
"""

from dataclasses import dataclass

import torch

from src.fisher.scores import core_score
from src.fisher.summed import SummedAccumulator, SummedFisher


@dataclass(frozen=True)
class BlockFisher(SummedFisher):
    """Per-module blocks; ``sums`` holds ``Σ g gᵀ`` of each module, (H, p·q, p·q)."""

    representation = "block"

    @staticmethod
    def entry(p: int, q: int) -> tuple[int, ...]:
        """Shape of one half's sum of a module."""
        return (p * q, p * q)

    def module_block(self, name: str) -> torch.Tensor:
        """(p·q, p·q) block of a module."""
        return self.mean(name)

    def module_diagonal(self, name: str) -> torch.Tensor:
        """(p·q,) diagonal of a module's block, without the block."""
        return self.sums[name].diagonal(dim1=1, dim2=2).sum(0) / self.counts.sum()

    def module_trace(self, name: str) -> float:
        """Trace of a module's block."""
        return self.module_block(name).trace().item()

    def module_product(self, name: str, vectors: torch.Tensor) -> torch.Tensor:
        """(P, p·q) products of a module's block."""
        return vectors @ self.module_block(name)


class BlockAccumulator(SummedAccumulator[BlockFisher]):
    """Accumulates :class:`BlockFisher`; Gram matrices in float64."""

    kind = BlockFisher

    def update(self, name: str, delta: torch.Tensor, x: torch.Tensor) -> None:
        """Add one module of a backward pass."""
        for half, weight, (scores,) in self._parts(core_score(delta, x).double()):
            self._sums[name][half] += ((scores * weight[:, None]).T @ scores).cpu()
