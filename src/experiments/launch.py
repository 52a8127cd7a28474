"""``python -m src.experiments.launch COMMAND …``: a command that ends with its engine and tells it its peak memory.

After SIGKILL of the engine nobody would stop its command, and the engine that goes on would start it a second time in
the same folder. Linux sends the death signal of ``prctl(2)``; elsewhere the command runs to its end.

At its end each process of the command says how much memory it took: Linux keeps the peak of a child's *former* program,
so that ``wait4(2)`` never reports less than what the engine held when it started the command.
"""

import atexit
import ctypes
import os
import runpy
import signal
import sys
from pathlib import Path

SET_PARENT_DEATH_SIGNAL = 1
PARENT = "SST_ENGINE_PID"
"""Environment variable with the process id of the engine."""
PEAKS = "SST_PEAKS"
"""Environment variable with the file that takes the peaks: one line with a number of kB from each process."""
STATUS = Path("/proc/self/status")


def end_with_parent() -> None:
    """Ask for SIGKILL at the parent's end, and stop at once where it is gone already."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    # Processes that Lightning starts are children of the first one, not of the engine.
    expected = os.environ.pop(PARENT, None)
    if expected is not None and os.getppid() != int(expected):
        sys.exit(1)


def tell_peak() -> None:
    """Append the largest resident memory of this program alone (``VmHWM``); Linux only."""
    if PEAKS not in os.environ or not STATUS.exists():
        return
    peak = next((line.split()[1] for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:")), None)
    if peak is not None:
        with open(os.environ[PEAKS], "a") as peaks:
            peaks.write(f"{peak}\n")


if __name__ == "__main__":
    end_with_parent()
    atexit.register(tell_peak)
    # This module stays __main__: Lightning starts its other processes by that name, and they end in the same way.
    runpy.run_module("src", run_name="__main__")
