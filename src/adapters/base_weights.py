"""The base model's weights as they lie on the disk: safetensors files, read one tensor at a time."""

import glob
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
from src.files import read_json

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
SHARD = re.compile(r"model-\d{5}-of-(\d{5})\.safetensors")
SHARDS = "model-?????-of-?????.safetensors"
BESIDE = ("*.json", "*.model", "*.txt", "*.jinja", "*.py", "*.tiktoken", "LICEN*", "NOTICE*")
"""What of a base's repository is fetched beside its weights."""
HUB = re.compile(r"[\w.-]+(/[\w.-]+)?")
"""A hub id, or a name in the current directory."""
EARLIER_PREFIX, LATER_PREFIX = "language_model.model.", "model.language_model."
"""How names of text layers begin in many models that also see or hear, before transformers 4.52 and since."""
SAMPLES = 64


def on_hub(name: str) -> bool:
    """Whether a name is that of a hub repository: it has the form, and nothing here has that name."""
    return HUB.fullmatch(name) is not None and not Path(name).exists()


def samples(tensor: torch.Tensor) -> torch.Tensor:
    """(64,) or fewer evenly spaced values of a weight, as it stores them."""
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES]


def fingerprint_of(weights: Iterable[tuple[str, torch.Tensor]], loaded: torch.dtype | None = None) -> str:
    """SHA-256 over names, shapes and 64 evenly spaced values, rounded to bfloat16, of weights sorted by name.

    Of what is no real number only the name and the shape count.

    Args:
        weights: Names and weights.
        loaded: Number format to round to first.
    """
    digest = hashlib.sha256()
    for name, weight in weights:
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        if weight.is_floating_point():
            values = samples(weight).to(loaded or weight.dtype)
            digest.update(values.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
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

    def fingerprint(self, loaded: torch.dtype | None = None) -> str:
        """What :func:`src.models.base.fingerprint` gives the loaded model, where files and model use the same names.

        Args:
            loaded: Number format that the model was loaded in; unset is any that keeps what bfloat16 keeps.
        """
        return fingerprint_of(((key, self.get(key)) for key in sorted(self.handles)), loaded)

    def key_of(self, module: str) -> str | None:
        """The key of a module's weight.

        Hub files of some models leave the first part of the name out. Those of models that also see or hear have one
        part more than the text model has that is loaded from them, and keep names of before transformers 4.52.
        """
        _, _, rest = module.partition(".")
        names = [module, rest, f"model.{module}", f"transformer.{module}", f"language_model.{module}"]
        names += [module.replace(LATER_PREFIX, EARLIER_PREFIX, 1), LATER_PREFIX + module.removeprefix("model.")]
        names += [module.replace(LATER_PREFIX, "model.", 1)]
        return next((f"{name}.weight" for name in names if f"{name}.weight" in self.handles), None)

    def bias_key_of(self, module: str) -> str:
        """The key of a module's bias, there or not: a head with the embedding's weight may have one of its own."""
        return (self.key_of(module) or module).removesuffix(".weight") + ".bias"


@contextmanager
def open_base(name: str, revision: str | None = None) -> Iterator[BaseWeights]:
    """Open the safetensors files of a local directory or a hub repository.

    Args:
        name: The directory or the repository's id.
        revision: Git revision of the repository; a directory has none.

    Raises:
        InputError: there are none, or one is broken or missing.
    """
    folder = _base_folder(name, revision)
    with ExitStack() as stack:
        handles: dict[str, Any] = {}
        for path, keys in weight_files(folder).items():
            try:
                handle = stack.enter_context(safe_open(path, "pt"))
            except SafetensorError as error:
                raise InputError(f"{path}: not a readable safetensors file ({error})") from None
            held = list(handle.keys())
            if missing := keys - set(held):
                raise InputError(f"{path}: has no {min(missing)}, which {folder / INDEX} says is in it")
            handles |= dict.fromkeys(held, handle)
        yield BaseWeights(folder, handles)


def _base_folder(name: str, revision: str | None) -> Path:
    """A base's directory; of a hub repository only the files that :func:`weight_files` takes are fetched.

    Repositories may hold their weights once more in other files, as large as those.
    """
    at = "" if revision is None else f" at revision {revision}"

    def fetched(*weights: str) -> Path:
        return local_folder(
            name,
            [*BESIDE, *weights],
            absent=f"base {name}: no such directory; name one with the base model's safetensors files (--base)",
            unfetched=f"base {name}{at}: no such directory, and no hub model to be fetched now",
            revision=revision,
        )

    folder = fetched(WEIGHTS)
    if Path(name).is_dir() or (folder / WEIGHTS).is_file():
        return folder
    if (folder / INDEX).is_file():
        # What an index names outside the repository is none of its files.
        inside = [path.relative_to(folder).as_posix() for path in _indexed(folder) if path.is_relative_to(folder)]
        return fetched(*map(glob.escape, inside))
    return fetched(SHARDS)


def weight_files(folder: Path) -> dict[Path, set[str]]:
    """The files that make up the model in a directory, and what its index says is in each.

    As transformers takes them: ``model.safetensors``; without it those of the index. Without either, a whole set of
    shards. Other files beside them (``model_fp16.safetensors``, an older set) are not the model.

    Raises:
        InputError: there are none, or one of them is missing.
    """
    if (folder / WEIGHTS).is_file():
        files: dict[Path, set[str]] = {folder / WEIGHTS: set()}
    elif (folder / INDEX).is_file():
        files = _indexed(folder)
    else:
        files = {path: set() for path in _unindexed(folder)}
    for path in files:
        if not path.is_file():
            raise InputError(f"{path}: no such file; expected a part of the base model's weights")
    return files


def _indexed(folder: Path) -> dict[Path, set[str]]:
    index = read_json(folder / INDEX, "the index of the base model's weights")
    where = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(where, dict) or not where or not all(isinstance(name, str) for name in where.values()):
        raise InputError(f"{folder / INDEX}: no weight_map; expected weights and the files that they are in")
    files: dict[Path, set[str]] = {folder / name: set() for name in sorted(set(where.values()))}
    for key, name in where.items():
        files[folder / name].add(key)
    return files


def _unindexed(folder: Path) -> list[Path]:
    """Every shard of the one set that there is, also of those that are missing."""
    counts = {found[1] for path in folder.glob("model-*.safetensors") if (found := SHARD.fullmatch(path.name))}
    if not counts:
        raise InputError(
            f"{folder}: no model*.safetensors in it that makes a model; expected the weights of the base model: "
            f"{WEIGHTS}, {INDEX} with its files, or model-00001-of-….safetensors and so on"
        )
    if len(counts) > 1:
        raise InputError(f"{folder}: shards of {len(counts)} sets and no {INDEX}; expected one model's weights")
    count = counts.pop()
    return [folder / f"model-{number:05d}-of-{count}.safetensors" for number in range(1, int(count) + 1)]


def local_folder(name: str, patterns: list[str], *, absent: str, unfetched: str, revision: str | None = None) -> Path:
    """A directory of this name, else that of the hub repository of this name, fetched.

    Args:
        name: A path or ``owner/repository``.
        patterns: Files to fetch.
        absent: What to say where it can be neither.
        unfetched: What to say where the hub does not give it; the reason follows.
        revision: Git revision of the repository; unset is its main branch.

    Raises:
        InputError: it is not there.
    """
    path = Path(name)
    if path.is_dir():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise InputError(absent)
    from huggingface_hub import snapshot_download

    from src.hub import UNREACHABLE, reason

    at: dict[str, Any] = {} if revision is None else {"revision": revision}
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, **at))
    except UNREACHABLE as error:
        # Without the hub, a copy that lacks any file of these names (a licence): what is needed is looked for later.
        if (kept := getattr(error, "snapshot_path", None)) is not None and Path(kept).is_dir():
            return Path(kept)
        raise InputError(f"{unfetched} ({reason(error)})") from None
