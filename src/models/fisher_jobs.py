"""The backward passes that a batch needs: which labels, which answer token, and which sums they go to."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed

from src.data.batches import Batch
from src.fisher.accumulate import Accumulator, Examples, examples
from src.fisher.labels import LabelSource, draw_labels
from src.fisher.scores import Granularity, backward_parts
from src.models.fisher_pass import FisherPass
from src.models.logits import answer_rows, answer_targets, widened


@dataclass(frozen=True)
class Job:
    """One backward pass.

    Attributes:
        total: The scalar whose gradients are the scores.
        examples: What the scores are of.
        sinks: Accumulators that take them up.
    """

    total: torch.Tensor
    examples: Examples
    sinks: Sequence[Accumulator[Any]]


def backward_jobs(
    running: FisherPass,
    batch: Batch,
    logits: torch.Tensor,
    ids: Sequence[str],
    *,
    labels: LabelSource,
    draws: int,
    granularity: Granularity,
    seed: int,
) -> list[Job]:
    """The backward passes of a batch.

    Args:
        running: The pass that they belong to.
        batch: N rows.
        logits: (M, V) at its answer positions.
        ids: Identifiers of the rows.
        labels: Whose tokens the labels are.
        draws: Draws of labels from the model.
        granularity: What an example is.
        seed: Seed of the draws.
    """
    owners = answer_rows(batch)
    log_p = widened(logits).log_softmax(-1)

    def jobs(chosen: torch.Tensor, unit: Granularity, count: int, sinks: Sequence[Accumulator[Any]]) -> list[Job]:
        weights = running.weights[unit][batch.index] * batch.weight
        parts = backward_parts(log_p.gather(1, chosen[:, None]).squeeze(1), owners, len(ids), unit)
        return [
            Job(total, examples(batch.index, ids, draws=count, present=present, token=j, row_weights=weights), sinks)
            for j, (total, present) in enumerate(parts)
        ]

    own = answer_targets(batch)
    mean: list[Accumulator[Any]] = [] if running.mean is None else [running.mean]
    if labels != "model" and granularity == "sequence":
        return jobs(own, "sequence", 1, [running.fisher, *mean])
    found: list[Job] = []
    for draw in range(draws if labels == "model" else 1):
        chosen = draw_labels(logits, owners, ids, seed=seed, draw=draw) if labels == "model" else own
        found += jobs(chosen, granularity, draws if labels == "model" else 1, [running.fisher])
    return found + (jobs(own, "sequence", 1, mean) if mean else [])


def in_step(
    jobs: Sequence[Job], batch: Batch, logits: torch.Tensor, ids: Sequence[str], device: torch.device
) -> list[Job]:
    """As many backward passes as the process with the most of them has, for weights that are sharded.

    A backward pass brings the shards of all processes together, so a process that is through early would leave the
    others waiting: it goes on with passes whose scores have weight 0. A batch without an answer token has only such.

    Args:
        jobs: This process's backward passes.
        batch: N rows.
        logits: (M, V) at its answer positions.
        ids: Identifiers of the rows.
        device: Device of the collective.
    """
    most = torch.tensor([len(jobs)], device=device)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    none = torch.zeros(len(ids), dtype=torch.bool)
    nobody = examples(batch.index, ids, present=none)
    return [*jobs, *(Job(0.0 * logits.sum(), nobody, ()) for _ in range(int(most) - len(jobs)))]
