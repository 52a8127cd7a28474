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
from torch.nn.functional import linear

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


def _layers_to_measure(model: torch.nn.Module) -> list[torch.Tensor]:
    """Weights of the output layer and of the first decoder layer's seven linear layers, where they are float32."""
    found = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
    weights = [*found[:7], *found[-1:]]
    return [weight.detach() for weight in weights if weight.dtype == torch.float32]


def _measure(weights: list[torch.Tensor], rows: int) -> dict[str, tuple[float, float]]:
    """For two modes: seconds of the fastest of three rounds through the layers, and the relative error."""
    draw = torch.Generator().manual_seed(0)
    inputs = [torch.randn(rows, weight.shape[1], generator=draw) for weight in weights]
    exact = inputs[0].double() @ weights[0].T.double()
    results = {}
    for mode in ("highest", "medium"):
        torch.set_float32_matmul_precision(mode)
        error = (linear(inputs[0], weights[0]).double() - exact).norm() / exact.norm()
        best = float("inf")
        for _ in range(3):
            start = time.perf_counter()
            for x, weight in zip(inputs, weights, strict=True):
                linear(x, weight)
            best = min(best, time.perf_counter() - start)
        results[mode] = (best, error.item())
    return results


def choose_matmul(mode: MatmulMode, model: torch.nn.Module, *, max_error: float, rows: int = 512) -> str:
    """Set the float32 matrix-multiply mode and return it.

    Args:
        mode: A mode of :func:`torch.set_float32_matmul_precision`, or ``auto``: ``medium`` where it is at least 1.2
            times as fast as ``highest`` through this model's layers on this CPU and its relative error is at most
            ``max_error``, else ``highest``. On a GPU ``auto`` is ``high`` (TF32) where ``max_error`` admits it (1e-3).
        model: The model whose layers are measured.
        max_error: Largest relative error of a product that ``auto`` accepts.
        rows: Rows of the products to measure: tokens of a training step, or rows of a decoding step.
    """
    weights = _layers_to_measure(model)
    if mode != "auto":
        choice: str = mode
    elif torch.cuda.is_available():
        choice = "high" if max_error >= 1e-3 else "highest"
    elif not weights:
        choice = "highest"
    else:
        results = _measure(weights, rows)
        ratio, error = results["highest"][0] / results["medium"][0], results["medium"][1]
        choice = "medium" if error <= max_error and ratio >= 1.2 else "highest"
        log.info(
            "products of %d rows: mode %s (medium is %.1f x as fast as highest here, error %.0e, accepted %.0e)",
            *(rows, choice, ratio, error, max_error),
        )
    torch.set_float32_matmul_precision(choice)
    return choice
