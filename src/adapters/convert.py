"""What of an adapter needs the base's weights: DoRA and fully trained modules, exact and full rank, and copies of it.

DoRA (2402.09353)   ΔW = diag(m / ‖W + s·B·A‖_rows) (W + s·B·A) − W
trained             ΔW = W_trained − W
"""

import logging
from collections.abc import Mapping
from pathlib import Path

import torch

from src.adapters.architecture import read_architecture
from src.adapters.base_weights import BaseWeights
from src.adapters.deltas import Delta, Deltas, LazyDelta
from src.adapters.pairs import LowRankPair, Pairs
from src.adapters.peft_config import Layout
from src.adapters.peft_weights import AdapterWeights
from src.errors import InputError

log = logging.getLogger(__name__)
ROUNDED = 2**-6
"""Relative difference that rounding to bfloat16, once or twice, leaves room for."""
BLOCK = 4096
"""Rows of two weights that are compared at once."""


def base_weight(
    path: Path, module: str, shape: tuple[int, int], base: BaseWeights, *, transposed: bool
) -> torch.Tensor:
    """(O, I) weight of a module of the base, a view where it is stored transposed.

    Raises:
        InputError: the base has none of this shape.
    """
    key = weight_key(base, module)
    if key is None:
        raise InputError(f"{path}: {module} is not a weight of the base {base.folder}")
    stored, told = base.shape(key), read_architecture(base.folder).stores_transposed(module, told=transposed)
    flip = stored == shape[::-1] and (stored != shape or told)
    if stored != shape and not flip:
        raise InputError(f"{path}: {module} has the shape {shape}, in the base {base.folder} it is {stored}")
    weight = base.get(key)
    return weight.T if flip else weight


def weight_key(base: BaseWeights, module: str) -> str | None:
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
    key, flip = weight_key(base, module), module in read_architecture(base.folder).transposed
    if key is None or not _has(base, module, shape):
        raise InputError(f"{base.folder}: no weight of {module} with the shape {shape[::-1] if flip else shape}")
    return base.get(key).T if flip else base.get(key)


def check_copies(path: Path, copies: Mapping[str, torch.Tensor], base: BaseWeights | None) -> None:
    """Check that an adapter's copies of frozen weights are the base's; without a base, warn of them.

    Raises:
        InputError: one is of another shape, as after the vocabulary was grown, or holds other values.
    """
    for module, copy in copies.items():
        if base is not None:
            _check_copy(path, module, copy, base)
        else:
            log.warning(
                "%s: its copy of the base's %s %s is taken to equal the base (--base has it compared); rows of a "
                "vocabulary that was grown are lost",
                path,
                module,
                tuple(copy.shape),
            )


def _check_copy(path: Path, module: str, copy: torch.Tensor, base: BaseWeights) -> None:
    key = weight_key(base, module)
    weight = None if key is None else base.get(key)
    if weight is None or weight.shape != copy.shape:
        found = f"the shape {tuple(copy.shape)}" + ("" if weight is None else f" in place of {tuple(weight.shape)}")
    elif all(_alike(*rows) for rows in zip(copy.split(BLOCK), weight.split(BLOCK), strict=True)):
        return
    else:
        found = "other values"
    raise InputError(
        f"{path}: its copy of the base's {module} has {found}; expected that of {base.folder} (a vocabulary that was "
        "grown, or weights trained on their own, are no part of a merge: merge on a base that has them)"
    )


