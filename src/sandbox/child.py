"""The process around an untrusted program; :mod:`src.sandbox.run` starts it with ``python -I -S``, never imports it.

It enters user, process, network, mount and IPC namespaces, forks, and the fork (process 1 of its own world) gives up
every right and runs the program. Only the standard library is used: nothing else is on the path.
"""

import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

LIBC = ctypes.CDLL(None, use_errno=True)
NAMESPACES = 0x10000000 | 0x20000000 | 0x40000000 | 0x00020000 | 0x08000000  # user, process, network, mount, IPC
NOBODY = 65534
MOUNT_PRIVATE = 0x4000 | 0x40000
READ_ONLY, NO_SUID, NO_DEVICES = 1, 2, 4
RECURSIVE = 0x8000
MOUNT_SETATTR = 442
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 22, 24, 38
TOKEN_LENGTH = 32

# System calls that a program has no business with, by processor.
DENIED = {
    "x86_64": "41 42 53 57 58 59 62 101 109 112 129 155 161 165 166 200 234 248 250 272 297 298 308 310 311 321 322 "
    "323 424 425 428 429 430 442",
    "aarch64": "39 40 41 51 97 117 129 130 131 138 154 157 198 199 203 217 219 221 240 241 268 270 271 280 281 282 "
    "424 425 428 429 430 442",
}
ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
CLONE = {"x86_64": 56, "aarch64": 220}
CLONE3 = 435
CLONE_THREAD = 0x10000
ALLOW, DENY, NO_SUCH_CALL, KILL = 0x7FFF0000, 0x00050001, 0x00050000 | 38, 0x80000000


def check(result: int, what: str) -> None:
    """Raise OSError where a C call failed."""
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


class MountAttributes(ctypes.Structure):
    """The kernel's ``struct mount_attr``."""

    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "user")]


def anyone_can_read(path: str) -> bool:
    """Whether a user without rights can read a file: otherwise the standard library would be out of reach."""
    place = Path(path).resolve()
    return bool(place.stat().st_mode & 0o4) and all(parent.stat().st_mode & 0o1 for parent in place.parents)


def enter_namespaces(folder: str, size_mb: int) -> None:
    """Leave the machine's network, processes and users; see its files read-only, without devices."""
    if os.getuid() == 0 and anyone_can_read(os.__file__):
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        LIBC.prctl(4, 1, 0, 0, 0)  # a change of user makes /proc/self unwritable
    user, group = os.getuid(), os.getgid()
    check(LIBC.unshare(NAMESPACES), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        Path("/proc/self", name).write_text(text)
    check(LIBC.mount(None, b"/", None, MOUNT_PRIVATE, None), "mount")
    check(LIBC.mount(b"tmpfs", folder.encode(), b"tmpfs", 0, f"size={size_mb}m".encode()), "mount tmpfs")
    closed = MountAttributes(READ_ONLY | NO_SUID | NO_DEVICES, 0, 0, 0)
    check(LIBC.syscall(MOUNT_SETATTR, -100, b"/", RECURSIVE, ctypes.byref(closed), 32), "mount_setattr")
    opened = MountAttributes(0, READ_ONLY, 0, 0)
    check(LIBC.syscall(MOUNT_SETATTR, -100, folder.encode(), 0, ctypes.byref(opened), 32), "mount_setattr")


def set_limits(limits: dict[str, Any]) -> None:
    """Resource limits of this process and its threads."""
    seconds = int(limits["seconds"]) + 1
    mega = 1024 * 1024
    for what, value in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, limits["memory_mb"] * mega),
        (resource.RLIMIT_FSIZE, limits["file_mb"] * mega),
        (resource.RLIMIT_NPROC, limits["processes"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (value, value))


def give_up_rights(isolate: bool) -> None:
    """No capability, none to be gained; then the filter on system calls."""
    for capability in range(64):
        LIBC.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    header, none = struct.pack("=II", 0x20080522, 0), bytes(24)
    LIBC.capset(header, none)
    check(LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    machine = platform.machine()
    if machine in ARCHITECTURE:
        filter_calls(machine)
    elif isolate:
        raise OSError(f"there is no filter on system calls for {machine}")


def filter_calls(machine: str) -> None:
    """Install the seccomp filter: denied calls fail with EPERM, as does ``clone`` without the flag of a thread."""
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06

    def rule(number: int, verdict: int) -> list[tuple[int, int, int, int]]:
        return [(equal, 0, 1, number), (give, 0, 0, verdict)]

    rules = [(load, 0, 0, 4), (equal, 1, 0, ARCHITECTURE[machine]), (give, 0, 0, KILL), (load, 0, 0, 0)]
    rules += [(at_least, 0, 1, 0x40000000), (give, 0, 0, DENY)]
    for number in DENIED[machine].split():
        rules += rule(int(number), DENY)
    rules += rule(CLONE3, NO_SUCH_CALL)
    rules += [(equal, 0, 3, CLONE[machine]), (load, 0, 0, 16), (any_bit, 1, 0, CLONE_THREAD), (give, 0, 0, DENY)]
    rules += [(give, 0, 0, ALLOW)]
    code = b"".join(struct.pack("=HBBI", *each) for each in rules)
    buffer = ctypes.create_string_buffer(code)
    program = struct.pack("@HP", len(rules), ctypes.addressof(buffer))
    check(LIBC.prctl(PR_SET_SECCOMP, 2, program, 0, 0), "seccomp")


def run(program: str, token: str, given: dict[str, Any]) -> NoReturn:
    """In the fork: give up rights, run the program, write the token once its last line has run."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    null = os.open("/", os.O_RDONLY)
    os.dup2(null, 0)
    os.closerange(3, given["fd"])
    os.closerange(given["fd"] + 1, 256)
    os.chdir(given["folder"])
    sys.dont_write_bytecode = True
    set_limits(given["limits"])
    give_up_rights(given["isolate"])
    try:
        exec(compile(program, "program.py", "exec"), {"__name__": "__main__"})
    except BaseException as error:  # noqa: BLE001 - also SystemExit: a program that leaves early has not passed
        sys.stdout.flush()
        os.write(1, f"{type(error).__name__}: {error}\n".encode()[:2000])
        os._exit(1)
    sys.stdout.flush()
    os.write(given["fd"], token.encode())
    os._exit(0)


def wait(pid: int, seconds: float) -> None:
    """Wait for the fork; out of time, kill it (and with process 1 its whole world) and end by SIGALRM."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            os._exit(0 if status == 0 else 1)
        time.sleep(0.003)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGALRM)


def main() -> None:
    """Read the token and the program from standard input, isolate, fork, wait."""
    given = json.loads(sys.argv[1])
    text = sys.stdin.read()
    if given["isolate"]:
        try:
            enter_namespaces(given["folder"], given["limits"]["file_mb"])
        except OSError as error:
            sys.exit(str(error))
    pid = os.fork()
    if pid == 0:
        run(text[TOKEN_LENGTH:], text[:TOKEN_LENGTH], given)
    # Only the fork may hold the pipes: their end is the program's end.
    for descriptor in (given["fd"], 1, 2):
        os.close(descriptor)
    wait(pid, given["limits"]["seconds"])


main()
