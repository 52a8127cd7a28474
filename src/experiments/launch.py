"""``python -m src.experiments.launch COMMAND …``: a command that ends when the engine that started it does.

After SIGKILL of the engine nobody would stop its command, and the engine that goes on would start it a second time in
the same folder. Linux sends the death signal of ``prctl(2)``; elsewhere the command runs to its end.
"""

import ctypes
import os
import runpy
import signal
import sys

SET_PARENT_DEATH_SIGNAL = 1
PARENT = "SST_ENGINE_PID"
"""Environment variable with the process id of the engine."""


def end_with_parent() -> None:
    """Ask for SIGKILL at the parent's end, and stop at once where it is gone already."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    # Processes that Lightning starts are children of the first one, not of the engine.
    expected = os.environ.pop(PARENT, None)
    if expected is not None and os.getppid() != int(expected):
        sys.exit(1)


if __name__ == "__main__":
    end_with_parent()
    # This module stays __main__: Lightning starts its other processes by that name, and they end in the same way.
    runpy.run_module("src", run_name="__main__")
