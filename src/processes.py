"""Processes that end with the one that started them.

After SIGKILL of an engine nobody would stop its command; where the first process of a training fails alone, the others
wait for it in a collective (NCCL does not notice) and hold their GPUs. Linux sends the death signal of ``prctl(2)``;
elsewhere they run to their end.
"""

import ctypes
import os
import signal
import sys

SET_PARENT_DEATH_SIGNAL = 1
PARENT = "SST_ENGINE_PID"
"""Environment variable with the process id of the engine."""
FIRST, PROCESSES = "MASTER_PID", "MASTER_PROCESSES"
"""Environment variables of the processes that Lightning's launcher starts: process id of the first, their number."""

UMASK = os.umask(0o077)
"""Permissions that files made here do not have, as the shell said."""
os.umask(UMASK)


def end_with_parent(name: str = PARENT) -> None:
    """Ask for SIGKILL at the parent's end, and stop at once where it is gone already.

    Args:
        name: Environment variable with the parent's process id.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    # Processes that Lightning starts are children of the first one, not of the engine.
    expected = os.environ.pop(name, None)
    if expected is not None and os.getppid() != int(expected):
        sys.exit(1)


def tell_of_first(processes: int) -> None:
    """Let the processes that Lightning's launcher will start know that this one is the first of so many."""
    os.environ |= {FIRST: str(os.getpid()), PROCESSES: str(processes)}


def end_with_first() -> None:
    """End with the first process, where Lightning's launcher started this one; torchrun and srun end theirs."""
    if os.environ.get("LOCAL_RANK", "0") != "0" and FIRST in os.environ:
        end_with_parent(FIRST)
