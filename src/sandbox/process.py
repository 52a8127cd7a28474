"""The process around an untrusted program, from outside: what it is told, what it prints, how it ends."""

import os
import selectors
import signal
import subprocess
import time
from typing import Any, Literal

Ending = Literal["passed", "failed", "timeout", "output", "broken"]
"""A program may reach its last line, fail, run too long or print too much; ``broken``: it could not be started."""
GRACE = 2.0
"""Seconds for the start of the interpreter, beyond the program's own time."""


def send(process: Any, text: str) -> None:
    """Write to the standard input of a process and close it."""
    try:
        process.stdin.write(text.encode())
        process.stdin.close()
    except BrokenPipeError:
        # The child has died; what it printed says why.
        return


def drain(process: Any, *, seconds: float, output_kb: int) -> tuple[bytes, Ending]:
    """What a program prints, until it ends, prints too much or runs out of time.

    Args:
        process: The process around it.
        seconds: Its own time.
        output_kb: Most KiB that it may print.
    """
    end = time.monotonic() + seconds + GRACE
    printed = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while (left := end - time.monotonic()) > 0:
            if not selector.select(left):
                continue
            chunk = os.read(process.stdout.fileno(), 65536)
            if not chunk:
                return printed, _ending(process, end)
            printed += chunk
            if len(printed) > output_kb * 1024:
                return printed[: output_kb * 1024], "output"
    return printed, "timeout"


def _ending(process: Any, end: float) -> Ending:
    """What the child's status says: SIGALRM where the program ran out of time, 0 where it ended by itself."""
    try:
        status = process.wait(max(0.1, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        return "timeout"
    if status > 0:
        return "broken"
    return "timeout" if status == -signal.SIGALRM else "failed"


def stop(process: Any) -> None:
    """End the child and everything in its process group."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    finally:
        process.stdout.close()
        process.wait()


def answer(descriptor: int) -> bytes:
    """What was written to a pipe whose writers have ended; its end is closed."""
    os.set_blocking(descriptor, False)
    try:
        return os.read(descriptor, 4096)
    except BlockingIOError:
        # A stray process still holds the other end, and wrote nothing.
        return b""
    finally:
        os.close(descriptor)
