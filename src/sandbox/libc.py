"""The C library, and the paths that a Python program without packages needs; shared by the ways of isolation."""

import ctypes
import os
import sys
from pathlib import Path

LIBC = ctypes.CDLL(None, use_errno=True)
NOBODY = 65534
PR_SET_DUMPABLE = 4
SYSTEM = (
    "/lib /lib32 /lib64 /usr/lib /usr/lib32 /usr/lib64 /nix/store /gnu/store /usr/share/zoneinfo /etc/localtime "
    "/etc/ld.so.cache"
)
"""Shared libraries and time zones."""


def check(result: int, what: str) -> int:
    """The result of a C call; OSError where it failed."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def needed_paths() -> list[Path]:
    """What Python reads: its standard library, the libraries beside it and those of the system; existing ones only."""
    library = [path for path in sys.path if Path(path).is_absolute()]
    named = [*SYSTEM.split(), str(Path(sys.base_prefix, "lib")), *library]
    return [path for path in map(Path, named) if path.exists()]


def anyone_can_read(path: str) -> bool:
    """Whether a user without rights can read a file: otherwise the standard library would be out of reach."""
    place = Path(path).resolve()
    return bool(place.stat().st_mode & 0o4) and all(parent.stat().st_mode & 0o1 for parent in place.parents)


def leave_root(folder: str) -> None:
    """Leave root for the user nobody, where that user can read Python, and give it the program's directory."""
    if os.getuid() != 0 or not anyone_can_read(os.__file__):
        return
    os.chown(folder, NOBODY, NOBODY)
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    LIBC.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)  # a change of user makes /proc/self unwritable
