"""Two settings of a CPU process that decide its speed: how matrices are multiplied, and how memory is given back.

Which mode of :func:`torch.set_float32_matmul_precision` is fast, and what it costs in accuracy, differs between
processors: on one it picks another float32 library, on another it rounds to bfloat16. So both are measured.
"""

import ctypes
import logging
import platform
import sys
import time
from typing import Literal

import torch

log = logging.getLogger(__name__)

MatmulMode = Literal["auto", "highest", "high", "medium"]
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> None:
    """Tell glibc to keep freed blocks: by default it returns big ones to the kernel after every step.

    Under memory pressure the page faults of taking them again dominate a training step on CPU.
    """
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**26)):
            libc.mallopt(parameter, value)


def _measure(a: torch.Tensor, b: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """(seconds of the fastest of five products, relative error)."""
    a @ b
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        product = a @ b
        best = min(best, time.perf_counter() - start)
    return best, ((product.double() - exact).norm() / exact.norm()).item()


def choose_matmul(mode: MatmulMode, *, max_error: float) -> str:
    """Set the float32 matrix-multiply mode and return it.

    Args:
        mode: A mode of :func:`torch.set_float32_matmul_precision`, or ``auto``: ``medium`` where it is at least 1.2
            times as fast as ``highest`` on this CPU and its relative error is at most ``max_error``, else
            ``highest``. On a GPU ``auto`` is ``high`` (TF32) where ``max_error`` admits it (1e-3).
        max_error: Largest relative error of a product that ``auto`` accepts.
    """
    if mode != "auto":
        torch.set_float32_matmul_precision(mode)
        return mode
    if torch.cuda.is_available():
        choice = "high" if max_error >= 1e-3 else "highest"
        torch.set_float32_matmul_precision(choice)
        return choice
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(512, 576, generator=draw), torch.randn(576, 1536, generator=draw)
    exact = a.double() @ b.double()
    results = {}
    for candidate in ("highest", "medium"):
        torch.set_float32_matmul_precision(candidate)
        results[candidate] = _measure(a, b, exact)
    ratio = results["highest"][0] / results["medium"][0]
    error = results["medium"][1]
    choice = "medium" if error <= max_error and ratio >= 1.2 else "highest"
    torch.set_float32_matmul_precision(choice)
    log.info(
        "matrix products: %s (medium is %.1f x as fast as highest here, relative error %.0e, accepted up to %.0e)",
        *(choice, ratio, error, max_error),
    )
    return choice
