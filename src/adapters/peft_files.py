"""PEFT LoRA directories, read to and written from low-rank pairs. Its key names: here and in :mod:`.peft_weights`."""

import hashlib
import json
import logging
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from safetensors.torch import save_file
from torch.nn.functional import pad

from src.adapters.architecture import read_architecture
from src.adapters.base_weights import BaseWeights, local_folder
from src.adapters.chat_template import TEMPLATE, TOKENIZER, read_template
from src.adapters.constant_input import split, with_bias
from src.adapters.convert import check_copies, full_rank_updates
from src.adapters.deltas import Deltas
from src.adapters.pairs import LowRankPair, Pairs, finite_values
from src.adapters.peft_config import PLAIN, SCALING, Layout, check_config, lora_config, named_base, scaling
from src.adapters.peft_weights import AdapterWeights, read_weights
from src.errors import InputError
from src.files import read_json, sha256_file, write_atomically, write_json, write_text

OF_EXPERT = re.compile(r"\.experts\.\d+\.")
"""Modules that transformers 5 holds in one parameter: PEFT stacks their factors, and takes no ranks of their own."""
CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
MANIFEST, SEEN, CARD = "manifest.json", "seen_prompts.txt", "README.md"
FILES = (CONFIG, WEIGHTS, PICKLED, MANIFEST, SEEN, TEMPLATE, TOKENIZER)
"""What of a directory or a hub repository is read, where it is there."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter.

    Attributes:
        name: The directory as the user named it.
        pairs: Module name to low-rank pair (float32 at least), in the order of the file.
        base: ``base_model_name_or_path`` of its configuration.
        sha256: Hash of the weights file.
        manifest: What made it, where this project did; empty otherwise.
        seen: Hashes of the prompts that it was trained or calibrated on, where known.
        layout: How its updates lie in the model.
        full_rank: Updates of DoRA layers and of fully trained modules, in place of pairs; empty unless the base was
            at hand when the adapter was read.
        scaling: Settings of its configuration that say by what B A is multiplied.
        revision: Git revision of the base's hub repository, where its configuration names one.
        template: The chat template that lies beside it.
    """

    name: str
    pairs: Pairs
    base: str
    sha256: str
    manifest: dict[str, Any] = field(default_factory=dict)
    seen: frozenset[str] = frozenset()
    layout: Layout = PLAIN
    full_rank: Deltas = field(default_factory=dict)
    scaling: dict[str, Any] = field(default_factory=dict)
    revision: str | None = None
    template: str | None = None

    @property
    def identity(self) -> str:
        """Hash of all that its updates are made of: equal weights with another ``lora_alpha`` are another adapter."""
        made_of = json.dumps([self.sha256, self.scaling], sort_keys=True)
        return hashlib.sha256(made_of.encode()).hexdigest()

    @property
    def updates(self) -> Deltas:
        """All updates, low-rank and full-rank."""
        return {**self.pairs, **self.full_rank}

    @property
    def fingerprint(self) -> str | None:
        """Fingerprint of the base that it was trained on, where known."""
        return self.manifest.get("base", {}).get("fingerprint")


def read_adapter(folder: str | Path, base: BaseWeights | None = None) -> Adapter:
    """Read a PEFT LoRA directory, or a hub repository of that form.

    Args:
        folder: The directory or the repository's id.
        base: The base's weights, from which DoRA and fully trained modules become full-rank updates.

    Raises:
        InputError: a file is missing or broken, or the adapter has parts that updates cannot express.
    """
    path, config = fetched(folder, full_rank=base is not None)
    name, revision = named_base(config)
    file = weights_file(path)
    found = read_weights(file, _fully_trained(config, base))
    pairs = {module: _pair(file, module, both, config) for module, both in found.factors.items()}
    for module in found.embeddings:
        # The table's rows are looked up, so its factors are stored for the transposed weight.
        pairs[module] = LowRankPair(pairs[module].b.T, pairs[module].a.T)
    check_copies(file, found.copies, base)
    if lost := sorted(set(found.factors) - set(found.magnitudes)) if config.get("use_dora") else []:
        raise InputError(f"{file}: {lost[0]} has no DoRA magnitude, and use_dora is true in {CONFIG}")
    _add_biases(file, found, pairs, config)
    # A fully trained embedding is one too; only the base knows which module that is.
    tables = read_architecture(base.folder).embeddings & set(found.saved) if base is not None and found.saved else set()
    embeddings = frozenset(found.embeddings | tables)
    constant = frozenset([*found.biases, *found.saved_biases])
    layout = Layout(embeddings, bool(config.get("fan_in_fan_out")), constant, config.get("task_type"))
    return Adapter(
        name=str(folder),
        pairs={module: pair for module, pair in pairs.items() if module not in found.magnitudes},
        base=name,
        sha256=sha256_file(file),
        manifest=_manifest(path / MANIFEST),
        seen=read_seen(path),
        layout=layout,
        full_rank=full_rank_updates(file, found, pairs, base, layout),
        scaling={key: config.get(key) for key in SCALING},
        revision=revision,
        template=read_template(path),
    )


