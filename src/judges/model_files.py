"""What stands behind the name of a judge that is a model: the content of its files."""

import hashlib
from functools import cache
from pathlib import Path

from src.errors import InputError, one_line
from src.files import UNLOADABLE, sha256_file
from src.hub import UNREACHABLE

SUFFIXES = (".json", ".safetensors", ".bin", ".model", ".txt", ".jinja")
"""Configuration, weights, tokenizer and chat template."""


def model_content(name: str, revision: str | None) -> str:
    """Digest of the files of a local model, or the commit that a hub id stands for.

    Raises:
        InputError: nothing of that name has a configuration.
    """
    folder = Path(name)
    if folder.is_dir():
        files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES and path.is_file())
        return _digest(tuple((str(path.resolve()), *_state(path)) for path in files))
    return _commit(name, revision)


@cache
def _commit(name: str, revision: str | None) -> str:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
    except (*UNLOADABLE, *UNREACHABLE) as error:
        raise InputError(f"judge {name}: the model cannot be loaded ({one_line(error)})") from None
    return str(getattr(config, "_commit_hash", None) or "")


def _state(path: Path) -> tuple[int, int]:
    state = path.stat()
    return state.st_size, state.st_mtime_ns


@cache
def _digest(files: tuple[tuple[str, int, int], ...]) -> str:
    """Digest of files, read once as long as size and time of change stay."""
    digest = hashlib.sha256()
    for path, _, _ in files:
        digest.update(f"{Path(path).name}{sha256_file(Path(path))}".encode())
    return digest.hexdigest()
