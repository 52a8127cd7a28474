"""The alignment direction V = W_aligned − W_base of each module, from a directory that the user names.

An adapter directory holds V itself, as factors. A model directory holds W_aligned; its difference to the base's weights
is read in blocks of rows, from files.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from textwrap import shorten

import torch

from src.adapters.base_weights import BaseWeights, open_base, samples
from src.adapters.checks import revision_for
from src.adapters.constant_input import without_bias
from src.adapters.convert import weight_difference, weight_key
from src.adapters.deltas import Delta, LazyDelta, blocks, left_product, matrix, squared_norm
from src.adapters.pairs import LowRankPair
from src.adapters.peft_files import CONFIG, Adapter, read_adapter
from src.adapters.read_together import named_like
from src.errors import InputError
from src.merge.base import MergeMethod
from src.models.base import weights_folder

log = logging.getLogger(__name__)
STRANGE = 0.5


class Aligned(MergeMethod):
    """A method that takes the direction of alignment from ``aligned``, its own setting."""

    aligned: str | None
    base: str | None

    def adapters(self) -> list[Adapter]:
        """The adapter that holds the direction, where one does."""
        if self.aligned is None or not _is_adapter(self.aligned):
            return []
        with _read_aligned(self.aligned, self.base) as adapter:
            return [adapter]


def _is_adapter(folder: str) -> bool:
    return (Path(folder) / CONFIG).exists()


@contextmanager
def _read_aligned(aligned: str, base: str | None) -> Iterator[Adapter]:
    """The adapter that holds V; the base stays open for updates that are not low-rank."""
    with nullcontext() if base is None else open_base(weights_folder(base), revision_for(base, [aligned])) as weights:
        yield read_adapter(aligned, weights)


@contextmanager
def alignment(
    aligned: str | None, base: str | None, safety: Mapping[str, Delta], modules: Mapping[str, Delta]
) -> Iterator[dict[str, Delta]]:
    """V of each module that has one; a warning names the others, which the method leaves as they are.

    Args:
        aligned: Adapter or model directory (or hub id of a model); unset takes the safety adapter's update as V.
        base: Directory or hub id of the base's weights, where ``aligned`` is a model, or an adapter with full-rank
            updates.
        safety: The safety update.
        modules: The updates for which V is wanted.

    Raises:
        InputError: no module has a V, or one has another shape.
    """
    if aligned is None:
        yield _checked(dict(safety), modules, "the safety adapter")
    elif _is_adapter(aligned):
        with _read_aligned(aligned, base) as adapter:
            yield _checked(dict(named_like(adapter, modules).updates), modules, aligned)
    elif base is None:
        raise InputError(f"method.aligned {aligned} is a model; name the base model's directory too: --method.base")
    else:
        with open_base(weights_folder(aligned)) as one, open_base(weights_folder(base)) as two:
            found = {name: weight_difference(one, two, name, delta.shape) for name, delta in modules.items()}
            same = _warn_of_strangers(one, two, list(modules))
            # Where a sample of the weights is the same, all of them are looked at.
            zero = {name for name in same if squared_norm(found[name]) == 0.0}
            yield _checked({name: delta for name, delta in found.items() if name not in zero}, modules, aligned)


def _warn_of_strangers(aligned: BaseWeights, base: BaseWeights, modules: list[str]) -> list[str]:
    """Warn where a model differs from its base as no fine-tuned one does: by more than ``STRANGE`` of the norm.

    By a sample of each module's weights. Two models of one architecture have equal shapes, so only their values tell.

    Args:
        aligned: The model.
        base: Its base.
        modules: Modules of which both have a weight.

    Returns:
        Modules whose samples are the same.
    """
    change = norm = 0.0
    same = []
    for module in modules:
        one, two = (samples(weights.get(str(weight_key(weights, module)))).double() for weights in (aligned, base))
        change += (one - two).square().sum().item()
        norm += two.square().sum().item()
        same += [module] if torch.equal(one, two) else []
    if change > STRANGE**2 * norm:
        log.warning(
            "method.aligned %s: weights %.0f %% of their norm away from those of %s; expected a model trained from it",
            aligned.folder,
            100 * (change / norm) ** 0.5 if norm else float("inf"),
            base.folder,
        )
    return same


def _checked(found: dict[str, Delta], modules: Mapping[str, Delta], what: str) -> dict[str, Delta]:
    """The directions of these modules, in their order; without those that there are none of."""
    checked: dict[str, Delta] = {}
    for name, delta in modules.items():
        direction = found.get(name)
        if direction is None or (isinstance(direction, LowRankPair) and direction.squared_norm() == 0.0):
            continue
        if direction.shape == (delta.shape[0], delta.shape[1] - 1):
            # The utility update has a LoRA bias, and this one has none.
            direction = without_bias(direction)
        if direction.shape != delta.shape:
            raise InputError(f"{what}: {name} has the shape {direction.shape}; the utility update has {delta.shape}")
        checked[name] = direction
    rest = [name for name in modules if name not in checked]
    if not checked:
        raise InputError(
            f"{what}: has no update of {rest[0]} or any other module of the utility adapters, or a zero one"
        )
    if rest:
        log.warning(
            "%s: gives no direction of alignment in %d of %d modules, which stay as they are: %s",
            what,
            len(rest),
            len(modules),
            shorten(", ".join(rest), 200, placeholder=" …"),
        )
    return checked


def projected(direction: Delta, delta: Delta) -> Delta:
    """``C ΔW`` with ``C = V Vᵀ / ‖V‖_F`` (2405.16833), as factors where V or ΔW is low-rank; zero where V is zero."""
    norm = squared_norm(direction) ** 0.5
    if isinstance(delta, LowRankPair):
        return LowRankPair(delta.a, _aligned_columns(direction, delta.b.double(), norm))
    if norm == 0.0:
        return LazyDelta(delta.shape, lambda rows: torch.zeros_like(delta.block(rows)))
    if isinstance(direction, LowRankPair):
        va, vb = direction.a.double(), direction.b.double()
        return LowRankPair((va @ va.T) @ left_product(vb, delta) / norm, vb)
    return _Projection(direction, delta, norm)


def _aligned_columns(direction: Delta, columns: torch.Tensor, norm: float) -> torch.Tensor:
    """``C X`` for X (O, R)."""
    if norm == 0.0:
        return columns * 0
    if isinstance(direction, LowRankPair):
        va, vb = direction.a.double(), direction.b.double()
        return vb @ ((va @ va.T) @ (vb.T @ columns)) / norm
    inner = left_product(columns, direction).T
    return torch.cat([block.double() @ inner for block in blocks(direction)]) / norm


class _Projection:
    """``C ΔW`` of two full-rank matrices. What it holds, (I, I), is made for the first block and let go with the last.

    Args:
        direction: V.
        delta: ΔW.
        norm: ``‖V‖_F``, above 0.
    """

    def __init__(self, direction: Delta, delta: Delta, norm: float) -> None:
        self.direction, self.delta, self.norm = direction, delta, norm
        self._inner: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return self.delta.shape

    def block(self, rows: slice) -> torch.Tensor:
        """Some rows, float64."""
        if self._inner is None:
            self._inner = left_product(matrix(self.direction), self.delta)
        found = self.direction.block(rows).double() @ self._inner / self.norm
        if rows.stop is None or rows.stop >= self.shape[0]:
            self._inner = None
        return found

    def dense(self) -> torch.Tensor:
        """The whole, float64."""
        return matrix(self)
