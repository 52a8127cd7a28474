"""Labels at which scores are taken: the data's own tokens, tokens drawn from the model itself, or random tokens.

Scores at labels of the model give an unbiased estimate of the Fisher information; scores at the data's labels give the
empirical Fisher (1905.12558 tells the two apart).
"""

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

LabelSource = Literal["data", "model", "random_tokens"]
"""Whose tokens the answer's labels are; ``random_tokens`` are rows of :func:`random_token_rows` at their own labels."""


def row_uniforms(seed: int, row_id: str, draw: int, count: int) -> torch.Tensor:
    """(count,) uniform numbers in [0, 1), float64, that depend on nothing but the seed, the row and the draw."""
    key = hashlib.sha256(f"{seed}\0{row_id}\0{draw}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little", signed=True))
    return torch.rand(count, generator=generator, dtype=torch.float64)


def draw_labels(
    logits: torch.Tensor, rows: torch.Tensor, row_ids: Sequence[str], *, seed: int, draw: int
) -> torch.Tensor:
    """One token per position from softmax(logits), by inversion, the same for any batching and world size.

    Args:
        logits: (M, V) at the answer positions.
        rows: (M,) row of the batch that each position belongs to, ascending.
        row_ids: Identifier of each row of the batch.
        seed: Seed of the pass.
        draw: Which of several draws.

    Returns:
        (M,) int64 token ids.
    """
    counts = torch.bincount(rows, minlength=len(row_ids)).tolist()
    uniforms = torch.cat([row_uniforms(seed, row, draw, n) for row, n in zip(row_ids, counts, strict=True)])
    cumulated = logits.detach().double().softmax(-1).cumsum(-1)
    # The sum of all probabilities is 1 up to rounding: scale by it, so that no draw falls past the last token.
    targets = uniforms.to(cumulated.device)[:, None] * cumulated[:, -1:]
    return torch.searchsorted(cumulated, targets, right=True).squeeze(1).clamp_(max=logits.shape[-1] - 1)


@dataclass(frozen=True)
class TokenRow:
    """A row of random tokens: its identifier, token ids, and the position of its first answer token."""

    id: str
    ids: tuple[int, ...]
    answer_start: int


def random_token_rows(
    count: int,
    *,
    vocab_size: int,
    avoid: Collection[int],
    prompt_tokens: tuple[int, int],
    answer_tokens: tuple[int, int],
    seed: int,
) -> list[TokenRow]:
    """Rows of uniformly random tokens, for a Fisher matrix without any data.

    Row number i depends on nothing but the seed, i and the settings: any part of the rows can be made by itself. The
    answer is random too, so its scores are those of labels ``data`` at this row.

    Args:
        count: Number of rows.
        vocab_size: Tokens are drawn from 0 to vocab_size − 1.
        avoid: Ids that are never drawn (special tokens).
        prompt_tokens: Least and greatest length of a prompt, drawn uniformly; at least 1.
        answer_tokens: Least and greatest length of an answer, drawn uniformly; at least 1.
        seed: Seed of the rows.

    Raises:
        ValueError: a range is empty or starts under 1, or every token is to be avoided.
    """
    for name, (low, high) in (("prompt_tokens", prompt_tokens), ("answer_tokens", answer_tokens)):
        if not 1 <= low <= high:
            raise ValueError(f"{name} is {(low, high)}; expected a range that starts at 1 or above")
    forbidden = set(avoid)
    allowed = torch.tensor([token for token in range(vocab_size) if token not in forbidden], dtype=torch.int64)
    if not len(allowed):
        raise ValueError(f"all {vocab_size} tokens are to be avoided; expected at least one to draw from")
    rows = []
    for number in range(count):
        name = f"random/{seed}/{number}"
        first = row_uniforms(seed, name, 0, 2)
        ranges = (prompt_tokens, answer_tokens)
        lengths = [low + int(u * (high - low + 1)) for u, (low, high) in zip(first, ranges, strict=True)]
        drawn = row_uniforms(seed, name, 1, sum(lengths))
        rows.append(TokenRow(name, tuple(allowed[(drawn * len(allowed)).long()].tolist()), lengths[0]))
    return rows
