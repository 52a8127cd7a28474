"""Files that are whole or absent: atomic writes, output directories, hashes.

A writer fills a temporary sibling, syncs it and renames it over the target. A crash, a full disk or Ctrl-C leaves the
target as it was.
"""

import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from src.errors import InputError, one_line
from src.processes import UMASK

log = logging.getLogger(__name__)

PROJECT = Path(__file__).resolve().parents[1]
"""Where this project lies: files that it ships are found from any working directory."""
UNLOADABLE = (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError)
"""What transformers raises for a model that it cannot load, packages that are missing among it."""


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write(temporary)`` and rename the result to ``path`` once it is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        _written(write, temporary, path)
        temporary.chmod(0o666 & ~UMASK)
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _written(write: Callable[[Path], object], temporary: Path, path: Path) -> None:
    """Call the writer; safetensors reports the system's errors in a class of its own."""
    try:
        write(temporary)
    except OSError as error:
        # A write that fails does not say where.
        error.filename = error.filename or str(path)
        raise
    except SafetensorError as error:
        code = re.search(r"\(os error (\d+)\)", str(error))
        if code is None:
            raise
        number = int(code[1])
        raise OSError(number, os.strerror(number), str(path)) from error


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, two-space indented, keys in the order given."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, what: str) -> Any:
    """Read JSON; a missing or broken file is an :class:`InputError` that says ``what`` was expected there."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path}: no such file; expected {what}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({one_line(error)}); expected {what}") from None


def has_results(path: Path, beside: frozenset[str] = frozenset()) -> bool:
    """Whether there is a file, or a directory with more than hidden files and those ``beside``."""
    if path.is_dir():
        return any(entry.name not in beside and not entry.name.startswith(".") for entry in path.iterdir())
    return path.exists()


_FREE: set[Path] = set()
"""Outputs that had no results at their check and may replace none: asked again when a directory is put there."""


def check_output(path: Path, *, overwrite: bool, beside: frozenset[str] | None = None) -> None:
    """Refuse a non-empty directory or an existing file, before any work is done.

    Args:
        path: The output.
        overwrite: Whether it may exist.
        beside: Names in the directory that are no results; hidden files never are. Unset where the directory is to be
            replaced as a whole (:func:`new_directory`).

    Raises:
        InputError: ``path`` exists and ``overwrite`` is false, it is to lie in a file, or it cannot be replaced.
    """
    try:
        place = path.resolve()
    except (RuntimeError, ValueError) as error:
        raise InputError(f"--output {str(path)!r}: no usable path ({error})") from None
    above = next((folder for folder in place.parents if folder.exists()), None)
    if above is None:
        raise InputError(f"--output {path}: the root of all files; name a directory")
    if not above.is_dir():
        raise InputError(f"--output {path}: {above} is a file; name a path in a directory")
    if above == place.parent and os.access(above, os.W_OK):
        _clear_leftovers(place)
    if beside is None:
        _check_replaceable(path, place)
    if has_results(path, beside or frozenset()) and not overwrite:
        raise InputError(f"--output {path}: exists already; pass --overwrite true to replace it, or name another path")
    (_FREE.discard if overwrite else _FREE.add)(place)


def _check_replaceable(path: Path, place: Path) -> None:
    if Path.cwd().is_relative_to(place):
        raise InputError(f"--output {path}: the working directory lies there and cannot be replaced; name another one")
    if os.path.ismount(place):
        raise InputError(f"--output {path}: a mount point, which cannot be replaced; name a directory in it")


def check_apart(output: Path, inputs: Iterable[str]) -> None:
    """Refuse an output that is one of the inputs, or holds one: writing it would replace what is read.

    Inputs are names of files or directories with files; those that are no path here, such as hub ids, are left out.

    Raises:
        InputError: an input would be lost.
    """
    place = output.resolve()
    for name in inputs:
        read = Path(name)
        files = [read, *(read.iterdir() if read.is_dir() else [])] if read.exists() else []
        if any(file.resolve().is_relative_to(place) for file in files):
            raise InputError(f"--output {output}: {name}, which is read, lies there; name another directory")


UNFINISHED = ".unfinished.json"
"""Hidden file of an output whose run has not come to its end: its settings; null where it is to replace results."""


def begin_output(path: Path, settings: Any) -> None:
    """Mark an output without results as that of one run (by its settings, JSON), which may go on there after a kill."""
    write_json(path / UNFINISHED, settings)


def is_begun(path: Path, settings: Any) -> bool:
    """Whether what lies in an output was left by a run with these settings that was killed before its end.

    Raises:
        InputError: the mark cannot be read.
    """
    mark = path / UNFINISHED
    return mark.is_file() and bool(read_json(mark, "settings of a run") == json.loads(json.dumps(settings)))


def end_output(path: Path) -> None:
    """Take the mark away: what lies there is a result."""
    (path / UNFINISHED).unlink(missing_ok=True)


@contextmanager
def held_output(path: Path) -> Iterator[None]:
    """Make an output and hold it: as long as this process is in the block and alive, no other one may.

    The directory itself is locked, so no file is left. File systems that lock no directories leave the output open.

    Raises:
        InputError: another process holds it.
    """
    place = path.resolve()  # of a link that leads nowhere, where it leads
    place.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(place, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise InputError(f"--output {path}: another run writes to it; wait for its end or name another path") from None
    except OSError:
        log.warning("%s cannot be locked here: start no second run that writes to it", path)
    try:
        yield
    finally:
        os.close(descriptor)


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling directory that becomes ``path`` when the block succeeds (replacing what is there).

    Where ``path`` is a link, what it points to is replaced.

    Raises:
        InputError: ``path`` cannot be replaced, or not in the end (another run has written there since the check): the
            new directory then stays beside it.
    """
    place = path.resolve()
    _check_replaceable(path, place)
    place.parent.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(place)
    temporary, lock = _locked_sibling(place)
    try:
        yield temporary
        temporary.chmod(0o777 & ~UMASK)
        _put(temporary, place)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        _unlock(lock)


