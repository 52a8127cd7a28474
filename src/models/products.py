"""Products of weights in the fastest accepted mode, everything else in full float32.

The mode of :func:`torch.set_float32_matmul_precision` holds for the whole process. A mode that multiplies big matrices
faster can make attention, whose matrices are small, several times slower: so it is set around the linear layers only.
There ``W xᵀ`` is computed instead of ``x Wᵀ``: the layout in which few rows are multiplied fastest.

Many rows are multiplied fastest by bfloat16 copies of the weights, where a processor has instructions for them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import linear


@contextmanager
def fast_products(model: torch.nn.Module, mode: str) -> Iterator[None]:
    """The model with its float32 linear layers on CPU multiplied in a mode, for the length of a ``with`` block.

    On a GPU every product is: there a mode slows none.
    """
    on_gpu = any(parameter.is_cuda for parameter in model.parameters())
    torch.set_float32_matmul_precision(mode if on_gpu else "highest")
    layers = [] if mode == "highest" else _eligible(model)
    for layer in layers:
        layer.forward = _Product(layer, mode)  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # type: ignore[method-assign]
        torch.set_float32_matmul_precision("highest")


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


class NarrowCopies:
    """Bfloat16 copies of the float32 linear layers of a model on CPU: half their memory on top.

    What lies between these layers runs under autocast: sums of the residual stream stay in float32, and so do logits.

    Args:
        model: A transformers model; its weights must not change any more.
    """

    def __init__(self, model: Any) -> None:
        self._layers = _eligible(model)
        last = model.get_output_embeddings()
        self._products = [_wide_product(layer) if layer is last else self._product(layer) for layer in self._layers]
        self._last: tuple[Any, Any] = (None, None)

    @contextmanager
    def used(self) -> Iterator[None]:
        """The model multiplying by the copies, for the length of a ``with`` block."""
        for layer, product in zip(self._layers, self._products, strict=True):
            layer.forward = product  # type: ignore[assignment, method-assign]
        try:
            with torch.autocast("cpu", torch.bfloat16):
                yield
        finally:
            self._last = (None, None)
            for layer in self._layers:
                del layer.forward  # type: ignore[method-assign]

    def _product(self, layer: torch.nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
        """``x Wᵀ + b`` with x, W, b and the result rounded to bfloat16."""
        weight = layer.weight.detach().bfloat16()
        bias = None if layer.bias is None else layer.bias.detach().bfloat16()
        return lambda x: linear(self._narrow(x), weight, bias)

    def _narrow(self, x: torch.Tensor) -> torch.Tensor:
        """What goes in, rounded; several layers in a row get the same."""
        if x is not self._last[0]:
            self._last = x, x.bfloat16()
        return self._last[1]  # type: ignore[no-any-return]


def _wide_product(layer: torch.nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
    """``x Wᵀ + b`` in float32, whatever autocast says."""

    def product(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return linear(x.float(), layer.weight, layer.bias)

    return product
