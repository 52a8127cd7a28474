"""Data sets of the hub, at the revision that was asked for.

Where the hub cannot be reached ``datasets`` takes its newest copy, of whichever revision: here the copy is that of the
revision, or there is none.
"""

import re
from pathlib import Path
from typing import Any

from src.errors import InputError

COMMIT = re.compile("[0-9a-f]{40}")


def load_hub_set(name: str, *, subset: str | None, split: str, revision: str | None) -> Any:
    """A table of a data set of the hub.

    Args:
        name: The data set's name.
        subset: Its configuration's name.
        split: Its split, as ``train[:500]``.
        revision: Branch, tag or commit; unset, ``main``.

    Raises:
        InputError: the hub cannot be reached, and no copy is known to be of that revision.
    """
    import datasets
    from datasets.packaged_modules.cache.cache import Cache

    builder = datasets.load_dataset_builder(name, subset, revision=revision)
    if isinstance(builder, Cache):
        builder = _kept(builder, name, revision)
    builder.download_and_prepare()
    return builder.as_dataset(split=split)


def _kept(builder: Any, name: str, revision: str | None) -> Any:
    """The copy of a revision, in place of the newest one."""
    *_, config, version, newest = Path(builder.cache_dir).parts
    folder = Path(builder.cache_dir).parent
    copies = sorted(path.name for path in folder.iterdir() if path.is_dir() and COMMIT.fullmatch(path.name))
    commit = _commit(name, revision)
    if commit is None and revision is None and copies in ([], [newest]):
        # One copy, or one of a form that says no commit.
        return builder
    if commit not in copies:
        known = f"copies are kept of {', '.join(copies)}" if copies else "copies of no known commit are kept"
        asked = f"revision {revision or 'main'}" + (f" ({commit})" if commit not in (None, revision) else "")
        raise InputError(f"{name}: the hub cannot be reached, and {known}; expected one of {asked}, or name its commit")
    return type(builder)(
        dataset_name=builder.dataset_name, repo_id=name, config_name=config, version=version, hash=commit
    )


def _commit(name: str, revision: str | None) -> str | None:
    """The commit of a revision as the hub's cache knows it."""
    from huggingface_hub.constants import HF_HUB_CACHE

    if revision is not None and COMMIT.fullmatch(revision):
        return revision
    path = Path(HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}" / "refs" / (revision or "main")
    return path.read_text(encoding="utf-8").strip() if path.is_file() else None
