"""Low-rank updates on a live model: added to each layer's output by a hook, swapped without touching a weight.

    y = W x + B (A x)        or, with LoRA biases,        y = W x + B (A [x; 1])

Nothing is rounded into the base weights, so swapping back is exact and a quantised or sharded base works too.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch.nn.functional import linear
from torch.utils.hooks import RemovableHandle

from src.adapters.base_weights import EARLIER_PREFIX, LATER_PREFIX
from src.adapters.pairs import LowRankPair
from src.errors import InputError


def check_fits(model: torch.nn.Module, pairs: Mapping[str, LowRankPair], name: str) -> None:
    """Check that every updated module exists in the model and has the update's shape.

    Raises:
        InputError: it does not; the message names the module and both shapes.
    """
    modules = dict(model.named_modules())
    for key, pair in pairs.items():
        module = modules.get(key)
        if module is None:
            later = LATER_PREFIX + key.removeprefix(EARLIER_PREFIX)
            hint = (
                f" (it has {later}: load the adapter with PEFT and save it, which renames)" if later in modules else ""
            )
            raise InputError(f"{name}: updates the module {key}, which the base model does not have{hint}")
        shape = layer_shape(module)
        if shape != pair.shape and not _constant_input(module, pair):
            raise InputError(f"{name}: {key} has an update of shape {pair.shape}; the base model's layer is {shape}")


def layer_shape(module: torch.nn.Module) -> tuple[int | None, int | None]:
    """(O, I) that an update of this layer has, whichever way round the layer stores its weight; None for none."""
    if isinstance(module, torch.nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    if is_conv1d(module):
        inputs, outputs = module.weight.shape  # type: ignore[union-attr, misc]
        return outputs, inputs
    return getattr(module, "out_features", None), getattr(module, "in_features", None)


def linear_shape(module: torch.nn.Module) -> tuple[int, int] | None:
    """(O, I) of a linear layer, GPT-2's Conv1D among them; None of any other module."""
    outputs, inputs = layer_shape(module)
    return None if isinstance(module, torch.nn.Embedding) or not (outputs and inputs) else (outputs, inputs)


def is_conv1d(module: torch.nn.Module) -> bool:
    """Whether a layer is GPT-2's, which stores its weight as (I, O)."""
    # By name: transformers is too heavy to import for one class.
    return type(module).__name__ == "Conv1D"


def _constant_input(module: torch.nn.Module, pair: LowRankPair) -> bool:
    """Whether an update of a linear layer has one more input, which is always 1."""
    shape = linear_shape(module)
    return shape is not None and pair.shape == (shape[0], shape[1] + 1)


def _adding(pair: LowRankPair, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = like.dtype if like.dtype.is_floating_point else torch.float32
    return pair.a.to(like.device, dtype), pair.b.to(like.device, dtype)


def attach(model: torch.nn.Module, pairs: Mapping[str, LowRankPair]) -> list[RemovableHandle]:
    """Add the updates to the model's layers; removing the returned handles takes them away."""
    handles = []
    for name, pair in pairs.items():
        module = model.get_submodule(name)
        a, b = _adding(pair, next(module.parameters()))
        constant = a[:, -1] if _constant_input(module, pair) else None
        a = a if constant is None else a[:, :-1].contiguous()
        # Some embeddings multiply what they look up (Gemma), and so what is added to it.
        scale = float(getattr(module, "embed_scale", 1.0))

        def add(
            _: object,
            args: tuple[torch.Tensor, ...],
            out: torch.Tensor,
            a: torch.Tensor = a,
            b: torch.Tensor = b,
            constant: torch.Tensor | None = constant,
            scale: float = scale,
        ) -> torch.Tensor:
            x = args[0]
            if not x.is_floating_point():
                return out + linear(b[x], a.T) * scale
            shift = None if constant is None else constant.to(x.dtype)
            return out + linear(linear(x, a.to(x.dtype), shift), b.to(x.dtype))

        handles.append(module.register_forward_hook(add))
    return handles


@contextmanager
def attached(model: torch.nn.Module, pairs: Mapping[str, LowRankPair]) -> Iterator[None]:
    """The model with the updates, for the length of a ``with`` block."""
    handles = attach(model, pairs)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
