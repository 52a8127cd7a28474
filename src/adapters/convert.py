"""Updates that are no low-rank product, from the base's weights: DoRA and fully trained modules. Exact and full rank.

DoRA (2402.09353)   ΔW = diag(m / ‖W + s·B·A‖_rows) (W + s·B·A) − W
trained             ΔW = W_trained − W
"""

from pathlib import Path

import torch

from src.adapters.architecture import read_architecture
from src.adapters.base_weights import BaseWeights
from src.adapters.deltas import LazyDelta
from src.adapters.pairs import LowRankPair
from src.errors import InputError


def base_weight(
    path: Path, module: str, shape: tuple[int, int], base: BaseWeights, *, transposed: bool
) -> torch.Tensor:
    """(O, I) weight of a module of the base, a view where it is stored transposed.

    Raises:
        InputError: the base has none of this shape.
    """
    key = _key(base, module)
    if key is None:
        raise InputError(f"{path}: {module} is not a weight of the base {base.folder}")
    stored = base.shape(key)
    flip = stored == shape[::-1] and (stored != shape or transposed)
    if stored != shape and not flip:
        raise InputError(f"{path}: {module} has the shape {shape}, in the base {base.folder} it is {stored}")
    weight = base.get(key)
    return weight.T if flip else weight


def _key(base: BaseWeights, module: str) -> str | None:
    """The key of a module's weight; that of the embedding for a head that shares it."""
    key, parts = base.key_of(module), read_architecture(base.folder)
    if key is None and module == parts.head and parts.tied:
        return parts.embedding_key(base)
    return key


def stored_weight(base: BaseWeights, module: str, shape: tuple[int, int]) -> torch.Tensor:
    """(O, I) weight of a module of the base, a view where the architecture stores it transposed.

    Raises:
        InputError: the base has none of this shape.
    """
    key = _key(base, module)
    flip = module in read_architecture(base.folder).transposed
    stored = shape[::-1] if flip else shape
    if key is None or base.shape(key) != stored:
        raise InputError(f"{base.folder}: no weight of {module} with the shape {stored}")
    return base.get(key).T if flip else base.get(key)


def dora(weight: torch.Tensor, pair: LowRankPair, magnitude: torch.Tensor) -> LazyDelta:
    """The update of a DoRA layer.

    Args:
        weight: (O, I) of the base.
        pair: ``s·B·A``.
        magnitude: (O,) row norms of the trained weight.
    """

    def evaluate(rows: slice) -> torch.Tensor:
        before = weight[rows].float()
        after = before + pair.block(rows)
        return after * (magnitude[rows] / after.norm(dim=1))[:, None] - before

    return LazyDelta(pair.shape, evaluate)


def trained(weight: torch.Tensor, saved: torch.Tensor) -> LazyDelta:
    """The update of a fully trained module: (O, I) of the base to ``saved``."""
    return LazyDelta((saved.shape[0], saved.shape[1]), lambda rows: saved[rows].float() - weight[rows].float())
