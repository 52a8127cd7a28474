"""Which adapters an evaluation covers, and what they are called in its tables."""

import logging
from collections.abc import Sequence
from pathlib import Path

from src.adapters.peft_files import CONFIG

log = logging.getLogger(__name__)


def find_adapters(folder: Path) -> list[Path]:
    """Every adapter directory below a folder, sorted by path; hidden directories are left out."""
    found = [path.parent for path in folder.rglob(CONFIG)]
    return sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts))


def named_adapters(named: Sequence[str], discover: str | None) -> dict[str, str]:
    """Name in tables to path, folders of adapters expanded."""
    found: dict[str, str] = {}
    for name in named:
        folder = Path(name)
        inner = find_adapters(folder) if folder.is_dir() and not (folder / CONFIG).exists() else []
        if inner:
            found |= {str(folder.name / path.relative_to(folder)): str(path) for path in inner}
        else:
            found[name.rstrip("/")] = name
    if discover is not None and not named:
        root = Path(discover)
        paths = find_adapters(root) if root.is_dir() else []
        log.info("%d adapters found below %s", len(paths), discover)
        found |= {str(path.relative_to(root)): str(path) for path in paths}
    return found
