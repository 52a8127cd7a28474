"""Rows packed into one sequence behind their common beginning: ``[prefix, rest of row 1, rest of row 2, …]``.

Chat templates put the same system prompt in front of every row. Packed, its tokens are computed once and no padding is;
each row's tokens attend to the prefix and to their own row, so hidden states, logits and gradients are those of the
padded batch. Attention works row by row: its cost does not grow with the length of the whole sequence. There, and only
there, rows are padded, to the longest of a group of similar length: one long row does not make all of them long.

Legend of shapes: N rows, S tokens of the sequence, P of the prefix, H heads, E head features; M rows of a group, the
longest of which has L tokens behind the prefix.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from src.data.batches import Batch

NAME = "sst_packed_rows"


FUSED = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
"""Attention that holds no scores and gives their log-sum-exp too (2205.14135); torch's public function hides it."""
MOST_PADDING = 0.1
"""Share of a group's places in attention that may be padding, before shorter rows start a group of their own."""


@dataclass(frozen=True)
class RowGroup:
    """Rows of similar length.

    Attributes:
        rows: M.
        index: (M·L,) position behind the prefix of each row's tokens; padding points at 0.
        mask: (L, P + L) bool: true where a token would look ahead; it sees the whole prefix.
    """

    rows: int
    index: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True)
class PackedLayout:
    """Where the rows of a packed sequence lie.

    Attributes:
        start: P, tokens of the common prefix.
        groups: The rows, longest first.
        tokens: (S − P,) place of each token behind the prefix among the ΣM·L of all groups.
        head_mask: (P, P) bool: true where a token of the prefix would look ahead.
        narrow: Whether attention's products are in bfloat16.
    """

    start: int
    groups: tuple[RowGroup, ...]
    tokens: torch.Tensor
    head_mask: torch.Tensor
    narrow: bool = False


def pack(batch: Batch, *, narrow: bool = False) -> tuple[dict[str, Any], torch.Tensor]:
    """Inputs of the model for the packed batch, and a (1, S) bool: true where a token predicts an answer token.

    Args:
        batch: Rows with a common prefix.
        narrow: Multiply in bfloat16 within attention.
    """
    start, device = batch.common_prefix, batch.ids.device
    steps = torch.arange(start, int(batch.lengths.max()), device=device)
    kept = steps < batch.lengths[:, None]
    rest = batch.ids[:, start : start + len(steps)]
    ids = torch.cat([batch.ids[0, :start], rest[kept]])
    position = torch.cat([torch.arange(start, device=device), steps.expand_as(kept)[kept]])
    answers = torch.nn.functional.pad(batch.answer_mask[:, start : start + len(steps)][kept], (start, 0))
    groups, tokens = _groups(batch.lengths - start, start)
    given = {
        "input_ids": ids[None],
        "position_ids": position[None],
        # A mask of four dimensions is taken as it is: no other is built, and the packed attention needs none.
        "attention_mask": torch.zeros(1, 1, 1, 1, device=device),
        "packed": PackedLayout(
            start=start, groups=groups, tokens=tokens, head_mask=_ahead(start, device), narrow=narrow
        ),
    }
    # The prefix ends before the token that predicts a first answer token, so each predictor precedes its answer here.
    return given, torch.nn.functional.pad(answers[1:], (0, 1))[None]


def _groups(lengths: torch.Tensor, start: int) -> tuple[tuple[RowGroup, ...], torch.Tensor]:
    """Groups of rows, longest first, and the place of each token in them.

    Args:
        lengths: (N,) tokens of each row behind the prefix.
        start: P.
    """
    order = lengths.argsort(descending=True, stable=True)
    first = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))[:-1]
    groups, places, before = [], torch.empty(int(lengths.sum()), dtype=torch.long, device=lengths.device), 0
    for rows in order.split(_group_sizes(lengths[order].tolist())):
        longest = int(lengths[rows[0]])
        steps = torch.arange(longest, device=lengths.device)
        kept = steps < lengths[rows, None]
        index = torch.where(kept, first[rows, None] + steps, 0).flatten()
        flat = kept.flatten()
        places[index[flat]] = before + flat.nonzero().squeeze(1)
        before += len(flat)
        mask = torch.nn.functional.pad(_ahead(longest, lengths.device), (start, 0))
        groups.append(RowGroup(len(rows), index, mask))
    return tuple(groups), places


def _group_sizes(lengths: list[int]) -> list[int]:
    """Number of rows in each group, for lengths in descending order."""
    sizes: list[int] = []
    longest = total = 0
    for length in lengths:
        if sizes and total + length >= (1 - MOST_PADDING) * longest * (sizes[-1] + 1):
            sizes[-1] += 1
            total += length
        else:
            sizes.append(1)
            longest = total = length
    return sizes


