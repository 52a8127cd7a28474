"""Rows packed into one sequence behind their common beginning: ``[prefix, rest of row 1, rest of row 2, …]``.

Chat templates put the same system prompt in front of every row. Packed, its tokens are computed once and no padding is;
each row's tokens attend to the prefix and to their own row, so hidden states, logits and gradients are those of the
padded batch. Attention works row by row: its cost does not grow with the length of the whole sequence.

Legend of shapes: N rows, S tokens of the sequence, P of the prefix, L of the longest rest, H heads, E head features.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from src.data.batches import Batch

NAME = "sst_packed_rows"


@dataclass(frozen=True)
class PackedLayout:
    """Where the rows of a packed sequence lie.

    Attributes:
        start: P, tokens of the common prefix.
        index: (N·L,) position behind the prefix of each row's tokens; padding points at 0.
        tokens: (S − P,) which of the N·L are tokens.
        rows: N.
        head_mask: (P, P) bool: true where a token of the prefix would look ahead.
        rest_mask: (L, P + L) bool: the same for a row's tokens, which see the whole prefix.
        narrow: Whether attention's products are in bfloat16.
    """

    start: int
    index: torch.Tensor
    tokens: torch.Tensor
    rows: int
    head_mask: torch.Tensor
    rest_mask: torch.Tensor
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
    flat = kept.flatten()
    index = torch.where(flat, flat.cumsum(0) - 1, 0)
    given = {
        "input_ids": ids[None],
        "position_ids": position[None],
        # A mask of four dimensions is taken as it is: no other is built, and the packed attention needs none.
        "attention_mask": torch.zeros(1, 1, 1, 1, device=device),
        "packed": PackedLayout(
            start=start,
            index=index,
            tokens=flat.nonzero().squeeze(1),
            rows=len(batch.ids),
            head_mask=_ahead(start, device),
            rest_mask=torch.nn.functional.pad(_ahead(len(steps), device), (start, 0)),
            narrow=narrow,
        ),
    }
    # The prefix ends before the token that predicts a first answer token, so each predictor precedes its answer here.
    return given, torch.nn.functional.pad(answers[1:], (0, 1))[None]


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
    if packed.narrow:
        query, key, value = query.bfloat16(), key.bfloat16(), value.bfloat16()
    groups = query.shape[1] // key.shape[1]
    q, k, v = query[0], key[0].repeat_interleave(groups, 0), value[0].repeat_interleave(groups, 0)
    heads, start, rows = len(q), packed.start, packed.rows
    q_head, k_head, v_head = q[:, :start], k[:, :start], v[:, :start]
    head_scores = (q_head @ k_head.transpose(1, 2) * scaling).masked_fill(packed.head_mask, float("-inf"))
    head = head_scores.softmax(-1) @ v_head

    def by_row(x: torch.Tensor) -> torch.Tensor:
        return x[:, start:].index_select(1, packed.index).view(heads * rows, -1, x.shape[-1])

    q_rest, k_rest, v_rest = by_row(q), by_row(k), by_row(v)
    length = q_rest.shape[1]
    to_head = q_rest.view(heads, rows * length, -1) @ k_head.transpose(1, 2)
    to_rest = q_rest @ k_rest.transpose(1, 2)
    scores = torch.cat([to_head.view(heads * rows, length, start), to_rest], dim=-1)
    weights = (scores * scaling).masked_fill_(packed.rest_mask, float("-inf")).softmax(-1)
    rest = (weights[..., :start].reshape(heads, rows * length, start) @ v_head).view_as(q_rest)
    rest = torch.baddbmm(rest, weights[..., start:], v_rest)
    out = torch.cat([head, rest.view(heads, rows * length, -1).index_select(1, packed.tokens)], dim=1)
    return out.transpose(0, 1)[None].to(dtype).contiguous(), None


def _ahead(length: int, device: torch.device) -> torch.Tensor:
    """(L, L) bool: true where a token would look ahead."""
    return torch.ones(length, length, dtype=torch.bool, device=device).triu(1)
