"""SIGTERM as Ctrl-C: a queue's way to end a job leaves nothing half-written then."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def terminated_like_interrupted() -> Iterator[None]:
    """Let SIGTERM end what runs here as Ctrl-C does, so that nothing half-written stays; a second one ends at once.

    A process that waits for others in a library's code hears of no signal until they come: a Trainer's set-up and its
    collective operations stay outside.
    """
    before = interrupt_at_sigterm()
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def interrupt_at_sigterm() -> Any:
    """Let SIGTERM raise KeyboardInterrupt from now on; returns the handler before. Other threads change nothing."""
    if threading.current_thread() is not threading.main_thread():
        return None
    process = os.getpid()

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if os.getpid() != process:
            # A fork of this process ends as forks do.
            os.kill(os.getpid(), signal.SIGTERM)
        raise KeyboardInterrupt

    return signal.signal(signal.SIGTERM, interrupt)
