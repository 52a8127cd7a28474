"""The alignment direction V = W_aligned − W_base of each module, from a directory that the user names.

An adapter directory holds V itself, as factors. A model directory holds W_aligned; its difference to the base's weights
is read in blocks of rows, from files.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from src.adapters.base_weights import BaseWeights, open_base
from src.adapters.constant_input import without_bias
from src.adapters.convert import stored_weight
from src.adapters.deltas import Delta, LazyDelta, row_blocks, squared_norm
from src.adapters.pairs import LowRankPair
from src.adapters.peft_files import CONFIG, read_adapter
from src.errors import InputError
from src.models.base import weights_folder


@contextmanager
def alignment(
    aligned: str | None, base: str | None, safety: Mapping[str, Delta], modules: Mapping[str, Delta]
) -> Iterator[dict[str, Delta]]:
    """V of each module.

    Args:
        aligned: Adapter or model directory (or hub id of a model); unset takes the safety adapter's update as V.
        base: Directory or hub id of the base's weights, where ``aligned`` is a model.
        safety: The safety update.
        modules: The updates for which V is wanted.

    Raises:
        InputError: V is missing for a module or has another shape.
    """
    if aligned is None:
        yield _checked(dict(safety), modules, "the safety adapter")
    elif (Path(aligned) / CONFIG).exists():
        yield _checked(dict(read_adapter(aligned).pairs), modules, aligned)
    elif base is None:
        raise InputError(f"method.aligned {aligned} is a model; name the base model's directory too: --method.base")
    else:
        with open_base(weights_folder(aligned)) as one, open_base(weights_folder(base)) as two:
            yield {name: _difference(name, one, two, delta.shape) for name, delta in modules.items()}


def _checked(found: dict[str, Delta], modules: Mapping[str, Delta], what: str) -> dict[str, Delta]:
    for name, delta in modules.items():
        if name not in found:
            raise InputError(f"{what}: has no update of {name}, so it gives no direction of alignment there")
        if found[name].shape == (delta.shape[0], delta.shape[1] - 1):
            # The utility update has a LoRA bias, and this one has none.
            found[name] = without_bias(found[name])
        if found[name].shape != delta.shape:
            raise InputError(f"{what}: {name} has the shape {found[name].shape}; the utility update has {delta.shape}")
    return found


def _difference(name: str, aligned: BaseWeights, base: BaseWeights, shape: tuple[int, int]) -> LazyDelta:
    one, two = stored_weight(aligned, name, shape), stored_weight(base, name, shape)
    return LazyDelta(shape, lambda rows: one[rows].float() - two[rows].float())


def projected(direction: Delta, pair: LowRankPair) -> LowRankPair:
    """``C ΔW`` with ``C = V Vᵀ / ‖V‖_F`` (2405.16833), as factors ``(A, C B)``; zero where V is zero."""
    norm = squared_norm(direction) ** 0.5
    b = pair.b.double()
    if norm == 0.0:
        return LowRankPair(pair.a, b * 0)
    if isinstance(direction, LowRankPair):
        va, vb = direction.a.double(), direction.b.double()
        return LowRankPair(pair.a, vb @ ((va @ va.T) @ (vb.T @ b)) / norm)
    rows = row_blocks(direction.shape)
    inner = torch.stack([direction.block(block).double().T @ b[block] for block in rows]).sum(0)
    return LowRankPair(pair.a, torch.cat([direction.block(block).double() @ inner for block in rows]) / norm)
