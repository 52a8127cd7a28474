"""The process around an untrusted program; :mod:`src.sandbox.run` starts it with ``python -I -S``, never imports it.

It isolates itself, forks, and the fork (with namespaces, process 1 of its own world) gives up every right and runs the
program. Only the standard library is used: nothing else is on the path. Its exit status says how the program ended: 0
by itself, SIGALRM out of time, 1 it was not started.
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
from src.sandbox.folder import remove, takes_more
from src.sandbox.landlock import restrict_files
from src.sandbox.libc import LIBC, check, leave_root
from src.sandbox.namespaces import enter_namespaces

del sys.path[0]

PR_SET_PDEATHSIG, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 24, 38
LOOKS = 16
"""The size of a program's files is looked at once in so many looks at the program."""


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


def run(given: dict[str, Any], started: int) -> NoReturn:
    """In the fork: give up rights, run the program, write the token once its last line has run.

    Python's frames, objects and open files show neither the token nor the number of its pipe while the program runs:
    both lie among the intermediate values of one expression, which goes on only where the program does not raise.

    Args:
        given: What :mod:`src.sandbox.run` sent.
        started: A pipe to write to when the program starts.
    """
    leave = os._exit
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    os.chdir(given["folder"])
    os.dup2(os.open(".", os.O_RDONLY), 0)  # no input: a directory cannot be read
    sys.dont_write_bytecode = True
    set_limits(given["limits"], given["isolation"])
    give_up_rights(given["isolation"], given["folder"])
    os.write(started, b"1")
    os.closerange(3, given["fd"])
    os.closerange(given["fd"] + 1, 256)
    try:
        # A module of that name, as in openai/human-eval, is nobody's main one: what a program shows off stays unrun.
        code = compile(given.pop("program"), "program.py", "exec")
        os.write(given.pop("fd"), given.pop("token").encode() + (eval(code, {"__name__": "builtins"}) or b""))
    except BaseException as error:  # noqa: BLE001 - also SystemExit: a program that leaves early has not passed
        os.write(1, f"{type(error).__name__}: {error}\n".encode(errors="replace")[:2000])
    finally:
        leave(0)


def wait(pid: int, given: dict[str, Any]) -> bool:
    """Wait for the fork; kill it (and with process 1 its whole world) where it does not end by itself.

    Args:
        pid: The fork.
        given: What :mod:`src.sandbox.run` sent.

    Returns:
        Whether it ended, by itself or for the size of its files, before its time was over and its starter died.
    """
    most = given["limits"]["file_mb"] * 1024 * 1024
    watched = given["isolation"] != "namespaces"
    end, looks = time.monotonic() + given["limits"]["seconds"], 0
    while time.monotonic() < end and os.getppid() == given["parent"]:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return True
        if watched and looks % LOOKS == 0 and takes_more(given["folder"], pid, most):
            os.kill(pid, signal.SIGKILL)
        looks += 1
        time.sleep(0.003)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return False


def main() -> NoReturn:
    """Read what there is to run from standard input, isolate, fork, wait."""
    given = json.load(sys.stdin)
    above, name = os.path.split(given["folder"])
    place = os.open(above, os.O_PATH)
    try:
        if given["isolation"] != "none":
            leave_root(given["folder"])
        if given["isolation"] == "namespaces":
            given["folder"] = enter_namespaces(given["folder"], given["limits"]["file_mb"])
    except OSError as error:
        sys.exit(str(error))
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        run(given, write)
    # Only the fork may hold the pipes: their end is the program's end.
    for descriptor in (given["fd"], 1, 2, write):
        os.close(descriptor)
    if not os.read(read, 1):
        os._exit(1)
    in_time = wait(pid, given)
    if os.getppid() != given["parent"]:
        # Nobody is left to remove the directory.
        os.fchdir(place)
        remove(name)
    elif not in_time:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGALRM)
    os._exit(0)


main()
