"""The weight of each row in a Fisher pass: F = Σ_k w_k F_k / Σ_k w_k with F_k the mean over the examples of source k.

An example is a row with an answer; with granularity ``token``, an answer token. Weights have mean 1 over the examples,
so that their sum is the number of examples.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from src.errors import InputError
from src.fisher.scores import Granularity

if TYPE_CHECKING:
    from src.models.fisher import FisherModule


def pass_weights(module: "FisherModule", name: str) -> dict[Granularity, torch.Tensor]:
    """(n,) weight of each example of a row, by what an example is."""
    data, of = module.data, module.passes[name]
    answers = [len(row.ids) - row.answer_start for row in data.encoded[name]]
    if name in module.random_passes:
        sizes, weights, per_row = [len(answers)], None, [1.0]
    else:
        sizes, weights = [len(rows) for rows in data.sources[of]], data.source_weights[of]
        per_row = data.weights_per_row[of]
    return {
        "sequence": example_weights([min(count, 1) for count in answers], sizes, weights, per_row),
        "token": example_weights(answers, sizes, weights, per_row),
    }


def example_weights(
    examples: Sequence[int], sizes: Sequence[int], weights: list[float] | None, per_row: Sequence[float] = ()
) -> torch.Tensor:
    """(n,) weight of each example of a row.

    Args:
        examples: Number of examples of each of n rows.
        sizes: Number of rows of each source, in the order of the rows.
        weights: w_k of each source; unset weighs each by its number of examples, times what ``per_row`` says.
        per_row: What each example of a source counts; nothing is 1.

    Raises:
        InputError: a source has no example.
    """
    counts = [int(part.sum()) for part in torch.tensor(examples).split(list(sizes))]
    if not all(counts):
        raise InputError(f"data: no row of source {counts.index(0) + 1} has an answer token; raise data.max_length")
    weights = weights or [n * w for n, w in zip(counts, per_row or [1.0] * len(counts), strict=True)]
    each_of = [w / sum(weights) * sum(counts) / n for n, w in zip(counts, weights, strict=True)]
    return torch.tensor(each_of, dtype=torch.float64).repeat_interleave(torch.tensor(sizes))
