"""The base model's weights as they lie on the disk: safetensors files, read one tensor at a time."""

import hashlib
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from src.errors import InputError

INDEX = "model.safetensors.index.json"


SAMPLES = 64


def samples(tensor: torch.Tensor) -> torch.Tensor:
    """(64,) or fewer evenly spaced values of a weight, as it stores them."""
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES]


def fingerprint_of(weights: Iterable[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 over names, shapes and 64 evenly spaced values of each weight, rounded to bfloat16."""
    digest = hashlib.sha256()
    for name, weight in sorted(weights, key=lambda item: item[0]):
        values = samples(weight).to("cpu", torch.bfloat16).view(torch.int16)
        digest.update(f"{name}{tuple(weight.shape)}".encode() + values.numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class BaseWeights:
    """Open weight files.

    Attributes:
        folder: The directory.
        handles: Key to the open file that holds it, in the order of the files.
    """

    folder: Path
    handles: dict[str, Any]

    def get(self, key: str) -> torch.Tensor:
        """One tensor, mapped from the file."""
        return self.handles[key].get_tensor(key)

    def shape(self, key: str) -> tuple[int, ...]:
        """Its shape, without reading it."""
        return tuple(self.handles[key].get_slice(key).get_shape())

    def fingerprint(self) -> str:
        """What :func:`src.models.base.fingerprint` gives the loaded model, where files and model use the same names."""
        return fingerprint_of((key, self.get(key)) for key in self.handles)

    def key_of(self, module: str) -> str | None:
        """The key of a module's weight; hub files of some models leave the first part of the name out."""
        _, _, rest = module.partition(".")
        names = [module, rest, f"model.{module}", f"transformer.{module}"]
        return next((f"{name}.weight" for name in names if f"{name}.weight" in self.handles), None)


@contextmanager
def open_base(name: str) -> Iterator[BaseWeights]:
    """Open the safetensors files of a local directory or a hub repository.

    Raises:
        InputError: there are none, or one is broken.
    """
    folder = _folder(name)
    paths = sorted(folder.glob("model*.safetensors"))
    if not paths:
        raise InputError(f"{folder}: no model*.safetensors in it; expected the weights of the base model")
    with ExitStack() as stack:
        handles: dict[str, Any] = {}
        for path in paths:
            try:
                handle = stack.enter_context(safe_open(path, "pt"))
            except SafetensorError as error:
                raise InputError(f"{path}: not a readable safetensors file ({error})") from None
            handles |= dict.fromkeys(handle.keys(), handle)
        yield BaseWeights(folder, handles)


def _folder(name: str) -> Path:
    path = Path(name)
    if path.is_dir():
        return path
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        from huggingface_hub import snapshot_download

        patterns = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
        try:
            return Path(snapshot_download(name, allow_patterns=patterns))
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:120]
            raise InputError(f"base {name}: no such directory, and no hub model to be fetched now ({reason})") from None
    raise InputError(f"base {name}: no such directory; name one with the base model's safetensors files (--base)")
