"""Run an untrusted Python program in a process of its own and say whether it came to its end.

The child (:mod:`src.sandbox.child`) has no network, an empty environment, a private directory, no other file but what
Python needs to read, limits on processor time, memory, file size and processes, and a filter on system calls that
denies sockets, signals, new processes and tracing. A wall-clock time-out ends its whole process group. A program passes
only where the child writes back a random token after its last line has run: leaving early is a failure, whatever the
code.

There are two ways to get there: namespaces (:mod:`src.sandbox.namespaces`), or Landlock and a longer filter
(:mod:`src.sandbox.landlock`). Where the kernel gives neither, programs are refused, unless the caller allows code
execution: then the limits, the time-out and, where there is one, the filter still hold, but files can be read.
"""

import json
import logging
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from src.errors import InputError

log = logging.getLogger(__name__)

Ending = Literal["passed", "failed", "timeout", "output"]
Isolation = Literal["namespaces", "landlock", "none"]
CHILD = Path(__file__).with_name("child.py")
GRACE = 2.0
"""Seconds for the start of the interpreter, beyond the program's own time."""


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Args:
        seconds: Wall-clock and processor time.
        memory_mb: Address space of the process, in MiB.
        file_mb: Size of a file and of the private directory, in MiB.
        processes: Threads and processes.
        output_kb: Printed text, in KiB; a program that prints more is ended.
    """

    seconds: float = 10.0
    memory_mb: int = 512
    file_mb: int = 16
    processes: int = 16
    output_kb: int = 64


@dataclass(frozen=True)
class Outcome:
    """How a program ended, and the last of what it printed."""

    ending: Ending
    detail: str = ""

    @property
    def passed(self) -> bool:
        """Whether the program ran to its end."""
        return self.ending == "passed"


def run_program(program: str, limits: Limits | None = None, *, allow_code_execution: bool = False) -> Outcome:
    """Run a program; it passes if its last line is reached without an exception.

    Raises:
        InputError: this machine cannot isolate it, and ``allow_code_execution`` is false.
    """
    if not allow_code_execution:
        check_isolation()
    return _run(program, limits or Limits(), isolation="none" if missing_isolation() else best_isolation()[0])


def check_isolation() -> None:
    """Check that this machine can isolate programs.

    Raises:
        InputError: it cannot.
    """
    if missing := missing_isolation():
        raise InputError(
            f"programs cannot be isolated on this machine ({missing}); pass --model.allow_code_execution true to run "
            "them with resource limits only: they could then read and change every file that you can"
        )


def missing_isolation() -> str:
    """What keeps this machine from isolating programs; empty where nothing does."""
    kind, problems = best_isolation()
    return problems if kind == "none" else ""


@cache
def best_isolation() -> tuple[Isolation, str]:
    """How programs are isolated on this machine, and what keeps it from better ways. Tried once."""
    if sys.platform != "linux":
        return "none", f"namespaces need Linux, this is {sys.platform}"
    problems: list[str] = []
    ways: tuple[Isolation, ...] = ("namespaces", "landlock")
    for way in ways:
        outcome = _run("import math\nopen('probe', 'w').write('x')", Limits(), isolation=way)
        if outcome.passed:
            if problems:
                log.info("programs are isolated by %s, for there are no namespaces (%s)", way, problems[0])
            return way, "; ".join(problems)
        problems.append(outcome.detail.strip().rpartition("\n")[2] or f"{way}: the probe did not run")
    return "none", "; ".join(problems)


def _run(program: str, limits: Limits, *, isolation: Isolation) -> Outcome:
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="sandbox-") as folder:
        read, write = os.pipe()
        given = {"limits": asdict(limits), "folder": folder, "isolation": isolation, "fd": write}
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(CHILD), json.dumps(given)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd="/",
            env={},
            pass_fds=(write,),
            start_new_session=True,
        )
        os.close(write)
        try:
            _send(process, token + program)
            printed, ending = _drain(process, limits)
        finally:
            _end(process)
            os.set_blocking(read, False)
            answer = _read(read)
    if ending == "failed" and answer.decode(errors="replace") == token:
        ending = "passed"
    return Outcome(ending, printed[-2000:].decode(errors="replace"))


def _send(process: Any, text: str) -> None:
    try:
        process.stdin.write(text.encode())
        process.stdin.close()
    except BrokenPipeError:
        # The child has died; what it printed says why.
        return


def _drain(process: Any, limits: Limits) -> tuple[bytes, Ending]:
    """What the program prints, until it ends, prints too much or runs out of time."""
    end = time.monotonic() + limits.seconds + GRACE
    printed = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while (left := end - time.monotonic()) > 0:
            if not selector.select(left):
                continue
            chunk = os.read(process.stdout.fileno(), 65536)
            if not chunk:
                return printed, "timeout" if _waited(process, end) == -signal.SIGALRM else "failed"
            printed += chunk
            if len(printed) > limits.output_kb * 1024:
                return printed[: limits.output_kb * 1024], "output"
    return printed, "timeout"


def _waited(process: Any, end: float) -> int:
    """Exit status of the child; it ends itself by SIGALRM where the program ran out of time."""
    try:
        status: int = process.wait(max(0.1, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        return -signal.SIGALRM
    return status


def _end(process: Any) -> None:
    """End the child and everything in its process group."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    finally:
        process.stdout.close()
        process.wait()


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 4096)
    except BlockingIOError:
        # A stray process still holds the other end, and wrote nothing.
        return b""
    finally:
        os.close(descriptor)
