"""What adapters look like and how they lie to each other: ranks, norms, effective ranks, cosines, principal angles.

For each pair of adapters, over the modules that both update: the cosine of the updates as one vector, and the mean
squared cosine of the principal angles between their column spaces and between their row spaces (1: one contains the
other; r / dimension: chance).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from src.adapters.constant_input import lora_rank
from src.adapters.geometry import principal_cosines, spaces, whole_cosine
from src.adapters.peft_files import Adapter
from src.gevp.diagnostics import effective_rank
from src.merge.parallel import in_order, one_thread_each


@dataclass(frozen=True)
class Summary:
    """One adapter.

    Attributes:
        name: As the user named it.
        modules: Number of updated modules.
        ranks: Smallest and largest rank of a module.
        norm: Frobenius norm of the whole update.
        effective_rank: Mean over modules of exp(entropy of normalised singular values).
        largest: The module with the largest norm.
    """

    name: str
    modules: int
    ranks: tuple[int, int]
    norm: float
    effective_rank: float
    largest: str


@dataclass(frozen=True)
class Comparison:
    """(n, n) matrices over adapters: cosines, and overlaps of column and row spaces."""

    cosines: torch.Tensor
    columns: torch.Tensor
    rows: torch.Tensor


Spaces = dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def inspect_adapters(adapters: Sequence[Adapter]) -> tuple[list[Summary], Comparison]:
    """Summaries of adapters and comparisons of all pairs."""
    with one_thread_each() as workers:
        found: list[Spaces] = []
        for adapter in adapters:
            names = list(adapter.pairs)
            pairs = adapter.pairs
            found.append(
                dict(zip(names, in_order(lambda name, p=pairs: spaces(p[name]), names, workers), strict=True))  # type: ignore[misc]
            )
        summaries = [_summary(adapter, each) for adapter, each in zip(adapters, found, strict=True)]
        return summaries, _comparison(adapters, found)


def _summary(adapter: Adapter, found: Spaces) -> Summary:
    norms = {name: sigma.square().sum().item() ** 0.5 for name, (_, sigma, _) in found.items()}
    constant = adapter.layout.constant
    ranks = [lora_rank(pair, constant=name in constant) for name, pair in adapter.pairs.items()]
    effective = [effective_rank(sigma) for _, sigma, _ in found.values()]
    return Summary(
        name=adapter.name,
        modules=len(found),
        ranks=(min(ranks), max(ranks)),
        norm=sum(norm**2 for norm in norms.values()) ** 0.5,
        effective_rank=sum(effective) / len(effective),
        largest=max(norms, key=lambda name: norms[name]),
    )


def _comparison(adapters: Sequence[Adapter], found: Sequence[Spaces]) -> Comparison:
    count = len(adapters)
    cosines, columns, rows = (torch.eye(count, dtype=torch.float64) for _ in range(3))
    for i in range(count):
        for j in range(i):
            values = (
                whole_cosine(adapters[i].pairs, adapters[j].pairs),
                _overlap(found[i], found[j], 0),
                _overlap(found[i], found[j], 2),
            )
            for matrix, value in zip((cosines, columns, rows), values, strict=True):
                matrix[i, j] = matrix[j, i] = value
    return Comparison(cosines, columns, rows)


def _overlap(one: Spaces, two: Spaces, side: int) -> float:
    """Mean squared cosine of principal angles over common modules; NaN where there is none."""
    shares = []
    for name in one:
        if name in two and one[name][side].shape[1] and two[name][side].shape[1]:
            shares.append(principal_cosines(one[name][side], two[name][side]).square().mean().item())
    return sum(shares) / len(shares) if shares else float("nan")
