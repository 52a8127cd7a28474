"""LoRA layers with fused arithmetic: the same numbers as PEFT's forward, a third fewer passes over memory.

    y = x Wᵀ + s · (x Aᵀ) Bᵀ

PEFT scales and adds the update in separate passes over the layer's output and saves each for the backward pass. Here
both ride on the matrix products (``addmm`` with a factor). Gradients follow by hand, W being frozen:

    z = x Aᵀ,  h = ḡ B:   x̄ = ḡ W + s h A,   Ā = s hᵀ x,   B̄ = s ḡᵀ z

The products with W, nearly all of the arithmetic, may run in bfloat16: W is so stored, or converted once for the whole
run. Sums with the update, and the update itself, stay in the adapter's format; of x is kept what came in, which layers
that get the same share, where PEFT keeps a wide copy for each.

Legend of shapes: M tokens, I input features, O output features, R rank.
"""

from typing import Any

import torch
from torch.nn.functional import linear


class FusedLora(torch.autograd.Function):
    """``linear(x, weight, bias) + scale * linear(linear(x, a), b)`` for x (M, I)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """(M, O) output."""
        z = x.to(a.dtype) @ a.T
        ctx.save_for_backward(x, weight, a, b, z)
        ctx.scale = scale
        out = linear(x.to(weight.dtype), weight, bias).to(a.dtype)
        return out.addmm_(z, b.T, alpha=scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x, a and b."""
        (grad,) = grads
        x, weight, a, b, z = ctx.saved_tensors
        wide = grad.to(a.dtype)
        h = wide @ b
        for_x = None
        if ctx.needs_input_grad[0]:
            for_x = (grad.to(weight.dtype) @ weight).to(a.dtype).addmm_(h, a, alpha=ctx.scale).to(x.dtype)
        return for_x, None, None, (h.T @ x.to(a.dtype)).mul_(ctx.scale), (z.T @ wide).mul_(ctx.scale).T, None


def fuse(model: torch.nn.Module, *, narrow: bool = False) -> int:
    """Give every plain LoRA layer of a PEFT model the fused forward; returns how many were fused.

    Args:
        model: A PEFT model.
        narrow: Multiply by a bfloat16 copy of each frozen weight (half the weights' memory on top).

    Layers with dropout, DoRA, LoRA biases or a quantised base keep PEFT's own forward, and so do all layers under
    autocast and where an adapter is narrower than what comes in.
    """
    from peft.tuners.lora.layer import Linear

    fused = 0
    for layer in model.modules():
        if isinstance(layer, Linear) and _is_plain(layer):
            layer.forward = _forward(layer, layer.forward, narrow=narrow)  # type: ignore[method-assign]
            fused += 1
    return fused


def _is_plain(layer: Any) -> bool:
    return (
        type(layer.base_layer) is torch.nn.Linear
        and not any(layer.use_dora.values())
        and not any(layer.lora_bias.values())
        and not layer.fan_in_fan_out
        and all(isinstance(drop, torch.nn.Identity) for drop in layer.lora_dropout.values())
    )


def _forward(layer: Any, original: Any, *, narrow: bool) -> Any:
    copies: tuple[torch.Tensor, torch.Tensor | None] | None = None
    if narrow:
        # Held here and not by the layer: copies are no part of the model's state.
        weight, bias = layer.base_layer.weight, layer.base_layer.bias
        copies = weight.detach().bfloat16(), None if bias is None else bias.detach().bfloat16()

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        active = layer.active_adapters
        plain = len(active) == 1 and not (layer.merged or layer.disable_adapters or args or kwargs)
        if not plain or torch.is_autocast_enabled(x.device.type):
            return original(x, *args, **kwargs)
        name, base = active[0], layer.base_layer
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        if torch.promote_types(x.dtype, a.dtype) != a.dtype:
            return original(x, *args, **kwargs)
        weight, bias = copies or (base.weight, base.bias)
        out = FusedLora.apply(x.reshape(-1, x.shape[-1]), weight, bias, a, b, layer.scaling[name])
        return out.reshape(*x.shape[:-1], -1)

    return forward
