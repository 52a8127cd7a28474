"""The private directory of a program, whatever the program put there: how much it takes, and how it is removed."""

import os
import stat
import time
from contextlib import suppress
from pathlib import Path

BLOCK = 4096
"""What a file or directory takes at least, in bytes: there is no limit on their number."""
PATIENCE = 1.0
"""Seconds that a process which was just killed may take to be gone."""


def takes_more(folder: str, pid: int, most: int) -> bool:
    """Whether a program's files on disk take more than ``most`` bytes; what cannot be looked into does.

    Args:
        folder: The program's directory, links resolved.
        pid: Its process, which may keep files that are in no directory any more.
        most: Bytes of all files, and of each.
    """
    left = [folder]
    try:
        total = _kept(folder, pid, most)
        while left and total <= most:
            with suppress(FileNotFoundError), os.scandir(left.pop()) as found:
                for entry in found:
                    total += _size(entry.path, left)
    except OSError:
        # No right to look, or a path too long to be named.
        return True
    return total > most


def _size(path: str, directories: list[str]) -> int:
    """Bytes that a file or directory takes; a directory is noted."""
    with suppress(FileNotFoundError):
        state = os.lstat(path)
        if stat.S_ISDIR(state.st_mode):
            directories.append(path)
        return max(BLOCK, state.st_blocks * 512)
    return 0


def _kept(folder: str, pid: int, most: int) -> int:
    """Bytes of the files in no directory that a process has open or mapped; one only mapped does not tell its size."""
    sizes: dict[int, int] = {}
    with suppress(FileNotFoundError, ProcessLookupError):
        # The first thread may have ended before the others.
        thread = Path(f"/proc/{pid}/task", os.listdir(f"/proc/{pid}/task")[-1])
        for line in (thread / "maps").read_bytes().split(b"\n"):
            if line.endswith(b" (deleted)") and line.split(maxsplit=5)[5].startswith(os.fsencode(folder)):
                sizes[int(line.split()[4])] = most
        for descriptor in (thread / "fd").iterdir():
            with suppress(FileNotFoundError):
                state = descriptor.stat()
                if stat.S_ISREG(state.st_mode) and state.st_nlink == 0:
                    sizes[state.st_ino] = max(BLOCK, state.st_blocks * 512)
    return sum(sizes.values())


def remove(folder: str) -> None:
    """Remove a directory and all below it.

    Raises:
        OSError: it cannot be removed, or a process still writes there.
    """
    end = time.monotonic() + PATIENCE
    while os.path.lexists(folder):
        try:
            _remove(folder)
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.01)


def _remove(folder: str) -> None:
    """Empty and remove a directory; each one in it is moved up first, so that no depth makes a path too long."""
    left = [folder]
    while left:
        place = left.pop()
        os.chmod(place, 0o700)
        for entry in list(os.scandir(place)):
            if entry.is_dir(follow_symlinks=False):
                os.chmod(entry.path, 0o700)
                left.append(os.path.join(folder, os.urandom(16).hex()))
                os.rename(entry.path, left[-1])
            else:
                os.unlink(entry.path)
        if place != folder:
            os.rmdir(place)
    os.rmdir(folder)
