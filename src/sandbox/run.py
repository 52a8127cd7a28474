"""Run an untrusted Python program in a process of its own and say whether it came to its end.

The child (:mod:`src.sandbox.child`) has no network, an empty environment, a private directory, no other file but what
Python needs to read, limits on processor time, memory, file size and processes, and a filter on system calls that
denies sockets, signals, new processes and tracing. A wall-clock time-out ends its whole process group. A program passes
only where the child writes back a random token after its last line has run: leaving early is a failure.

The program shares the interpreter with that last step and with its own tests. Frames, objects and open files do not
show it the token, but one that is written to deceive can pass without solving its task. It can search the raw memory of
its process (by ctypes); hand its tests values that are equal to everything; read what they expect from the frames that
call it and their constants (``sys._getframe``); or trace, rebind and change the tests as they run (``sys.settrace``).
This keeps programs from doing harm, and counts those of a model that was asked to solve a task: it is no proof against
a model that was trained to pass.

There are two ways to get there: namespaces (:mod:`src.sandbox.namespaces`), or Landlock and a longer filter
(:mod:`src.sandbox.landlock`). Where the kernel gives neither, programs are refused, unless the caller allows code
execution: then the limits, the time-out and, where there is one, the filter still hold, but files can be read.
"""

import hashlib
import json
import logging
import os
import secrets
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from src.errors import InputError
from src.sandbox.folder import remove
from src.sandbox.process import Ending, answer, drain, send, stop

log = logging.getLogger(__name__)

Isolation = Literal["namespaces", "landlock", "none"]
CHILD = Path(__file__).with_name("child.py")
PAUSES = (0.0, 0.1, 1.0)
"""Seconds before each attempt to start a program."""


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
        InputError: this machine cannot isolate it, and ``allow_code_execution`` is false; or it could not be started.
    """
    if not allow_code_execution:
        check_isolation()
    for pause in PAUSES:
        time.sleep(pause)
        outcome = run_isolated(program, limits or Limits(), isolation=_isolation())
        if outcome.ending != "broken":
            return outcome
    raise InputError(f"a program could not be started ({_last_line(outcome)}); run again: what was found is kept")


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
        outcome = run_isolated("import math\nopen('probe', 'w').write('x')", Limits(), isolation=way)
        if outcome.passed:
            if problems:
                log.info("programs are isolated by %s, for there are no namespaces (%s)", way, problems[0])
            return way, "; ".join(problems)
        problems.append(_last_line(outcome) or f"{way}: the probe did not run")
    return "none", "; ".join(problems)


def _isolation() -> Isolation:
    return "none" if missing_isolation() else best_isolation()[0]


def _last_line(outcome: Outcome) -> str:
    return outcome.detail.strip().rpartition("\n")[2]


def outcome_key(limits: Limits) -> str:
    """A hash of what outcomes depend on beside the program: limits, isolation, Python and the code of this package."""
    code = [path.read_text() for path in sorted(CHILD.parent.glob("*.py"))]
    text = json.dumps([asdict(limits), _isolation(), sys.version, code])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def run_isolated(program: str, limits: Limits, *, isolation: Isolation) -> Outcome:
    """Run a program once, in one way of isolation, in a directory that is removed afterwards.

    Args:
        program: The program.
        limits: What it may take.
        isolation: The way.
    """
    folder = os.path.realpath(tempfile.mkdtemp(prefix="sandbox-"))
    try:
        return _run_in(folder, program, limits, isolation)
    finally:
        try:
            remove(folder)
        except OSError as error:
            log.warning("a program's directory stays behind: %s", error)


def _run_in(folder: str, program: str, limits: Limits, isolation: Isolation) -> Outcome:
    token = secrets.token_hex(16)
    read, write = os.pipe()
    given = {"program": program, "token": token, "fd": write, "folder": folder, "isolation": isolation}
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-u", str(CHILD)],
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
        send(process, json.dumps(given | {"limits": asdict(limits), "parent": os.getpid()}))
        printed, ending = drain(process, seconds=limits.seconds, output_kb=limits.output_kb)
    finally:
        stop(process)
        written = answer(read)
    if ending == "failed" and written == token.encode():
        ending = "passed"
    return Outcome(ending, printed[-2000:].decode(errors="replace"))
