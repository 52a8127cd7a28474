"""Run one of the project's commands in a process of its own, and measure its time and peak memory."""

import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.experiments.engine import CellError
from src.experiments.launch import GPU, PEAKS
from src.files import PROJECT
from src.processes import PARENT

MODULE = "src.experiments.launch"
ENDS = 120.0
"""Seconds that an interrupted command has to end in; what it has finished is on the disk by then."""
LAUNCHER = ("RANK", "LOCAL_", "WORLD_SIZE", "GROUP_", "ROLE_", "NODE_RANK", "MASTER_", "TORCHELASTIC_", "SLURM_", "PL_")
"""Beginnings of the variables by which launchers tell processes apart."""
LONGEST = 300
"""Characters of an error that is no one-line input error."""


@dataclass(frozen=True)
class Cost:
    """What a command took.

    Attributes:
        seconds: Wall time, with the start of Python.
        peak_mb: Largest resident memory of one of its processes, in MB (10⁶ bytes).
        processor: What it ran on.
        gpu_peak_mb: Most memory of tensors of one of its processes on a GPU, in MB; nothing where it used none.
    """

    seconds: float
    peak_mb: float
    processor: str
    gpu_peak_mb: float | None = None

    def shared(self, cells: int) -> dict[str, Any]:
        """The share of one of so many cells that one command computed: time is divided, memory is not."""
        shared = {
            "seconds": self.seconds / cells,
            "peak_mb": self.peak_mb,
            "cells_in_run": cells,
            "processor": self.processor,
        }
        return shared if self.gpu_peak_mb is None else shared | {"gpu_peak_mb": self.gpu_peak_mb}


def run_command(arguments: Sequence[str], log_file: Path) -> Cost:
    """Run ``python -m src ARGUMENTS`` and wait for it.

    Args:
        arguments: The command and its flags.
        log_file: Takes what it prints.

    Raises:
        CellError: it ended with another code than 0.
    """
    log_file.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with tempfile.NamedTemporaryFile("r") as peaks, log_file.open("wb") as output:
        environment = os.environ | {PARENT: str(os.getpid()), PEAKS: peaks.name}
        child = subprocess.Popen(
            [sys.executable, "-m", MODULE, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=_importable(alone(environment)),
        )
        try:
            _, status, usage = os.wait4(child.pid, 0)
        except BaseException:
            # Ctrl-C reaches the command too; it must be gone before another one takes its folder.
            child.terminate()
            try:
                child.wait(ENDS)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
            raise
        told = peaks.read().splitlines()
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        raise CellError(_reason(log_file, child.returncode))
    return Cost(time.monotonic() - started, peak_mb(told, usage), *_computed_on(told))


def alone(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without what torchrun or SLURM said to the engine.

    Under a launcher every process is an engine of its own; its commands are not processes of one training.
    """
    kept = {key: value for key, value in environment.items() if not key.startswith(LAUNCHER)}
    if "TORCHELASTIC_RUN_ID" in environment:
        import torch

        # torchrun shows every GPU to every process; each engine keeps to its own.
        rank, visible = int(environment["LOCAL_RANK"]), environment.get("CUDA_VISIBLE_DEVICES")
        if visible is None:
            visible = ",".join(map(str, range(torch.cuda.device_count()))) or str(rank)
        kept["CUDA_VISIBLE_DEVICES"] = _own_device(visible, rank)
    return kept


def _own_device(visible: str, rank: int) -> str:
    """The GPU of one rank; ranks beyond the last GPU begin again at the first. Without GPUs none is turned on."""
    devices = [device for device in visible.split(",") if device.strip()]
    return devices[rank % len(devices)] if devices else visible


def _importable(environment: dict[str, str]) -> dict[str, str]:
    """The engine may have been started from another folder than the project's."""
    places = [str(PROJECT), *filter(None, [environment.get("PYTHONPATH")])]
    return environment | {"PYTHONPATH": os.pathsep.join(places)}


def peak_mb(told: Sequence[str], usage: resource.struct_rusage) -> float:
    """Of what the command's processes told (Linux, see :mod:`src.experiments.launch`), else of what the system says."""
    unit = 1 if sys.platform == "darwin" else 1024
    return max((int(line) for line in told if line.isdecimal()), default=usage.ru_maxrss) * unit / 1e6


def _computed_on(told: Sequence[str]) -> tuple[str, float | None]:
    """The processors, and the peak memory on a GPU (MB): GPUs, where the command's processes told of any."""
    gpus = [line.split(" ", 3)[1:] for line in told if line.startswith(f"{GPU} ")]
    if not gpus:
        return processor(), None
    _, count, name = gpus[0]
    return name if count == "1" else f"{count} x {name}", max(int(used) for used, _, _ in gpus) / 1e6


def _reason(log_file: Path, code: int) -> str:
    text = log_file.read_text(errors="replace").strip()
    errors = [line.removeprefix("error: ") for line in text.splitlines() if line.startswith("error: ")]
    if errors:
        return errors[-1]
    if code < 0:
        return f"ended by signal {-code} (the kernel sends 9 where memory runs out); see {log_file}"
    last = next((line for line in reversed(text.splitlines()) if line.strip()), "")
    return f"exit code {code}: {last.strip()[:LONGEST]} (see {log_file})"


def processor() -> str:
    """Model and number of the processors, as costs are only comparable between equal ones."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores"