def _put(temporary: Path, place: Path) -> None:
    """Rename a directory over what is there, which Ctrl-C puts back, as an error does: then the new one lies beside."""
    old, lock = temporary.with_suffix(".old"), _lock(place)
    try:
        if place in _FREE and has_results(place):
            raise FileExistsError("another run has put its result there meanwhile, which stays")
        if place.exists():
            place.rename(old)
        temporary.rename(place)
    except BaseException as error:
        if old.exists() and not place.exists():
            old.rename(place)
        if not isinstance(error, OSError):
            raise
        kept = temporary.rename(place.with_name(temporary.stem[1:]))
        raise InputError(f"--output {place}: {error.strerror or error}; the new result is in {kept}") from None
    finally:
        _unlock(lock)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _locked_sibling(place: Path) -> tuple[Path, int | None]:
    """A temporary directory, and the lock that says that this process is alive."""
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{place.name}.", suffix=".tmp", dir=place.parent))
    except OSError as error:
        error.filename = str(place)
        raise
    return temporary, _lock(temporary)


def _clear_leftovers(place: Path) -> None:
    """Remove what runs that were killed have left beside an output; an old output that one had moved aside comes back.

    What a running process works on is locked.
    """
    ours = re.compile(rf"\.{re.escape(place.name)}\.[a-z0-9_]{{8}}\.(tmp|old)")
    for path in sorted(entry for entry in place.parent.iterdir() if ours.fullmatch(entry.name)):
        lock = _lock(path)
        if lock is not None and path.suffix == ".old" and not place.exists():
            path.rename(place)
        elif lock is not None and (path.suffix == ".old" or path.is_dir()):
            _remove(path)
        _unlock(lock)


def _lock(path: Path) -> int | None:
    """Lock a file or directory until this process ends, however it ends; nothing where that cannot be had."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _unlock(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)