def read_base(folder: str | Path) -> Adapter:
    """An adapter without its updates: its base, and what made it.

    Raises:
        InputError: see :func:`read_adapter`.
    """
    path, config = fetched(folder, full_rank=True)
    name, revision = named_base(config)
    return Adapter(str(folder), {}, name, sha256="", manifest=_manifest(path / MANIFEST), revision=revision)


def fetched(folder: str | Path, *, full_rank: bool) -> tuple[Path, dict[str, Any]]:
    """Where an adapter lies, fetched where it is on the hub, and its configuration, checked."""
    path = local_folder(
        str(folder),
        [*FILES, CARD],
        absent=f"{folder}: no such directory; expected a PEFT adapter ({CONFIG} and {WEIGHTS})",
        unfetched=f"{folder}: neither an adapter directory nor a hub adapter that can be fetched now",
    )
    config = read_json(path / CONFIG, "the configuration of a PEFT LoRA adapter")
    check_config(path / CONFIG, config, full_rank=full_rank)
    return path, config


def _fully_trained(config: dict[str, Any], base: BaseWeights | None) -> list[str]:
    """Ends of the names of fully trained modules.

    With ``ensure_weight_tying`` PEFT trains and writes both ends of a tied weight, though only one of them is listed.
    """
    listed = config.get("modules_to_save") or []
    if not listed or base is None or not config.get("ensure_weight_tying"):
        return listed
    parts = read_architecture(base.folder)
    return [*listed, *sorted(parts.embeddings), parts.head]


def read_seen(folder: Path) -> frozenset[str]:
    """Hashes of the prompts that an adapter or a model here was trained or calibrated on; empty without the file."""
    path = folder / SEEN
    try:
        return frozenset(path.read_text(encoding="utf-8").split()) if path.exists() else frozenset()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error}); expected hashes of prompts") from None


def _manifest(path: Path) -> dict[str, Any]:
    """What made an adapter; empty without the file."""
    found = read_json(path, "a manifest") if path.exists() else {}
    base = found.get("base", {}) if isinstance(found, dict) else None
    if not isinstance(base, dict) or not isinstance(base.get("fingerprint", ""), str | None):
        raise InputError(f"{path}: not a manifest; expected a mapping, and under 'base' one with a fingerprint")
    return found


def _add_biases(path: Path, found: AdapterWeights, pairs: Pairs, config: dict[str, Any]) -> None:
    if bool(found.biases) != bool(config.get("lora_bias")):
        raise InputError(
            f"{path}: LoRA biases are {'in it' if found.biases else 'missing'}, and lora_bias is "
            f"{config.get('lora_bias', False)} in {CONFIG}"
        )
    for module, bias in found.biases.items():
        pair = pairs.get(module)
        if pair is None or bias.shape != pair.b.shape[:1] or module in found.embeddings or module in found.magnitudes:
            raise InputError(f"{path}: {module} has a LoRA bias, but no LoRA factors of a linear layer that it fits")
        factor = scaling(config, module, pair.rank)
        pairs[module] = with_bias(pair, bias * factor)


def _pair(path: Path, module: str, both: dict[str, torch.Tensor], config: dict[str, Any]) -> LowRankPair:
    if set(both) != {"A", "B"}:
        raise InputError(f"{path}: {module} has no lora_{'A' if 'B' in both else 'B'}")
    a, b = both["A"], both["B"]
    if a.ndim != 2 or b.ndim != 2:
        raise InputError(
            f"{path}: {module} has factors of {a.ndim} dimensions; only linear layers and embeddings are read"
        )
    if not a.shape[0]:
        raise InputError(f"{path}: {module} has factors of rank 0; expected at least 1")
    if a.shape[0] != b.shape[1]:
        raise InputError(f"{path}: {module} has A {tuple(a.shape)} and B {tuple(b.shape)}: ranks differ")
    return LowRankPair(a, b * scaling(config, module, a.shape[0]))


