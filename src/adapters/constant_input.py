"""LoRA biases as weights of one more input that is always 1, so that whatever merges updates merges them too.

    y = W x + s (B A x + b) = W x + ΔW' [x; 1],   ΔW' = [s B A, s b] = [s B, s b] [[A, 0], [0, 1]]

The update of such a module is (O, I + 1), for every adapter of a merge: one without the bias has zeros there, which the
densities of element-wise methods count as elements. Any pair of that shape is again LoRA with a bias of B: the last
column of A, seen through B.

Legend of shapes: O output features, I input features, R rank.
"""

import torch
from torch.nn.functional import pad

from src.adapters.deltas import Delta, DenseDelta, LazyDelta, blocks, matrix
from src.adapters.pairs import LowRankPair


def with_bias(pair: LowRankPair, bias: torch.Tensor) -> LowRankPair:
    """(O, I + 1) update of a pair (O, I) and a bias (O,) of the layer's output, of rank R + 1."""
    a = pad(pair.a, (0, 1, 0, 1))
    a[-1, -1] = 1.0
    return LowRankPair(a, torch.cat([pair.b, bias[:, None].to(pair.b.dtype)], dim=1))


def without_bias(delta: Delta) -> Delta:
    """The same update (O, I) with a constant input that it does not use: (O, I + 1)."""
    if isinstance(delta, LowRankPair):
        return LowRankPair(pad(delta.a, (0, 1)), delta.b)
    return LazyDelta((delta.shape[0], delta.shape[1] + 1), lambda rows: pad(delta.block(rows), (0, 1)))


def split(pair: LowRankPair) -> tuple[LowRankPair, torch.Tensor]:
    """An update (O, I + 1) as a pair (O, I) and the bias (O,) of the layer's output.

    Factors that only make the bias are left out, but for one where nothing else is there.
    """
    a, bias = pair.a[:, :-1], pair.b @ pair.a[:, -1].to(pair.b.dtype)
    used = a.ne(0).any(1)
    used[0] |= not used.any()
    return LowRankPair(a[used], pair.b[:, used]), bias


def lora_rank(pair: LowRankPair, *, constant: bool) -> int:
    """The rank that PEFT's configuration gives an update, which counts no factor of a bias."""
    return split(pair)[0].rank if constant else pair.rank


def split_dense(delta: Delta) -> tuple[Delta, torch.Tensor]:
    """The same of an update of any rank."""
    # The weight is read in blocks of rows of its own shape, which may differ from those of the update.
    whole = delta if isinstance(delta, LowRankPair) else DenseDelta(matrix(delta))
    weight = LazyDelta((delta.shape[0], delta.shape[1] - 1), lambda rows: whole.block(rows)[:, :-1])
    return weight, torch.cat([block[:, -1] for block in blocks(whole)]).double()
