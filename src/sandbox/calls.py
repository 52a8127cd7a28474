"""The filter on system calls (seccomp): denied ones fail with EPERM, whatever the program's rights are."""

import ctypes
import os
import struct

from src.sandbox.libc import LIBC, PR_SET_DUMPABLE, check

PR_SET_SECCOMP = 22
DENIED = {
    "x86_64": "29 30 31 41 42 53 57 58 59 62 64 65 66 67 68 69 70 71 101 109 112 129 155 161 165 166 200 220 234 240 "
    "241 248 250 253 254 272 278 294 297 298 308 310 311 319 321 322 323 424 425 428 429 430 442 447",
    "aarch64": "26 27 39 40 41 51 75 97 117 129 130 131 138 154 157 180 181 186 187 188 189 190 191 192 193 194 195 "
    "196 197 198 199 203 217 219 221 240 241 268 270 271 279 280 281 282 424 425 428 429 430 442 447",
}
"""System calls that a program has no business with, by processor: sockets, new programs, signals, sessions, tracing,
namespaces, mounts, keys, and what holds memory beside the address space: shared memory, queues, files without a name,
watches, pages lent to pipes."""
DENIED_ALONE = {
    "x86_64": "76 90 91 92 93 94 132 141 142 144 188 189 190 197 198 199 203 235 249 251 256 260 261 268 279 280 300 "
    "301 312 314 434 438 440 448 452 463 466 469",
    "aarch64": "5 6 7 14 15 16 30 45 52 53 54 55 88 118 119 122 140 218 238 239 262 263 272 274 434 438 440 448 452 "
    "463 466 469",
}
"""More of them where no namespaces stand between a program and its user's other processes and files: modes, owners,
times and attributes of files, priorities, other processes' memory."""
ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
CLONE = {"x86_64": 56, "aarch64": 220}
CLONE3 = 435
CLONE_THREAD, CLONE_FILES = 0x10000, 0x400
LIMITS_OF = {"x86_64": 302, "aarch64": 261}
FILE_CONTROL = {"x86_64": 72, "aarch64": 25}
SET_OWNER = (8, 15)
"""Commands of fcntl that name a process to send signals to."""
PROCESS_CONTROL = {"x86_64": 157, "aarch64": 167}
"""The option of prctl that would hide a program's open files from the process that watches their size."""
ALLOW, DENY, NO_SUCH_CALL, KILL = 0x7FFF0000, 0x00050001, 0x00050000 | 38, 0x80000000
LOAD, EQUAL, AT_LEAST, ANY_BIT, GIVE = 0x20, 0x15, 0x35, 0x45, 0x06

Rule = tuple[int, int, int, int]
"""One instruction: its code, how many to skip where it holds and where it does not, its operand."""


def can_filter() -> bool:
    """Whether the calls of this processor are known here."""
    return os.uname().machine in ARCHITECTURE


def filter_calls(*, alone: bool) -> None:
    """Install the filter; ``clone`` is denied without the flags of a thread that shares its open files.

    Args:
        alone: No namespaces stand around the program.

    Raises:
        OSError: the kernel does not take it, or this processor's calls are not known here.
    """
    machine = os.uname().machine
    if machine not in ARCHITECTURE:
        raise OSError(f"there is no filter on system calls for {machine}")
    rules = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, ARCHITECTURE[machine]), (GIVE, 0, 0, KILL), (LOAD, 0, 0, 0)]
    rules += [(AT_LEAST, 0, 1, 0x40000000), (GIVE, 0, 0, DENY)]
    for number in f"{DENIED[machine]} {DENIED_ALONE[machine] if alone else ''}".split():
        rules += _rule(int(number), DENY)
    rules += _rule(CLONE3, NO_SUCH_CALL)
    for flag in (CLONE_THREAD, CLONE_FILES):
        rules += _unless(CLONE[machine], 0, (ANY_BIT, 1, 0, flag))
    if alone:
        rules += _unless(LIMITS_OF[machine], 0, (EQUAL, 1, 0, 0))
        rules += _unless(PROCESS_CONTROL[machine], 0, (EQUAL, 0, 1, PR_SET_DUMPABLE))
        for command in SET_OWNER:
            rules += _unless(FILE_CONTROL[machine], 1, (EQUAL, 0, 1, command))
    rules += [(GIVE, 0, 0, ALLOW)]
    code = b"".join(struct.pack("=HBBI", *each) for each in rules)
    buffer = ctypes.create_string_buffer(code)
    program = struct.pack("@HP", len(rules), ctypes.addressof(buffer))
    check(LIBC.prctl(PR_SET_SECCOMP, 2, program, 0, 0), "seccomp")


def _rule(number: int, verdict: int) -> list[Rule]:
    return [(EQUAL, 0, 1, number), (GIVE, 0, 0, verdict)]


def _unless(number: int, argument: int, test: Rule) -> list[Rule]:
    """Deny a call unless the test of one of its arguments skips the verdict."""
    return [(EQUAL, 0, 4, number), (LOAD, 0, 0, 16 + 8 * argument), test, (GIVE, 0, 0, DENY), (LOAD, 0, 0, 0)]