def weights_file(folder: Path) -> Path:
    """The weights of an adapter: safetensors, or where there are none the pickled form that older PEFT wrote."""
    pickled = folder / PICKLED
    return pickled if pickled.is_file() and not (folder / WEIGHTS).exists() else folder / WEIGHTS


def write_adapter(
    folder: Path,
    pairs: Mapping[str, LowRankPair],
    *,
    base: str,
    manifest: dict[str, Any],
    seen: frozenset[str],
    card: str,
    layout: Layout = PLAIN,
    revision: str | None = None,
) -> None:
    """Write pairs as a PEFT LoRA directory with scaling 1; ranks may differ between modules.

    Factors of a mixture's experts are filled up with zeros to the largest rank of the adapter: see :data:`OF_EXPERT`.
    Tensors are float32 and in sorted order, so equal inputs give equal bytes. The configuration is written last: a
    directory that has one is whole.

    Raises:
        InputError: there are LoRA biases beside embeddings, which PEFT does not have in one adapter, or a factor holds
            NaN or infinite values.
    """
    if not pairs:
        raise ValueError("nothing to write: no module has an update")
    if layout.constant and layout.embeddings & set(pairs):
        raise InputError(
            "LoRA biases and updates of embeddings: PEFT knows no adapter with both; give --full_model true"
        )
    if layout.constant and (plain := sorted(set(pairs) - layout.constant)):
        log.warning(
            "PEFT gives every layer of an adapter with lora_bias a bias, and refuses to merge those whose layer in the "
            "base has none into it: load the result without merging, or write --full_model (no bias in %s)",
            shorten(", ".join(plain), 200, placeholder=" …"),
        )
    tensors, ranks = {}, {}
    parts = {
        name: split(both) if name in layout.constant else (both, torch.zeros(both.shape[0]))
        for name, both in pairs.items()
    }
    most = max(pair.rank for pair, _ in parts.values())
    for name, (pair, bias) in sorted(parts.items()):
        a, b = (finite_values(name, factor.to(torch.float32)) for factor in (pair.a, pair.b))
        if OF_EXPERT.search(name):
            a, b = pad(a, (0, 0, 0, most - pair.rank)), pad(b, (0, most - pair.rank))
        ranks[name] = len(a)
        if layout.constant:
            tensors[f"base_model.model.{name}.lora_B.bias"] = finite_values(name, bias.to(torch.float32))
        if name in layout.embeddings:
            tensors[f"base_model.model.{name}.lora_embedding_A"] = b.T.contiguous()
            tensors[f"base_model.model.{name}.lora_embedding_B"] = a.T.contiguous()
        else:
            tensors[f"base_model.model.{name}.lora_A.weight"] = a.contiguous()
            tensors[f"base_model.model.{name}.lora_B.weight"] = b.contiguous()
    write_atomically(folder / WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    write_provenance(folder, manifest=manifest, seen=seen, card=card)
    config = lora_config(ranks, base, layout) | {"revision": revision}
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")


def write_provenance(folder: Path, *, manifest: dict[str, Any], seen: frozenset[str], card: str) -> None:
    """Write the manifest, the hashes of seen prompts and the model card beside an adapter's weights."""
    write_json(folder / MANIFEST, manifest)
    write_text(folder / SEEN, "\n".join(sorted(seen)) + "\n")
    write_text(folder / CARD, card + "\n")


def write_trained(folder: Path, config: Any, state: Mapping[str, torch.Tensor]) -> None:
    """Write what PEFT trained: its configuration and the LoRA weights of a model's state (adapter ``default``)."""
    tensors = {re.sub(r"\.default(?=\.|$)", "", key): value.contiguous() for key, value in sorted(state.items())}
    write_atomically(folder / WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        config.save_pretrained(temporary)
        (Path(temporary) / CONFIG).replace(folder / CONFIG)


def is_trained(key: str) -> bool:
    """Whether a key of a PEFT model's state belongs to the LoRA adapter."""
    return ".lora_" in key


def trained_weights(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The LoRA weights of a LightningModule's state dict, on the CPU, under PEFT's names."""
    return {key.removeprefix("model."): value.cpu() for key, value in state.items() if is_trained(key)}
