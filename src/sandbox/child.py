"""The process around an untrusted program; :mod:`src.sandbox.run` starts it with ``python -I -S``, never imports it.

It isolates itself, forks, and the fork (with namespaces, process 1 of its own world) gives up every right and runs the
program. Only the standard library is used: nothing else is on the path.
"""

import json
import os
import resource
import signal
import struct
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).parents[2]))

from src.sandbox.calls import can_filter, filter_calls
from src.sandbox.landlock import become_nobody, bytes_below, restrict_files
from src.sandbox.libc import LIBC, check
from src.sandbox.namespaces import enter_namespaces

del sys.path[0]

PR_SET_PDEATHSIG, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 24, 38
TOKEN_LENGTH = 32
LOOKS = 16
"""The size of a program's directory is looked at once in so many looks at the program."""


def set_limits(limits: dict[str, Any], isolation: str) -> None:
    """Resource limits of this process and its threads."""
    seconds = int(limits["seconds"]) + 1
    mega = 1024 * 1024
    wanted = [
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, limits["memory_mb"] * mega),
        (resource.RLIMIT_FSIZE, limits["file_mb"] * mega),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ]
    if isolation == "namespaces" or not can_filter():
        # Elsewhere all processes of the user would count; there are no new ones, and memory limits threads.
        wanted.append((resource.RLIMIT_NPROC, limits["processes"]))
    for what, value in wanted:
        resource.setrlimit(what, (value, value))


def give_up_rights(isolation: str, folder: str) -> None:
    """No capability, none to be gained; no file but the needed ones; then the filter on system calls."""
    for capability in range(64):
        LIBC.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    header, none = struct.pack("=II", 0x20080522, 0), bytes(24)
    LIBC.capset(header, none)
    check(LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    if isolation == "landlock":
        restrict_files(folder)
    if isolation != "none" or can_filter():
        filter_calls(alone=isolation != "namespaces")


def run(program: str, token: str, given: dict[str, Any]) -> NoReturn:
    """In the fork: give up rights, run the program, write the token once its last line has run."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    os.chdir(given["folder"])
    os.dup2(os.open(".", os.O_RDONLY), 0)  # no input: a directory cannot be read
    os.closerange(3, given["fd"])
    os.closerange(given["fd"] + 1, 256)
    sys.dont_write_bytecode = True
    set_limits(given["limits"], given["isolation"])
    give_up_rights(given["isolation"], given["folder"])
    try:
        exec(compile(program, "program.py", "exec"), {"__name__": "__main__"})
    except BaseException as error:  # noqa: BLE001 - also SystemExit: a program that leaves early has not passed
        sys.stdout.flush()
        os.write(1, f"{type(error).__name__}: {error}\n".encode()[:2000])
        os._exit(1)
    sys.stdout.flush()
    os.write(given["fd"], token.encode())
    os._exit(0)


def wait(pid: int, seconds: float, *, folder: str | None, size_mb: int) -> None:
    """Wait for the fork; out of time, kill it (and with process 1 its whole world) and end by SIGALRM.

    Args:
        pid: The fork.
        seconds: Its time.
        folder: A directory whose size is to be watched.
        size_mb: Most MiB in it.
    """
    end, looks = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            os._exit(0 if status == 0 else 1)
        looks += 1
        if folder is not None and looks % LOOKS == 0 and bytes_below(folder) > size_mb * 1024 * 1024:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.003)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGALRM)


def main() -> None:
    """Read the token and the program from standard input, isolate, fork, wait."""
    given = json.loads(sys.argv[1])
    text = sys.stdin.read()
    isolation, limits = given["isolation"], given["limits"]
    try:
        if isolation == "namespaces":
            given["folder"] = enter_namespaces(given["folder"], limits["file_mb"])
        elif isolation == "landlock":
            become_nobody(given["folder"])
    except OSError as error:
        sys.exit(str(error))
    pid = os.fork()
    if pid == 0:
        run(text[TOKEN_LENGTH:], text[:TOKEN_LENGTH], given)
    # Only the fork may hold the pipes: their end is the program's end.
    for descriptor in (given["fd"], 1, 2):
        os.close(descriptor)
    watched = None if isolation == "namespaces" else given["folder"]
    wait(pid, limits["seconds"], folder=watched, size_mb=limits["file_mb"])


main()
