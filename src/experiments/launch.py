"""``python -m src.experiments.launch COMMAND …``: a command that ends with its engine and tells it its peak memory.

After SIGKILL of the engine nobody would stop its command, and the engine that goes on would start it a second time in
the same folder (:mod:`src.processes`).

At its end each process of the command says how much memory it took: Linux keeps the peak of a child's *former* program,
so that ``wait4(2)`` never reports less than what the engine held when it started the command. One that computed on a
GPU says on which, and how much of its memory tensors took.
"""

import atexit
import os
import runpy
import sys
from pathlib import Path
from typing import Any

from src.processes import PROCESSES, end_with_parent

PEAKS = "SST_PEAKS"
"""Environment variable with the file that takes the peaks: from each process a line with a number of kB, and perhaps
one with :data:`GPU`, a number of bytes, the number of the command's processes and the GPU's name."""
GPU = "gpu"
STATUS = Path("/proc/self/status")


def tell_peak() -> None:
    """Append the largest resident memory of this program alone (``VmHWM``; Linux only), and that on its GPU, if any."""
    if PEAKS not in os.environ:
        return
    status = STATUS.read_text().splitlines() if STATUS.exists() else []
    told = [line.split()[1] for line in status if line.startswith("VmHWM:")]
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        count = os.environ.get(PROCESSES, "1")
        told.append(f"{GPU} {torch.cuda.max_memory_allocated()} {count} {torch.cuda.get_device_name()}")
    with open(os.environ[PEAKS], "a") as peaks:
        peaks.writelines(f"{line}\n" for line in told)


if __name__ == "__main__":
    end_with_parent()
    atexit.register(tell_peak)
    # This module stays __main__: Lightning starts its other processes by that name, and they end in the same way.
    runpy.run_module("src", run_name="__main__")