def _alike(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Whether two weights are equal but for rounding to 16 bits."""
    one, two = one.float(), two.float()
    return torch.allclose(one, two, rtol=ROUNDED, atol=ROUNDED * two.square().mean().sqrt().item())


def weight_difference(one: BaseWeights, two: BaseWeights, module: str, shape: tuple[int, int]) -> Delta:
    """A module's weight in one model less that in another, (O, I), read in blocks of rows.

    Where the shape is (O, I + 1), the last column is the difference of the layer's biases
    (:mod:`src.adapters.constant_input`); a model without a bias has zeros.

    Raises:
        InputError: a model has no weight of this shape.
    """
    inner = (shape[0], shape[1] - 1)
    biased = any(_has(weights, module, inner) for weights in (one, two))
    first, second = (stored_weight(weights, module, inner if biased else shape) for weights in (one, two))
    return _change(second, first, _bias(one, module, shape[0]) - _bias(two, module, shape[0]) if biased else None)


def _change(before: torch.Tensor, after: torch.Tensor, last: torch.Tensor | None) -> LazyDelta:
    """``after − before`` (O, I), float32, with a last column (O, 1) where one is given."""

    def evaluate(rows: slice) -> torch.Tensor:
        change = after[rows].float() - before[rows].float()
        return change if last is None else torch.cat([change, last[rows]], dim=1)

    return LazyDelta((after.shape[0], after.shape[1] + (last is not None)), evaluate)


def _has(base: BaseWeights, module: str, shape: tuple[int, int]) -> bool:
    key = weight_key(base, module)
    flip = module in read_architecture(base.folder).transposed
    return key is not None and base.shape(key) == (shape[::-1] if flip else shape)


def _bias(base: BaseWeights, module: str, outputs: int) -> torch.Tensor:
    """(O, 1) bias of a layer, float32; zeros where it has none."""
    key = base.bias_key_of(module)
    return base.get(key).float()[:, None] if key in base.handles else torch.zeros(outputs, 1)


def full_rank_updates(
    path: Path, found: AdapterWeights, pairs: Pairs, base: BaseWeights | None, layout: Layout
) -> Deltas:
    """The updates of an adapter's DoRA layers and fully trained modules.

    Args:
        path: The adapter's file, for errors.
        found: What is in it.
        pairs: ``s·B·A`` of its LoRA layers.
        base: The base.
        layout: How the updates lie in the model.

    Raises:
        InputError: there are such, and no base, or it has no weight that one of them fits.
    """
    updates: Deltas = {}
    if base is None:
        if found.magnitudes or found.saved or found.saved_biases:
            raise InputError(f"{path}: holds DoRA or fully trained modules that its configuration does not name")
        return updates
    for module, magnitude in found.magnitudes.items():
        if module not in pairs or module in layout.embeddings:
            raise InputError(f"{path}: {module} has a DoRA magnitude, but is no linear layer with LoRA factors")
        weight = base_weight(path, module, pairs[module].shape, base, transposed=layout.transposed)
        updates[module] = dora(weight, pairs[module], magnitude)
    for module, saved in found.saved.items():
        updates[module] = trained(path, module, saved, found.saved_biases.get(module), base)
    if alone := set(found.saved_biases) - set(found.saved):
        raise InputError(f"{path}: holds a fully trained bias of {min(alone)} without its weight")
    return updates


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


def trained(path: Path, module: str, saved: torch.Tensor, bias: torch.Tensor | None, base: BaseWeights) -> LazyDelta:
    """The update of a fully trained module, (O, I); with a bias (O, I + 1), see :mod:`src.adapters.constant_input`.

    Args:
        path: The file that the module is from, for errors.
        module: Its name.
        saved: Its weight, stored as the base stores it.
        bias: (O,) its bias.
        base: The base.

    Raises:
        InputError: the base has no such weight, or no such bias.
    """
    flip = module in read_architecture(base.folder).transposed
    after = saved.T if flip else saved
    before = base_weight(path, module, (after.shape[0], after.shape[1]), base, transposed=flip)
    if bias is None:
        return _change(before, after, None)
    if bias.shape != after.shape[:1] or base.bias_key_of(module) not in base.handles:
        raise InputError(
            f"{path}: {module} has a bias of shape {tuple(bias.shape)}, in the base {base.folder} it has not"
        )
    return _change(before, after, bias.float()[:, None] - _bias(base, module, after.shape[0]))
