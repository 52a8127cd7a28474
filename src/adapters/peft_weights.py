"""The weights file of a PEFT adapter, sorted by what its tensors are."""

import logging
import pickle
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from src.errors import InputError, one_line

ROOT = "base_model.model."
KEY = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<kind>embedding_)?(?P<factor>[AB])(\.weight)?$")
BIAS = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_B\.bias$")
MAGNITUDE = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_magnitude_vector(\.weight)?$")
FROZEN_COPY = ".base_layer.weight"
FORMATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Number formats of which every tensor must be one."""
UNREADABLE = (
    RuntimeError,
    pickle.UnpicklingError,
    EOFError,
    OSError,
    struct.error,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
)
"""What torch.load raises for files of other bytes."""
log = logging.getLogger(__name__)


@dataclass
class AdapterWeights:
    """Tensors of an adapter, in float32 at least, by module.

    Attributes:
        factors: ``A`` and ``B`` of each module.
        embeddings: Modules whose factors are those of an embedding.
        biases: (O,) biases of B (``lora_bias``).
        magnitudes: (O,) DoRA magnitudes.
        saved: (O, I) weights of fully trained modules, as they are stored.
        saved_biases: (O,) their biases.
        copies: Copies of the frozen base's weights, as they are stored.
    """

    factors: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    embeddings: set[str] = field(default_factory=set)
    biases: dict[str, torch.Tensor] = field(default_factory=dict)
    magnitudes: dict[str, torch.Tensor] = field(default_factory=dict)
    saved: dict[str, torch.Tensor] = field(default_factory=dict)
    saved_biases: dict[str, torch.Tensor] = field(default_factory=dict)
    copies: dict[str, torch.Tensor] = field(default_factory=dict)


def read_weights(path: Path, modules_to_save: list[str]) -> AdapterWeights:
    """Read and sort a weights file.

    Args:
        path: The file.
        modules_to_save: Ends of the names of fully trained modules, from the configuration (PEFT's rule).

    Raises:
        InputError: the file is missing or broken, a tensor is none of these, of another number format, or holds NaN or
            infinite values.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected the weights of a PEFT LoRA adapter")
    found = AdapterWeights()
    for key, tensor in _tensors(path):
        if key.endswith(FROZEN_COPY):
            found.copies[key.removeprefix(ROOT).removesuffix(FROZEN_COPY)] = tensor
        else:
            _sort(path, key, _finite(path, key, tensor), found, modules_to_save)
    if not found.factors:
        raise InputError(f"{path}: no LoRA factors in it")
    return found


def _tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a safetensors file, one at a time, or of a pickled file, from which nothing else is loaded."""
    if path.suffix != ".bin":
        try:
            with safe_open(path, "pt") as handle:
                for key in handle.keys():  # noqa: SIM118 - not a mapping
                    yield key, handle.get_tensor(key)
        except SafetensorError as error:
            raise InputError(f"{path}: not a readable safetensors file ({error})") from None
        return
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise InputError(f"{path}: not a readable file of PyTorch tensors ({one_line(error)[:120]})") from None
    whole = isinstance(state, dict) and all(isinstance(key, str) for key in state)
    if not whole or not all(isinstance(v, torch.Tensor) and v.layout is torch.strided for v in state.values()):
        raise InputError(f"{path}: not a mapping from names to tensors; expected the weights of a PEFT LoRA adapter")
    yield from state.items()


def _sort(path: Path, key: str, tensor: torch.Tensor, found: AdapterWeights, saved: list[str]) -> None:
    factor, magnitude, bias = KEY.match(key), MAGNITUDE.match(key), BIAS.match(key)
    module, _, part = key.removeprefix(ROOT).rpartition(".")
    fully = module.endswith(tuple(saved))
    if factor is not None:
        found.factors.setdefault(factor["module"], {})[factor["factor"]] = tensor
        found.embeddings |= {factor["module"]} if factor["kind"] else set()
    elif bias is not None:
        found.biases[bias["module"]] = tensor
    elif magnitude is not None:
        found.magnitudes[magnitude["module"]] = tensor
    elif fully and part == "weight" and tensor.ndim == 2:
        found.saved[module] = tensor
    elif fully and part == "bias" and tensor.ndim == 1:
        found.saved_biases[module] = tensor
    elif fully:
        raise InputError(f"{path}: {key}: of modules_to_save only linear layers and embeddings can be merged")
    else:
        raise InputError(f"{path}: {key} is not a LoRA factor of a linear layer or an embedding")


def _finite(path: Path, key: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float32 at least."""
    if tensor.dtype not in FORMATS:
        raise InputError(f"{path}: {key} is stored as {tensor.dtype}; expected float16, bfloat16, float32 or float64")
    if not torch.isfinite(tensor).all():
        raise InputError(f"{path}: {key} holds NaN or infinite values")
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
