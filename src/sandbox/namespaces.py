"""The stronger way of isolation: a world without network, other processes and other users, with a file tree of its own.

The tree holds what Python needs, read-only, the null device, and one writable directory in memory. Whatever else the
machine has, such as the home of the user who runs this, is not there.
"""

import ctypes
import os
from pathlib import Path

from src.sandbox.libc import LIBC, check, needed_paths

NAMESPACES = 0x10000000 | 0x20000000 | 0x40000000 | 0x00020000 | 0x08000000  # user, process, network, mount, IPC
MOUNT_PRIVATE = 0x4000 | 0x40000
BIND = 0x1000 | 0x4000
DETACH = 2
READ_ONLY, NO_SUID, NO_DEVICES = 1, 2, 4
RECURSIVE = 0x8000
MOUNT_SETATTR = 442
FOLDER = "/program"
"""Where a program runs, in its own tree."""
MOST_FILES = 4096


class MountAttributes(ctypes.Structure):
    """The kernel's ``struct mount_attr``."""

    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "user")]


def enter_namespaces(folder: str, size_mb: int) -> str:
    """Leave the machine's network, processes, users and files.

    Args:
        folder: An empty directory; the new tree is built over it.
        size_mb: Size of the writable directory, in MiB.

    Returns:
        The writable directory.

    Raises:
        OSError: the kernel does not allow it.
    """
    user, group = os.getuid(), os.getgid()
    check(LIBC.unshare(NAMESPACES), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        Path("/proc/self", name).write_text(text)
    check(LIBC.mount(None, b"/", None, MOUNT_PRIVATE, None), "mount")
    _mount_memory(folder, "size=1m,mode=755")
    os.chdir(folder)
    for path in (*needed_paths(), Path(os.devnull)):
        _show(path)
    Path(FOLDER[1:]).mkdir()
    _mount_memory(FOLDER[1:], f"size={size_mb}m,nr_inodes={MOST_FILES}")
    # The old tree is put over the new one for a moment, and then let go.
    check(LIBC.pivot_root(b".", b"."), "pivot_root")
    check(LIBC.umount2(b".", DETACH), "umount")
    os.chdir("/")
    closed = MountAttributes(READ_ONLY | NO_SUID | NO_DEVICES, 0, 0, 0)
    check(LIBC.syscall(MOUNT_SETATTR, -100, b"/", RECURSIVE, ctypes.byref(closed), 32), "mount_setattr")
    for place, closing in ((FOLDER, READ_ONLY), (os.devnull, NO_DEVICES)):
        opened = MountAttributes(0, closing, 0, 0)
        check(LIBC.syscall(MOUNT_SETATTR, -100, place.encode(), 0, ctypes.byref(opened), 32), "mount_setattr")
    return FOLDER


def _mount_memory(folder: str, options: str) -> None:
    check(LIBC.mount(b"tmpfs", folder.encode(), b"tmpfs", NO_SUID | NO_DEVICES, options.encode()), "mount tmpfs")


def _show(path: Path) -> None:
    """Bind a path into the new tree (the working directory), under its own name and under that which it leads to."""
    real = path.resolve()
    inside = Path(*real.parts[1:])
    if not inside.exists():
        (inside if real.is_dir() else inside.parent).mkdir(parents=True, exist_ok=True)
        if not real.is_dir():
            inside.touch()
        check(LIBC.mount(str(real).encode(), str(inside).encode(), None, BIND, None), f"mount {real}")
    link = Path(*path.parts[1:])
    if not link.exists():
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(real)
