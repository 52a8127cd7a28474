"""Labels at which scores are taken: the data's own tokens, or tokens drawn from the model itself.

Scores at labels of the model give an unbiased estimate of the Fisher information; scores at the data's labels give the
empirical Fisher (1905.12558 tells the two apart).
"""

import hashlib
from collections.abc import Sequence
from typing import Literal

import torch

Labels = Literal["data", "model"]


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
