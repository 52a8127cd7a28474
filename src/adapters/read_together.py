"""Several adapters, read to be worked on together."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from src.adapters.base_weights import BaseWeights
from src.adapters.constant_input import without_bias
from src.adapters.deltas import lowrank
from src.adapters.peft_files import Adapter, read_adapter


def read_adapters(folders: Sequence[str | Path], base: BaseWeights | None = None) -> list[Adapter]:
    """Read adapters, so that updates of a module have the same inputs in all of them.

    Args:
        folders: PEFT LoRA directories or hub ids.
        base: See :func:`src.adapters.peft_files.read_adapter`.

    Raises:
        InputError: one cannot be read.
    """
    return same_inputs([read_adapter(folder, base) for folder in folders])


def same_inputs(adapters: Sequence[Adapter]) -> list[Adapter]:
    """The adapters, with a constant input for the updates of each module that has a LoRA bias in one of them."""
    constant = frozenset[str]().union(*(adapter.layout.constant for adapter in adapters))
    return [_given(adapter, constant - adapter.layout.constant) if constant else adapter for adapter in adapters]


def _given(adapter: Adapter, constant: frozenset[str]) -> Adapter:
    pairs = lowrank({n: without_bias(pair) if n in constant else pair for n, pair in adapter.pairs.items()})
    full_rank = {n: without_bias(delta) if n in constant else delta for n, delta in adapter.full_rank.items()}
    layout = replace(adapter.layout, constant=adapter.layout.constant | constant)
    return replace(adapter, pairs=pairs, full_rank=full_rank, layout=layout)
