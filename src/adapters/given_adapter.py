"""An adapter as files: what makes a directory one, and a copy of it."""

import shutil
from pathlib import Path

from src.adapters.base_weights import HUB
from src.adapters.peft_files import CONFIG, FILES, WEIGHTS, fetched, weights_file
from src.errors import InputError
from src.files import sha256_file


def files_of(name: str) -> list[Path]:
    """The files of an adapter's directory that are read; none of a hub repository, which is not fetched.

    Raises:
        InputError: there is no such directory, and it is no name of a repository.
    """
    folder = Path(name)
    if folder.is_dir():
        return [folder / file for file in FILES if (folder / file).is_file()]
    if not HUB.fullmatch(name) or "/" not in name or folder.parent.is_dir():
        raise InputError(f"{name}: no such directory; expected a PEFT adapter ({CONFIG} and {WEIGHTS})")
    return []


def copy_adapter(name: str, target: Path) -> dict[str, str]:
    """Copy what is read of an adapter, fetched from the hub where it lies there.

    Args:
        name: Its directory or hub repository.
        target: Directory to write to; what is in it goes.

    Returns:
        The SHA-256 of its weights and the name of its base.

    Raises:
        InputError: see :func:`src.adapters.peft_files.read_adapter`.
    """
    folder, config = fetched(name, full_rank=True)
    found = {"sha256": sha256_file(weights_file(folder)), "base": str(config.get("base_model_name_or_path"))}
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for file in files_of(str(folder)):
        shutil.copy2(file, target / file.name)
    return found
