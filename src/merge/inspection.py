"""What adapters look like and how they lie to each other: ranks, norms, effective ranks, cosines, principal angles.

For each pair of adapters: the cosine of the updates as one vector, and over the modules that both update, the principal
angles between their column spaces and between their row spaces, with the mean of their squared cosines (1: one space
contains the other; r / dimension: chance). A full-rank update (DoRA, fully trained modules) is taken with the fewest
directions that hold ``ENERGY`` of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch

from src.adapters.constant_input import lora_rank, split, split_dense
from src.adapters.deltas import Delta, squared_norm
from src.adapters.geometry import leading_spaces, principal_angles, whole_cosine
from src.adapters.pairs import LowRankPair
from src.adapters.peft_files import Adapter
from src.gevp.diagnostics import effective_rank
from src.merge.parallel import in_order, one_thread_each

ENERGY = 0.99


@dataclass(frozen=True)
class Summary:
    """One adapter.

    Attributes:
        name: As the user named it.
        modules: Number of updated modules.
        ranks: Smallest and largest rank of a module.
        norm: Frobenius norm of the whole update.
        effective_rank: Mean over modules of exp(entropy of normalised singular values); LoRA biases do not count, as
            they do not in ranks.
        largest: The module with the largest norm.
    """

    name: str
    modules: int
    ranks: tuple[int, int]
    norm: float
    effective_rank: float
    largest: str


@dataclass(frozen=True)
class Angles:
    """Principal angles between two adapters, in degrees, ascending.

    Attributes:
        one: Index of the first adapter.
        two: Index of the second one.
        columns: Module that both update to the angles (min(R₁, R₂),) between the column spaces of its updates.
        rows: The same between their row spaces.
    """

    one: int
    two: int
    columns: dict[str, list[float]]
    rows: dict[str, list[float]]


@dataclass(frozen=True)
class Comparison:
    """All pairs of n adapters; not a number where two of them update no module in common.

    Attributes:
        cosines: (n, n) cosines of whole updates.
        columns: (n, n) mean over modules of the mean squared cosine of the principal angles of column spaces.
        rows: The same of row spaces.
        column_angles: (n, n) median principal angle of column spaces over all modules, degrees.
        row_angles: The same of row spaces.
        angles: The principal angles of each pair.
    """

    cosines: torch.Tensor
    columns: torch.Tensor
    rows: torch.Tensor
    column_angles: torch.Tensor
    row_angles: torch.Tensor
    angles: list[Angles]


Spaces = dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def inspect_adapters(adapters: Sequence[Adapter]) -> tuple[list[Summary], Comparison]:
    """Summaries of adapters and comparisons of all pairs."""
    with one_thread_each() as workers:
        found = [_spaces(adapter, workers) for adapter in adapters]
        summaries = [_summary(adapter, each) for adapter, each in zip(adapters, found, strict=True)]
        return summaries, _comparison(adapters, found)


def _spaces(adapter: Adapter, workers: int) -> Spaces:
    updates = adapter.updates
    found = in_order(lambda name: leading_spaces(updates[name], ENERGY), list(updates), workers)
    return dict(zip(updates, found, strict=True))


def _summary(adapter: Adapter, found: Spaces) -> Summary:
    norms = {name: squared_norm(delta) for name, delta in adapter.updates.items()}
    ranks = [_rank(delta, constant=name in adapter.layout.constant) for name, delta in adapter.updates.items()]
    effective = [
        effective_rank(leading_spaces(_of_weight(delta), ENERGY)[1] if name in adapter.layout.constant else sigma)
        for (name, delta), (_, sigma, _) in zip(adapter.updates.items(), found.values(), strict=True)
    ]
    return Summary(
        name=adapter.name,
        modules=len(found),
        ranks=(min(ranks), max(ranks)),
        norm=sum(norms.values()) ** 0.5,
        effective_rank=sum(effective) / len(effective),
        largest=max(norms, key=lambda name: norms[name]),
    )


def _rank(delta: Delta, *, constant: bool) -> int:
    return lora_rank(delta, constant=constant) if isinstance(delta, LowRankPair) else min(delta.shape)


def _of_weight(delta: Delta) -> Delta:
    """An update (O, I + 1) without the column of its bias."""
    return split(delta)[0] if isinstance(delta, LowRankPair) else split_dense(delta)[0]


def _comparison(adapters: Sequence[Adapter], found: Sequence[Spaces]) -> Comparison:
    count = len(adapters)
    cosines, columns, rows = (torch.eye(count, dtype=torch.float64) for _ in range(3))
    column_angles, row_angles = (torch.zeros(count, count, dtype=torch.float64) for _ in range(2))
    pairs = [
        Angles(i, j, _angles(found[i], found[j], 0), _angles(found[i], found[j], 2))
        for i, j in combinations(range(count), 2)
    ]
    for pair in pairs:
        values = {
            cosines: whole_cosine(adapters[pair.one].updates, adapters[pair.two].updates),
            columns: _overlap(pair.columns),
            rows: _overlap(pair.rows),
            column_angles: _median(pair.columns),
            row_angles: _median(pair.rows),
        }
        for matrix, value in values.items():
            matrix[pair.one, pair.two] = matrix[pair.two, pair.one] = value
    return Comparison(cosines, columns, rows, column_angles, row_angles, pairs)


def _angles(one: Spaces, two: Spaces, side: int) -> dict[str, list[float]]:
    """Principal angles of each module in which both have directions."""
    common = [name for name in one if name in two and one[name][side].shape[1] and two[name][side].shape[1]]
    return {name: principal_angles(one[name][side], two[name][side]).tolist() for name in common}


def _overlap(angles: dict[str, list[float]]) -> float:
    """Mean over modules of the mean squared cosine; NaN where there is none."""
    shares = [torch.tensor(each, dtype=torch.float64).deg2rad().cos().square().mean() for each in angles.values()]
    return torch.stack(shares).mean().item() if shares else float("nan")


def _median(angles: dict[str, list[float]]) -> float:
    values = [angle for each in angles.values() for angle in each]
    return torch.tensor(values, dtype=torch.float64).quantile(0.5).item() if values else float("nan")
