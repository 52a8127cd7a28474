"""Batched greedy decoding of the prompts of a batch."""

from collections.abc import Sequence
from typing import Any

import torch

from src.data.batches import Batch


def left_padded_prompts(batch: Batch, pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts (N, P) padded on the left, with their attention mask: decoding continues every row at its right end."""
    starts = batch.answer_starts
    width = int(starts.max())
    positions = torch.arange(width, device=batch.ids.device)[None, :] - (width - starts)[:, None]
    mask = positions >= 0
    ids = batch.ids.gather(1, positions.clamp_min(0))
    return torch.where(mask, ids, pad_id), mask.long()


def greedy(
    model: Any, batch: Batch, *, max_new_tokens: int, stop_ids: Sequence[int], pad_id: int, sharded: bool
) -> list[list[int]]:
    """Tokens of N greedy answers, up to and without the first stop token.

    Args:
        model: A transformers causal language model.
        batch: N rows; only their prompts are read.
        max_new_tokens: Longest answer, in tokens.
        stop_ids: Tokens that end an answer.
        pad_id: Padding token.
        sharded: Whether other processes hold parts of the weights: then all go on until the last has finished.
    """
    prompts, mask = left_padded_prompts(batch, pad_id)
    out = model.generate(
        input_ids=prompts,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        eos_token_id=list(stop_ids),
        pad_token_id=pad_id,
        synced_gpus=sharded,
    )
    return [_until_stop(row, stop_ids) for row in out[:, prompts.shape[1] :].tolist()]


def _until_stop(tokens: list[int], stop_ids: Sequence[int]) -> list[int]:
    ends = [i for i, token in enumerate(tokens) if token in stop_ids]
    return tokens[: ends[0]] if ends else tokens
