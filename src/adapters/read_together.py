"""Several adapters, read to be worked on together."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from src.adapters.base_weights import EARLIER_PREFIX, LATER_PREFIX, BaseWeights
from src.adapters.constant_input import without_bias
from src.adapters.deltas import lowrank
from src.adapters.peft_files import Adapter, read_adapter
from src.errors import InputError


def read_adapters(folders: Sequence[str | Path], base: BaseWeights | None = None) -> list[Adapter]:
    """Read adapters, so that a module has the same name, and updates of it the same inputs, in all of them.

    Args:
        folders: PEFT LoRA directories or hub ids.
        base: See :func:`src.adapters.peft_files.read_adapter`.

    Raises:
        InputError: one cannot be read, or updates a module under two names.
    """
    return in_common_terms([read_adapter(folder, base) for folder in folders])


def in_common_terms(adapters: Sequence[Adapter]) -> list[Adapter]:
    """The adapters with one name for a module, and a constant input where one of them has a LoRA bias there."""
    adapters = _same_names(adapters)
    constant = frozenset[str]().union(*(adapter.layout.constant for adapter in adapters))
    return [_given(adapter, constant - adapter.layout.constant) if constant else adapter for adapter in adapters]


def _same_names(adapters: Sequence[Adapter]) -> list[Adapter]:
    """The adapters by later names of text layers, where one of them has those; else by their own."""
    if not any(module.startswith(LATER_PREFIX) for adapter in adapters for module in adapter.updates):
        return list(adapters)
    return [_renamed(one) if any(m.startswith(EARLIER_PREFIX) for m in one.updates) else one for one in adapters]


def named_like(adapter: Adapter, modules: Iterable[str]) -> Adapter:
    """The adapter by later names of text layers, where these modules have such."""
    return _renamed(adapter) if any(module.startswith(LATER_PREFIX) for module in modules) else adapter


def _renamed(adapter: Adapter) -> Adapter:
    def later(module: str) -> str:
        if module == "language_model.lm_head":
            return "lm_head"
        return LATER_PREFIX + module.removeprefix(EARLIER_PREFIX) if module.startswith(EARLIER_PREFIX) else module

    names = [later(module) for module in adapter.updates]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(
            f"{adapter.name}: updates {twice[0]} under two names, one of before transformers 4.52; expected one"
        )
    pairs = {later(name): pair for name, pair in adapter.pairs.items()}
    full_rank = {later(name): delta for name, delta in adapter.full_rank.items()}
    embeddings, constant = (frozenset(map(later, own)) for own in (adapter.layout.embeddings, adapter.layout.constant))
    layout = replace(adapter.layout, embeddings=embeddings, constant=constant)
    return replace(adapter, pairs=pairs, full_rank=full_rank, layout=layout)


def _given(adapter: Adapter, constant: frozenset[str]) -> Adapter:
    pairs = lowrank({n: without_bias(pair) if n in constant else pair for n, pair in adapter.pairs.items()})
    full_rank = {n: without_bias(delta) if n in constant else delta for n, delta in adapter.full_rank.items()}
    layout = replace(adapter.layout, constant=adapter.layout.constant | constant)
    return replace(adapter, pairs=pairs, full_rank=full_rank, layout=layout)
