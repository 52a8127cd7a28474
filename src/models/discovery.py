"""Which adapters an evaluation covers, and what they are called in its tables."""

import logging
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from src.adapters.peft_files import CONFIG
from src.errors import InputError

log = logging.getLogger(__name__)


def find_baseline(named: str | None, models: Sequence[str]) -> str:
    """The model that differences are taken to: the one named, else the first.

    Raises:
        InputError: no model has that name.
    """
    if named is not None and named not in models:
        raise InputError(f"model.baseline: {named} is not evaluated; expected one of {', '.join(models)}")
    return models[0] if named is None else named


def find_adapters(folder: Path) -> list[Path]:
    """Every adapter directory below a folder, sorted by path; hidden directories are left out.

    Links to directories are followed, after what lies there itself: each directory is found once.
    """
    starts, seen, found = [folder], set(), []
    for start in starts:
        for here, inner, _ in os.walk(start):
            place = os.path.realpath(here)
            inner[:] = sorted(name for name in inner if not name.startswith(".") and place not in seen)
            starts += [path for name in inner if (path := Path(here, name)).is_symlink()]
            if place not in seen and Path(here, CONFIG).exists():
                found.append(Path(here))
            seen.add(place)
    return sorted(found)


def named_adapters(named: Sequence[str], discover: str | None) -> dict[str, str]:
    """Name in tables to path, folders of adapters expanded.

    An adapter of a folder is called by the folder's own name and what follows; where two would be called alike, they
    are called by their whole paths. One that is itself the folder to look in is called by the folder's name.

    Raises:
        InputError: one is named twice.
    """
    found: list[tuple[str, str]] = []
    for name in named:
        if not name:
            raise InputError("model.adapters: an empty name; expected a directory or a hub repository")
        folder = Path(name)
        inner = find_adapters(folder) if folder.is_dir() and not (folder / CONFIG).exists() else []
        if inner:
            found += [(str(folder.name / path.relative_to(folder)), str(path)) for path in inner]
        else:
            found.append((name.rstrip("/"), name))
    if discover is not None and not named:
        root = Path(discover)
        paths = find_adapters(root) if root.is_dir() else []
        log.info("%d adapters found below %s", len(paths), discover)
        found += [(root.resolve().name if path == root else str(path.relative_to(root)), str(path)) for path in paths]
    often = Counter(name for name, _ in found)
    called = [(name if often[name] == 1 else path.rstrip("/"), path) for name, path in found]
    twice = [name for name, count in Counter(name for name, _ in called).items() if count > 1]
    if twice:
        raise InputError(f"model.adapters: {twice[0]} is named twice; expected different adapters")
    return dict(called)
