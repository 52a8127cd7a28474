"""Log-likelihoods of multiple-choice answers.

Where every choice is a single token, all of them are read off one position: one pass over the question, whose beginning
(subject line and worked examples) is computed once for the batch. Otherwise each choice is a sequence, and its
log-likelihood is the sum over its tokens; ``acc_norm`` divides by the characters of the choice.
"""

from collections.abc import Sequence
from typing import Any

import torch

from src.data.batches import Batch
from src.models.logits import answer_logits, widened


def letter_scores(
    model: Any, batch: Batch, letters: Sequence[int], *, pack: bool, narrow: bool = False
) -> torch.Tensor:
    """Log-likelihoods (N, C) in nats, float64, of C single tokens behind each question."""
    logits = answer_logits(model, batch, pack=pack, narrow=narrow)
    wide = widened(logits)
    return wide.log_softmax(-1)[:, torch.tensor(letters, device=wide.device)].double()


def chosen(scores: Sequence[float]) -> int:
    """Position of the highest score; the first of equal ones, as numpy's argmax has it."""
    return max(range(len(scores)), key=lambda i: scores[i])


TIE = 1e-6
"""Nats: two log-likelihoods from float32 logits that are no further apart may change places in another batch."""


def tied(scores: Sequence[float]) -> bool:
    """Whether the two highest scores are within :data:`TIE`: then the choice hangs on rounding."""
    first, second = sorted(scores, reverse=True)[:2]
    return first - second <= TIE


def by_length(scores: Sequence[float], choices: Sequence[str]) -> list[float]:
    """Scores divided by the number of characters of each choice."""
    return [score / len(choice) for score, choice in zip(scores, choices, strict=True)]