@contextmanager
def packed_attention(model: Any) -> Iterator[None]:
    """The model with packed attention, for the length of a ``with`` block."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)
    before = model.config._attn_implementation
    model.config._attn_implementation = NAME
    try:
        yield
    finally:
        model.config._attn_implementation = before


def attend(
    module: Any,  # noqa: ARG001 - transformers sets the signature
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001
    *,
    packed: PackedLayout,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of a packed sequence: query (1, H, S, E), key and value (1, H or fewer, S, E) to (1, S, H, E).

    Raises:
        NotImplementedError: the layer has a sliding window, a soft cap or dropout.
    """
    if sliding_window is not None or softcap is not None or dropout:
        raise NotImplementedError("packed attention is causal attention without window, soft cap or dropout")
    dtype = query.dtype
    query = query * scaling
    if packed.narrow:
        query, key, value = query.bfloat16(), key.bfloat16(), value.bfloat16()
    elif query.dtype != value.dtype:  # under autocast, which rounds values and leaves what is rotated wide
        query, key = query.to(value.dtype), key.to(value.dtype)
    groups = query.shape[1] // key.shape[1]
    q, k, v = query[0], key[0].repeat_interleave(groups, 0), value[0].repeat_interleave(groups, 0)
    start, fuses = packed.start, _fuses(q, v)
    q_head, k_head, v_head = q[:, :start], k[:, :start], v[:, :start]
    if fuses:
        head = _fused(q_head, k_head, v_head, causal=True)[0]
    else:
        head_scores = (q_head @ k_head.transpose(1, 2)).masked_fill(packed.head_mask, float("-inf"))
        head = head_scores.softmax(-1) @ v_head

    of_group = _fused_rows if fuses else _rows
    rests = [of_group(q, k, v, packed.start, group) for group in packed.groups]
    rest = rests[0] if len(rests) == 1 else torch.cat(rests, dim=1)
    out = torch.cat([head, rest.index_select(1, packed.tokens)], dim=1)
    return out.transpose(0, 1)[None].to(dtype).contiguous(), None


def _rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int, group: RowGroup) -> torch.Tensor:
    """(H, M·L, E) attention of a group's rows; q (scaled), k and v are (H, S, E)."""
    heads, rows, length = len(q), group.rows, len(group.mask)

    def by_row(x: torch.Tensor) -> torch.Tensor:
        return x[:, start:].index_select(1, group.index).view(heads * rows, length, -1)

    q_rest, k_rest, v_rest = by_row(q), by_row(k), by_row(v)
    to_head = q_rest.view(heads, rows * length, -1) @ k[:, :start].transpose(1, 2)
    to_rest = q_rest @ k_rest.transpose(1, 2)
    scores = torch.cat([to_head.view(heads * rows, length, start), to_rest], dim=-1)
    weights = scores.masked_fill_(group.mask, float("-inf")).softmax(-1)
    rest = (weights[..., :start].reshape(heads, rows * length, start) @ v[:, :start]).view_as(q_rest)
    return torch.baddbmm(rest, weights[..., start:], v_rest).view(heads, rows * length, -1)


def _fuses(q: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether the fused kernel can be had: no gradients, on a CPU, and heads of one size."""
    return FUSED is not None and not torch.is_grad_enabled() and q.device.type == "cpu" and q.shape[-1] == v.shape[-1]


def _fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention (H, L, E) of scaled queries, and the log-sum-exp of their scores (H, L); also (M, H, …)."""
    whole = q.dim() == 4
    given = [x if whole else x[None] for x in (q, k, v)]
    out, total = FUSED(*given, 0.0, causal, scale=1.0)  # type: ignore[misc]
    return (out, total) if whole else (out[0], total[0])


def _fused_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int, group: RowGroup) -> torch.Tensor:
    """What :func:`_rows` gives: attention to the prefix and to the own row apart, joined by their log-sum-exps."""
    heads, rows, length = len(q), group.rows, len(group.mask)
    q_rest, k_rest, v_rest = (x[:, start:].index_select(1, group.index) for x in (q, k, v))
    by_row = [x.view(heads, rows, length, -1).transpose(0, 1) for x in (q_rest, k_rest, v_rest)]
    own, own_total = _fused(*by_row, causal=True)
    first, first_total = _fused(q_rest, k[:, :start], v[:, :start], causal=False)
    own, own_total = own.transpose(0, 1).reshape(heads, rows * length, -1), own_total.transpose(0, 1).flatten(1)
    return torch.lerp(own, first, torch.sigmoid(first_total - own_total).to(own.dtype)[..., None])


def _ahead(length: int, device: torch.device) -> torch.Tensor:
    """(L, L) bool: true where a token would look ahead."""
    return torch.ones(length, length, dtype=torch.bool, device=device).triu(1)
