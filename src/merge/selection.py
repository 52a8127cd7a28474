"""The k-th largest magnitude of an update that is read in blocks: a radix select on float32 bit patterns.

Magnitudes order as the integers that their bits spell. One pass counts the upper 16 bits, a second one the lower 15
within the bin that holds the k-th largest: exact, without sorting and in the memory of one block.
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch

LOW_BITS = 15
Blocks = Callable[[], Iterable[torch.Tensor]]


def kept_count(share: float, size: int) -> int:
    """How many of ``size`` elements a share above 0 keeps: its whole part, but one at least.

    PEFT and mergekit keep none where the whole part is 0, so that the update of a small module vanishes in silence.
    """
    return max(1, int(share * size))


def magnitude_bits(block: torch.Tensor) -> torch.Tensor:
    """Magnitudes of a block, rounded to float32, as (n,) int32 in the same order."""
    return block.to(torch.float32).abs().contiguous().reshape(-1).view(torch.int32)


def kth_magnitude(blocks: Blocks, k: int) -> float:
    """The k-th largest magnitude, in float32; infinity for k = 0, 0 where there are at most k elements.

    Args:
        blocks: Reads all blocks anew at every call, with the same bits.
        k: 0 or more.
    """
    if k == 0:
        return float("inf")
    coarse = torch.zeros(1 << 16, dtype=torch.int64)
    for block in blocks():
        coarse += torch.bincount(magnitude_bits(block) >> LOW_BITS, minlength=1 << 16)
    if coarse.sum() <= k:
        return 0.0
    bin_, above = _locate(coarse.numpy(), k)
    fine = torch.zeros(1 << LOW_BITS, dtype=torch.int64)
    for block in blocks():
        bits = magnitude_bits(block)
        inside = bits[(bits >> LOW_BITS) == bin_]
        fine += torch.bincount(inside & ((1 << LOW_BITS) - 1), minlength=1 << LOW_BITS)
    low, _ = _locate(fine.numpy(), k - above)
    return float(np.array([(bin_ << LOW_BITS) | low], dtype=np.int32).view(np.float32)[0])


def _locate(counts: np.ndarray, k: int) -> tuple[int, int]:
    """The bin that holds the k-th largest element, and how many elements lie in higher bins."""
    from_top = np.cumsum(counts[::-1])
    position = int(np.searchsorted(from_top, k))
    return len(counts) - 1 - position, int(from_top[position] - counts[::-1][position])


def at_least(block: torch.Tensor, threshold: float) -> torch.Tensor:
    """Mask of the elements whose magnitude, rounded to float32, reaches the threshold."""
    return block.to(torch.float32).abs() >= threshold


def keep_above(block: torch.Tensor, threshold: float) -> torch.Tensor:
    """The block with zeros where :func:`at_least` is false."""
    if block.dtype != torch.float32:
        return block * at_least(block, threshold)
    if threshold == 0.0:
        return block
    # One fused pass: hardshrink keeps what is strictly above, so the next smaller number keeps the threshold itself.
    below = float(np.nextafter(np.float32(threshold), np.float32(0)))
    return torch.nn.functional.hardshrink(block, below)
