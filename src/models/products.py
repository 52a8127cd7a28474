"""Products of weights in the fastest accepted mode, everything else in full float32.

The mode of :func:`torch.set_float32_matmul_precision` holds for the whole process. A mode that multiplies big matrices
faster can make attention, whose matrices are small, several times slower: so it is set around the linear layers only.
There ``W xᵀ`` is computed instead of ``x Wᵀ``: the layout in which few rows are multiplied fastest.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def fast_products(model: torch.nn.Module, mode: str) -> Iterator[None]:
    """The model with its float32 linear layers on CPU multiplied in a mode, for the length of a ``with`` block."""
    torch.set_float32_matmul_precision("highest")
    layers = [] if mode == "highest" else _eligible(model)
    for layer in layers:
        layer.forward = _Product(layer, mode)  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # type: ignore[method-assign]


def _eligible(model: torch.nn.Module) -> list[torch.nn.Linear]:
    found = [module for module in model.modules() if type(module) is torch.nn.Linear]
    return [layer for layer in found if layer.weight.dtype == torch.float32 and layer.weight.device.type == "cpu"]


class _Product:
    """``x Wᵀ + b`` of one layer."""

    def __init__(self, layer: torch.nn.Linear, mode: str) -> None:
        self.layer, self.mode = layer, mode

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.layer.weight, self.layer.bias
        torch.set_float32_matmul_precision(self.mode)
        out = (weight @ x.reshape(-1, x.shape[-1]).t()).t().contiguous()
        torch.set_float32_matmul_precision("highest")
        out = out.view(*x.shape[:-1], -1)
        return out if bias is None else out + bias
