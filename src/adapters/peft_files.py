"""PEFT LoRA directories, read to and written from low-rank pairs. The only place that knows PEFT's key names."""

import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from src.adapters.pairs import LowRankPair, Pairs
from src.errors import InputError
from src.files import read_json, sha256_file, write_atomically

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MANIFEST, SEEN, CARD = "manifest.json", "seen_prompts.txt", "README.md"
KEY = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight$")
UNSUPPORTED = {"use_dora": "DoRA", "lora_bias": "LoRA biases", "modules_to_save": "fully trained modules"}


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
    """

    name: str
    pairs: Pairs
    base: str
    sha256: str
    manifest: dict[str, Any] = field(default_factory=dict)
    seen: frozenset[str] = frozenset()

    @property
    def fingerprint(self) -> str | None:
        """Fingerprint of the base that it was trained on, where known."""
        return self.manifest.get("base", {}).get("fingerprint")


def read_adapter(folder: str | Path) -> Adapter:
    """Read a PEFT LoRA directory, or a hub repository of that form.

    Raises:
        InputError: a file is missing or broken, or the adapter has parts that low-rank pairs cannot express.
    """
    path = _local_folder(folder)
    config = read_json(path / CONFIG, "the configuration of a PEFT LoRA adapter")
    _check_config(path, config)
    factors = _read_factors(path / WEIGHTS)
    pairs: Pairs = {}
    for module, both in factors.items():
        if set(both) != {"A", "B"}:
            raise InputError(f"{path / WEIGHTS}: {module} has no lora_{'A' if 'B' in both else 'B'}")
        a, b = both["A"], both["B"]
        if a.shape[0] != b.shape[1]:
            raise InputError(f"{path / WEIGHTS}: {module} has A {tuple(a.shape)} and B {tuple(b.shape)}: ranks differ")
        pairs[module] = LowRankPair(a, b * _scaling(config, module, a.shape[0]))
    manifest = read_json(path / MANIFEST, "a manifest") if (path / MANIFEST).exists() else {}
    seen = frozenset((path / SEEN).read_text().split()) if (path / SEEN).exists() else frozenset()
    base = config.get("base_model_name_or_path") or ""
    return Adapter(str(folder), pairs, base, sha256_file(path / WEIGHTS), manifest, seen)


def _local_folder(folder: str | Path) -> Path:
    path = Path(folder)
    if path.is_dir():
        return path
    name = str(folder)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS, MANIFEST, SEEN]))
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:120]
            raise InputError(
                f"{name}: neither an adapter directory nor a hub adapter that can be fetched now ({reason})"
            ) from None
    raise InputError(f"{name}: no such directory; expected a PEFT adapter ({CONFIG} and {WEIGHTS})")


def _check_config(path: Path, config: dict[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise InputError(f"{path / CONFIG}: peft_type is {kind!r}; expected 'LORA'")
    for key, what in UNSUPPORTED.items():
        if config.get(key):
            raise InputError(f"{path / CONFIG}: {key} is set; {what} cannot be written as a low-rank update")
    if config.get("bias", "none") != "none":
        raise InputError(f"{path / CONFIG}: bias is {config['bias']!r}; trained biases are not a low-rank update")
    if config.get("fan_in_fan_out"):
        raise InputError(f"{path / CONFIG}: fan_in_fan_out is set; transposed layers (Conv1D) are not supported yet")


def _read_factors(path: Path) -> dict[str, dict[str, torch.Tensor]]:
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected the weights of a PEFT LoRA adapter")
    factors: dict[str, dict[str, torch.Tensor]] = {}
    try:
        with safe_open(path, "pt") as handle:
            for key in handle.keys():  # noqa: SIM118 - not a mapping
                match = KEY.match(key)
                if match is None:
                    raise InputError(f"{path}: {key} is not a LoRA factor of a linear layer")
                tensor = handle.get_tensor(key)
                if not torch.isfinite(tensor).all():
                    raise InputError(f"{path}: {key} holds NaN or infinite values")
                factors.setdefault(match["module"], {})[match["factor"]] = tensor.to(
                    torch.promote_types(tensor.dtype, torch.float32)
                )
    except SafetensorError as error:
        raise InputError(f"{path}: not a readable safetensors file ({error})") from None
    if not factors:
        raise InputError(f"{path}: no LoRA factors in it")
    return factors


def _pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the end of the module's name."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _scaling(config: dict[str, Any], module: str, rank: int) -> float:
    alpha = _pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank


def write_adapter(
    folder: Path,
    pairs: Mapping[str, LowRankPair],
    *,
    base: str,
    manifest: dict[str, Any],
    seen: frozenset[str],
    card: str,
) -> None:
    """Write pairs as a PEFT LoRA directory with scaling 1; ranks may differ between modules.

    Tensors are float32 and in sorted order, so equal inputs give equal bytes. The configuration is written last: a
    directory that has one is whole.
    """
    if not pairs:
        raise ValueError("nothing to write: no module has an update")
    tensors = {}
    for name, pair in sorted(pairs.items()):
        tensors[f"base_model.model.{name}.lora_A.weight"] = pair.a.to(torch.float32).contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = pair.b.to(torch.float32).contiguous()
    write_atomically(folder / WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    write_provenance(folder, manifest=manifest, seen=seen, card=card)
    config = lora_config({name: pair.rank for name, pair in sorted(pairs.items())}, base)
    write_atomically(folder / CONFIG, lambda path: path.write_text(json.dumps(config, indent=2) + "\n"))


def write_provenance(folder: Path, *, manifest: dict[str, Any], seen: frozenset[str], card: str) -> None:
    """Write the manifest, the hashes of seen prompts and the model card beside an adapter's weights."""
    files = {
        MANIFEST: json.dumps(manifest, indent=2, ensure_ascii=False),
        SEEN: "\n".join(sorted(seen)),
        CARD: card,
    }
    for name, text in files.items():
        write_atomically(folder / name, lambda path, text=text: path.write_text(text + "\n", "utf-8"))  # type: ignore[misc]


def write_trained(folder: Path, config: Any, state: Mapping[str, torch.Tensor]) -> None:
    """Write what PEFT trained: its configuration and the LoRA weights of a model's state (adapter ``default``)."""
    tensors = {key.replace(".default.", "."): value.contiguous() for key, value in sorted(state.items())}
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


def lora_config(ranks: Mapping[str, int], base: str) -> dict[str, Any]:
    """PEFT's configuration of an adapter with these ranks and scaling 1."""
    from peft import LoraConfig, TaskType

    most = max(ranks.values())
    other = {re.escape(name): rank for name, rank in ranks.items() if rank != most}
    config = LoraConfig(
        r=most,
        lora_alpha=most,
        target_modules=list(ranks),
        rank_pattern=dict(other),
        alpha_pattern=dict(other),
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=base,
        inference_mode=True,
    ).to_dict()
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
