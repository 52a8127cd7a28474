"""A merged model written whole: ``W + ΔW`` per weight, in float32, rounded once to the base's number format.

Weights are read, merged and written one at a time, so memory stays that of the largest of them. A weight that the base
ties (the output head to the embedding) is written out where only one of the two has an update.
"""

import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

import torch

from src.adapters.architecture import CONFIG, read_architecture
from src.adapters.base_weights import BESIDE, INDEX, BaseWeights
from src.adapters.constant_input import split_dense
from src.adapters.deltas import Delta, row_blocks
from src.adapters.pairs import finite_values
from src.adapters.safetensors_stream import NAMES, Entry, shards, write_stream
from src.errors import InputError
from src.files import read_json, write_atomically, write_json


def write_model(
    folder: Path,
    base: BaseWeights,
    deltas: Mapping[str, Delta],
    *,
    transposed: bool,
    shard_bytes: int,
    constant: Collection[str] = (),
) -> None:
    """Write the base with the updates added, with its configuration and tokenizer.

    Args:
        folder: Directory to fill.
        base: The base model's weights.
        deltas: Updates (O, I), or (O, I + 1) with LoRA biases, by module name.
        transposed: Whether square weights are stored (I, O), as GPT-2's Conv1D layers are, where the base's
            configuration does not tell; others tell by their shape.
        shard_bytes: Largest size of a file.
        constant: Modules whose update is (O, I + 1): the last column is one of the layer's bias.

    Raises:
        InputError: an updated module is not in the base, has another shape there, or no bias to take up a LoRA bias; a
            weight is of a number format that cannot be written, or not finite after the update.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = {name: split_dense(deltas[name]) for name in deltas if name in constant}
    weights = {name: parts[name][0] if name in parts else delta for name, delta in deltas.items()}
    biases = _biases(base, {name: bias for name, (_, bias) in parts.items()})
    entries, untied = _entries(base, weights, biases, transposed=transposed)
    groups = shards(entries, shard_bytes)
    names = [_shard_name(i, len(groups)) for i in range(len(groups))]
    for name, group in zip(names, groups, strict=True):
        write_atomically(folder / name, lambda path, group=group: write_stream(path, group))  # type: ignore[misc]
    if len(groups) > 1:
        where = {entry.key: name for name, group in zip(names, groups, strict=True) for entry in group}
        size = sum(entry.size for entry in entries)
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": where})
    _copy_beside(base.folder, folder, untied=untied)


def _shard_name(index: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def _biases(base: BaseWeights, updates: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The updates of biases by their key in the base."""
    found: dict[str, torch.Tensor] = {}
    for module, update in updates.items():
        key = base.bias_key_of(module)
        if key not in base.handles:
            raise InputError(
                f"{base.folder}: {module} has no bias that could take up the adapter's LoRA bias; write an adapter"
            )
        _check_once(base, key, found)
        found[key] = update
    return found


def _check_once(base: BaseWeights, key: str, known: Mapping[str, object]) -> None:
    """Stop where two updates are of one weight: they come from adapters that know a module by two names."""
    if key in known:
        raise InputError(f"{base.folder}: two modules of these adapters are {key} here; expected one name of a module")


def _entries(
    base: BaseWeights, deltas: Mapping[str, Delta], biases: Mapping[str, torch.Tensor], *, transposed: bool
) -> tuple[list[Entry], bool]:
    """What to write, in the base's order, and whether a tied weight became two."""
    by_key: dict[str, Delta] = {}
    flipped: set[str] = set()
    extra: list[Entry] = []
    parts = read_architecture(base.folder)
    embedding = parts.embedding_key(base)
    tied = base.key_of(parts.head) is None and parts.tied
    for module, delta in deltas.items():
        key = base.key_of(module)
        if key is None and module == parts.head and embedding is not None and tied:
            extra.append(_entry(f"{parts.head}.weight", base, embedding, delta, transposed=False))
        elif key is None:
            raise InputError(f"{base.folder}: no weight of the module {module}, which the adapter updates")
        else:
            _check_once(base, key, by_key)
            by_key[key] = delta
            flipped |= {key} if parts.stores_transposed(module, told=transposed) else set()
    if embedding in by_key and tied and not extra:
        extra.append(_entry(f"{parts.head}.weight", base, str(embedding), None, transposed=False))
    entries = [
        _bias_entry(key, base, biases[key])
        if key in biases
        else _entry(key, base, key, by_key.get(key), transposed=key in flipped)
        for key in base.handles
    ]
    # A base may store both ends of a tied weight, which an update of one tells apart.
    stored = parts.tied and (base.folder / CONFIG).is_file() and embedding is not None and not tied
    return [*entries, *extra], bool(extra) or (stored and bool({base.key_of(parts.head), embedding} & set(by_key)))


def _entry(key: str, base: BaseWeights, source: str, delta: Delta | None, *, transposed: bool) -> Entry:
    shape = base.shape(source)
    dtype = base.get(source).dtype
    if dtype not in NAMES:
        raise InputError(f"{base.folder}: {source} is stored as {dtype}; a number format that cannot be written")
    if delta is None:
        return Entry(key, dtype, shape, lambda: base.get(source))
    flip = shape == delta.shape[::-1] and (shape != delta.shape or transposed)
    if shape != delta.shape and not flip:
        raise InputError(f"{base.folder}: {source} has the shape {shape}, the update of it {delta.shape}")
    if not dtype.is_floating_point or dtype.itemsize == 1:
        raise InputError(f"{base.folder}: {source} is stored as {dtype}; a quantised weight cannot take an update")
    return Entry(key, dtype, shape, lambda: finite_values(key, added(base.get(source), delta, flip=flip)))


def _bias_entry(key: str, base: BaseWeights, update: torch.Tensor) -> Entry:
    shape, dtype = base.shape(key), base.get(key).dtype
    return Entry(key, dtype, shape, lambda: finite_values(key, (base.get(key).to(update.dtype) + update).to(dtype)))


def added(weight: torch.Tensor, delta: Delta, *, flip: bool) -> torch.Tensor:
    """``W + ΔW`` in the weight's number format, added in float32 or better.

    Args:
        weight: (O, I), or (I, O) where ``flip``.
        delta: (O, I).
        flip: Whether the weight is stored transposed.
    """
    merged = torch.empty_like(weight)
    target, source = (merged.T, weight.T) if flip else (merged, weight)
    wide = torch.promote_types(weight.dtype, torch.float32)
    for rows in row_blocks(delta.shape):
        target[rows] = (source[rows].to(wide) + delta.block(rows)).to(weight.dtype)
    return merged


def _copy_beside(source: Path, folder: Path, *, untied: bool) -> None:
    for pattern in BESIDE:
        for path in sorted(source.glob(pattern)):
            # An index is of weight files, which are written anew.
            if path.is_file() and not path.name.endswith(".index.json"):
                write_atomically(folder / path.name, lambda to, path=path: shutil.copyfile(path, to))  # type: ignore[misc]
    if untied:
        config = read_json(folder / CONFIG, "the configuration of the base model")
        write_json(folder / CONFIG, config | {"tie_word_embeddings": False})
