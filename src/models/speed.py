"""Two settings of a CPU process that decide its speed: how matrices are multiplied, and how memory is given back.

Which mode of :func:`torch.set_float32_matmul_precision` is fast, and what it costs in accuracy, differs between
processors: on one it picks another float32 library, on another it rounds to bfloat16. Some multiply bfloat16 fast only
where the weights are stored so. So all are measured; but where a processor has instructions for bfloat16, a training
takes them whatever the clock says.
"""

import ctypes
import logging
import platform
import sys
import time
from typing import Literal

import torch
from torch.nn.functional import linear

from src.errors import InputError

log = logging.getLogger(__name__)

MatmulMode = Literal["auto", "highest", "high", "medium"]
TrainingMode = Literal["auto", "highest", "high", "medium", "bfloat16"]
EXACT, WORTH = 1e-6, 1.2
"""A mode whose relative error is below ``EXACT`` rounds as float32 does; any other must be ``WORTH`` times as fast."""
HOPELESS = 2.0
"""A mode that takes so many times as long as another is not measured to the end."""
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def check_matmul_error(largest: float) -> None:
    """Check the largest relative error of a product that is accepted.

    Raises:
        InputError: it is no positive number.
    """
    if not largest > 0:
        raise InputError(f"model.max_matmul_error is {largest}; expected a number above 0")


def default_accelerator() -> str:
    """Where a run computes that names no hardware: Lightning's choice, but not Apple's GPU, which has no float64."""
    return "cpu" if torch.backends.mps.is_available() else "auto"


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


def _measure(weights: list[torch.Tensor], rows: int, modes: list[str]) -> dict[str, tuple[float, float]]:
    """For each mode: seconds of the fastest of three rounds through the layers, and the relative error."""
    draw = torch.Generator().manual_seed(0)
    inputs = [torch.randn(rows, weight.shape[1], generator=draw) for weight in weights]
    exact = inputs[0].double() @ weights[0].T.double()
    results: dict[str, tuple[float, float]] = {}
    for mode in modes:
        torch.set_float32_matmul_precision("highest" if mode == "bfloat16" else mode)
        given = [weight.bfloat16() for weight in weights] if mode == "bfloat16" else weights
        error = (linear(inputs[0].to(given[0].dtype), given[0]).double() - exact).norm() / exact.norm()
        limit = HOPELESS * min((seconds for seconds, _ in results.values()), default=float("inf"))
        results[mode] = (_fastest_round(inputs, given, limit), error.item())
    return results


def _fastest_round(inputs: list[torch.Tensor], weights: list[torch.Tensor], limit: float) -> float:
    """Seconds of the fastest of three rounds; ends early, with more than ``limit``, once that is passed."""
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        for x, weight in zip(inputs, weights, strict=True):
            linear(x.to(weight.dtype), weight).to(x.dtype)
            if time.perf_counter() - start > limit:
                return time.perf_counter() - start
        best = min(best, time.perf_counter() - start)
    return best


def _best(results: dict[str, tuple[float, float]], max_error: float) -> str:
    """The fastest admitted mode (``highest`` always is); one that rounds must be :data:`WORTH` times as fast."""
    cost = {name: seconds * (1.0 if error < EXACT else WORTH) for name, (seconds, error) in results.items()}
    admitted = [name for name, (_, error) in results.items() if error <= max_error or name == "highest"]
    return min(admitted, key=cost.__getitem__)


def _multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for products of bfloat16 (AVX-512 BF16; those with AMX have both)."""
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return supported is not None and bool(supported())


def choose_matmul(
    mode: TrainingMode,
    model: torch.nn.Module,
    *,
    max_error: float,
    rows: int = 512,
    copies: bool = False,
    device: str = "cpu",
) -> str:
    """Set how float32 matrices are multiplied and return the mode.

    Args:
        mode: A mode of :func:`torch.set_float32_matmul_precision`; or ``bfloat16``: the caller multiplies by bfloat16
            copies of its weights; or ``auto``: of those whose relative error is at most ``max_error``, ``bfloat16``
            where the processor has instructions for it, else the fastest through this model's layers on this CPU. On a
            GPU ``auto`` is ``high`` (TF32) where ``max_error`` admits it (1e-3).
        model: The model whose layers are measured.
        max_error: Largest relative error of a product that ``auto`` accepts.
        rows: Rows of the products to measure: tokens of a training step, or rows of a decoding step.
        copies: Whether the caller can multiply by copies.
        device: Type of the device that will multiply.
    """
    weights = _layers_to_measure(model)
    choice: str = mode
    others = "highest" if mode == "bfloat16" else choice
    if mode == "auto" and device == "cuda":
        choice = others = "high" if max_error >= 1e-3 else "highest"
    elif mode == "auto" and not weights:
        choice = others = "highest"
    elif mode == "auto":
        results = _measure(weights, rows, ["highest", "medium", *(["bfloat16"] if copies else [])])
        choice = _best(results, max_error)
        # Whether a run rounds must not depend on what else the processor does while the clock runs.
        if copies and results["bfloat16"][1] <= max_error and _multiplies_bfloat16():
            choice = "bfloat16"
        # What is not multiplied by copies (the output layer, attention) takes the best of the other modes.
        others = _best({name: results[name] for name in ("highest", "medium")}, max_error)
        slowest = results["highest"][0]
        measured = ", ".join(f"{name} {slowest / s:.1f} x, error {e:.0e}" for name, (s, e) in results.items())
        log.info("products of %d rows: mode %s (%s; accepted error %.0e)", rows, choice, measured, max_error)
    torch.set_float32_matmul_precision(others)
    return choice
