"""Logits where they are needed: at the positions that predict an answer token, and nowhere else.

The vocabulary is a quarter of a small model's arithmetic. A hook in front of the output layer keeps the chosen hidden
states, so whatever the model does after that layer (soft-capping, scaling) still happens.
"""

import torch

from src.data.batches import Batch


def answer_logits(model: torch.nn.Module, batch: Batch, *, inputs_embeds: torch.Tensor | None = None) -> torch.Tensor:
    """Logits (M, V) that predict the M answer tokens of the batch, in row-major order.

    Rows are padded on the right and the model is causal, so real tokens never see padding and no mask is needed.

    Args:
        model: A transformers causal language model, possibly wrapped by PEFT.
        batch: N rows, T tokens.
        inputs_embeds: (N, T, H) embeddings to use in place of the ids (they may require gradients).
    """
    predicts = batch.answer_mask[:, 1:]

    def select(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (args[0][:, :-1][predicts][None], *args[1:])

    given = {"input_ids": batch.ids} if inputs_embeds is None else {"inputs_embeds": inputs_embeds}
    handle = model.get_output_embeddings().register_forward_pre_hook(select)  # type: ignore[operator]
    try:
        return model(**given, use_cache=False).logits[0]
    finally:
        handle.remove()


def answer_targets(batch: Batch) -> torch.Tensor:
    """(M,) ids of the answer tokens, in the order of :func:`answer_logits`."""
    return batch.ids[:, 1:][batch.answer_mask[:, 1:]]


def answer_rows(batch: Batch) -> torch.Tensor:
    """(M,) row of each answer token."""
    mask = batch.answer_mask[:, 1:]
    return torch.arange(mask.shape[0], device=mask.device)[:, None].expand_as(mask)[mask]
