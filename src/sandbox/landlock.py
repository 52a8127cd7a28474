"""The second way of isolation, where there are no namespaces: Landlock, by which a process gives up files for good.

What Python needs may be read, one directory may be written, nothing else can be opened, renamed or removed. Landlock
says nothing of a file's mode, owner, times and attributes, nor of what concerns other processes of the same user; for
these there is a longer filter on system calls (:mod:`src.sandbox.calls`). It stays weaker than namespaces: that a
file exists, and how long it is, can still be asked; the directory is on disk, and its size is watched, not capped
(:mod:`src.sandbox.folder`).
docs.kernel.org/userspace-api/landlock.html
"""

import ctypes
import os
import struct
from pathlib import Path

from src.sandbox.libc import LIBC, check, needed_paths

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
VERSION = 1
PATH_BENEATH = 1
WRITE_FILE, READ_FILE, READ_DIR = 1 << 1, 1 << 2, 1 << 3
EXECUTE, MAKE_DEVICE, MAKE_SOCKET, DEVICE_CONTROL = 1, 1 << 6 | 1 << 11, 1 << 9, 1 << 15
RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
"""First version of Landlock (ABI) to all rights over files that it knows."""
NETWORK = {4: 3}
SCOPES = {6: 3}
"""From version 6: no abstract sockets of other processes, no signals to them."""
HANDLED = (RIGHTS, NETWORK, SCOPES)


def restrict_files(folder: str) -> None:
    """Give up all files but those that Python needs and those below the folder.

    Raises:
        OSError: this kernel has no Landlock.
    """
    version = check(LIBC.syscall(CREATE_RULESET, None, 0, VERSION), "landlock")
    handled = [max((value for since, value in each.items() if since <= version), default=0) for each in HANDLED]
    # An older kernel knows the first fields only.
    attributes = struct.pack("=QQQ", *handled)[: 8 if version < 4 else 16 if version < 6 else 24]
    rules = check(LIBC.syscall(CREATE_RULESET, attributes, len(attributes), 0), "landlock_create_ruleset")
    for path in needed_paths():
        _allow(rules, path, READ_FILE | (READ_DIR if path.is_dir() else 0))
    _allow(rules, Path(os.devnull), READ_FILE | WRITE_FILE)
    _allow(rules, Path(folder), handled[0] & ~(EXECUTE | MAKE_DEVICE | MAKE_SOCKET | DEVICE_CONTROL))
    check(LIBC.syscall(RESTRICT_SELF, rules, 0), "landlock_restrict_self")
    os.close(rules)


def _allow(rules: int, path: Path, rights: int) -> None:
    place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    beneath = ctypes.create_string_buffer(struct.pack("=Qi", rights, place), 12)
    check(LIBC.syscall(ADD_RULE, rules, PATH_BENEATH, beneath, 0), f"landlock_add_rule {path}")
    os.close(place)
