"""Logits where they are needed: at the positions that predict an answer token, and nowhere else.

The vocabulary is a quarter of a small model's arithmetic. A hook in front of the output layer keeps the chosen hidden
states, so whatever the model does after that layer (soft-capping, scaling) still happens.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from src.data.batches import Batch
from src.models import packing


def answer_logits(model: Any, batch: Batch, *, pack: bool = False, narrow: bool = False) -> torch.Tensor:
    """Logits (M, V) that predict the M answer tokens of the batch, in row-major order.

    Rows are padded on the right and the model is causal, so real tokens never see padding and no mask is needed.

    Args:
        model: A transformers causal language model, possibly wrapped by PEFT.
        batch: N rows, T tokens.
        pack: Put the rows one after another behind the tokens that all begin with (a chat template's system prompt),
            see :mod:`src.models.packing`. The same function, gradients included, of fewer tokens.
        narrow: Let packed attention multiply in bfloat16.
    """
    packs = pack and batch.common_prefix > 0
    if packs:
        given, chosen = packing.pack(batch, narrow=narrow)
    else:
        given, chosen = {"input_ids": batch.ids}, answer_places(batch)

    def select(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (args[0][chosen][None], *args[1:])

    hook = model.get_output_embeddings().register_forward_pre_hook(select)
    with hook, packing.packed_attention(model) if packs else nullcontext():
        logits: torch.Tensor = model(**given, use_cache=False).logits[0]
    return logits


def answer_places(batch: Batch) -> torch.Tensor:
    """(N, T) bool: true where a token predicts an answer token."""
    return torch.nn.functional.pad(batch.answer_mask[:, 1:], (0, 1))


@contextmanager
def leaf_embeddings(model: Any) -> Iterator[list[torch.Tensor]]:
    """Let the backward pass of a frozen model end at its embeddings: each forward pass appends them to the list."""
    leaves: list[torch.Tensor] = []

    def detach(_: torch.nn.Module, __: object, out: torch.Tensor) -> torch.Tensor:
        leaves.append(out.detach().requires_grad_())
        return leaves[-1]

    with model.get_input_embeddings().register_forward_hook(detach):
        yield leaves


def can_pack(model: Any, batch: Batch, *, narrow: bool = False) -> bool:
    """Whether packing gives this model's logits of this batch, by trying: some models attend in other ways.

    LoRA's dropout draws other masks for the other shape. Where that shows, it is switched off and the trial repeated.

    Args:
        model: A transformers causal language model, possibly wrapped by PEFT.
        batch: N rows, T tokens.
        narrow: Whether the model's products are rounded to bfloat16, whatever its weights are.
    """
    if batch.common_prefix == 0:
        return False
    if _packs_exactly(model, batch, narrow=narrow):
        return True
    masks = [
        module
        for name, module in model.named_modules()
        if ".lora_dropout." in name and isinstance(module, torch.nn.Dropout) and module.training
    ]
    for module in masks:
        module.eval()
    with torch.random.fork_rng(devices=[]):
        exact = bool(masks) and _packs_exactly(model, batch, narrow=narrow)
    for module in masks:
        module.train()
    return exact


def _packs_exactly(model: Any, batch: Batch, *, narrow: bool) -> bool:
    mode = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad():
            plain = answer_logits(model, batch).float()
            difference = (plain - answer_logits(model, batch, pack=True).float()).abs().max()
    except (TypeError, AttributeError, ValueError, NotImplementedError):
        return False
    finally:
        torch.set_float32_matmul_precision(mode)
    narrow = narrow or next(model.parameters()).dtype in (torch.bfloat16, torch.float16)
    narrow = narrow or torch.is_autocast_enabled(batch.ids.device.type)
    return bool(difference <= (0.1 if narrow else 1e-3) * plain.std())


def answer_targets(batch: Batch) -> torch.Tensor:
    """(M,) ids of the answer tokens, in the order of :func:`answer_logits`."""
    return batch.ids[:, 1:][batch.answer_mask[:, 1:]]


def answer_rows(batch: Batch) -> torch.Tensor:
    """(M,) row of each answer token."""
    mask = batch.answer_mask[:, 1:]
    return torch.arange(mask.shape[0], device=mask.device)[:, None].expand_as(mask)[mask]


def widened(logits: torch.Tensor) -> torch.Tensor:
    """Logits in float32 at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


SCORED_TOGETHER = 8
"""Rows whose reference answers are scored in one forward pass: bounds the memory of their logits."""


def answer_nll(
    model: Any, batch: Batch, *, pack: bool, narrow: bool = False, together: int = SCORED_TOGETHER
) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihood (N,) in nats, float64, of each row's answer, and its number of tokens (N,)."""
    sums, counts = [], []
    for part in batch.split(together):
        log_p = widened(answer_logits(model, part, pack=pack, narrow=narrow)).log_softmax(-1)
        nll = -log_p.gather(1, answer_targets(part)[:, None]).squeeze(1).double()
        owners, rows = answer_rows(part), len(part.index)
        sums.append(torch.zeros(rows, dtype=torch.float64, device=nll.device).index_add_(0, owners, nll))
        counts.append(torch.bincount(owners, minlength=rows))
    return torch.cat(sums), torch.cat(counts)


def letter_scores(
    model: Any, batch: Batch, letters: Sequence[int], *, pack: bool, narrow: bool = False
) -> torch.Tensor:
    """Log-likelihoods (N, C) in nats, float64, of C single tokens behind each question, read off one position."""
    wide = widened(answer_logits(model, batch, pack=pack, narrow=narrow))
    return wide.log_softmax(-1)[:, torch.tensor(letters, device=wide.device)].double()


class _AnswerLoss(torch.autograd.Function):
    """Mean cross-entropy whose gradient, softmax − one-hot, overwrites what the forward pass saved."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        log_p = widened(logits).log_softmax(-1)
        ctx.save_for_backward(log_p, targets)
        ctx.dtype = logits.dtype
        return -log_p.gather(1, targets[:, None]).mean()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        log_p, targets = ctx.saved_tensors
        gradient = log_p.exp_()
        gradient.scatter_add_(1, targets[:, None], torch.full_like(targets[:, None], -1, dtype=gradient.dtype))
        return gradient.mul_(grads[0] / len(targets)).to(ctx.dtype), None


def answer_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood (nats per token) of targets (M,) under logits (M, V); backward once."""
    return _AnswerLoss.apply(logits, targets)  # type: ignore[no-any-return, no-untyped-call]
