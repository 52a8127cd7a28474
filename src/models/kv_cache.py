"""A key-value cache with room for the whole answer: each new token is written in place.

The cache that models make grows by concatenation: every step copies every key and value of every layer once more.
Layers that forget (sliding windows, recurrent states) keep their own way.
"""

from inspect import signature
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer


class ReservedLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values (N, H, T, E) of one layer, the first columns of memory for T + ``more`` tokens.

    Args:
        layer: A filled layer to take over.
        more: Tokens to leave room for.
    """

    def __init__(self, layer: DynamicLayer, more: int) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = layer.keys.dtype, layer.keys.device, True
        self._key_room, self._value_room = _with_room(layer.keys, more), _with_room(layer.values, more)
        self._show(layer.keys.shape[-2])

    def _show(self, length: int) -> None:
        self.keys, self.values = self._key_room[..., :length, :], self._value_room[..., :length, :]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new tokens' keys and values behind the others; returns all.

        Raises:
            RuntimeError: there is no room left.
        """
        start, more = self.keys.shape[-2], key_states.shape[-2]
        # narrow refuses to pass the end; a slice would be empty there, and writing to it a silent nothing.
        self._key_room.narrow(-2, start, more).copy_(key_states)
        self._value_room.narrow(-2, start, more).copy_(value_states)
        self._show(start + more)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Keep some rows (M,)."""
        length = self.keys.shape[-2]
        self._key_room, self._value_room = self._key_room[beam_idx], self._value_room[beam_idx]
        self._show(length)


def _with_room(filled: torch.Tensor, more: int) -> torch.Tensor:
    *shape, length, features = filled.shape
    room = filled.new_empty(*shape, length + more, features)
    room[..., :length, :] = filled
    return room


def reserve(cache: Any, more: int) -> None:
    """Give the growing layers of a cache room for so many more tokens."""
    for number, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[number] = ReservedLayer(layer, more)


def cache_option(model: Any) -> str:
    """What a model's ``forward`` calls its cache: ``cache`` since transformers 5.24."""
    return "cache" if "cache" in signature(model.forward).parameters else "past_key_values"


def has_states(cache: Any) -> bool:
    """Whether layers keep states of all tokens so far, which have no places that could be shared or repeated."""
    return any(hasattr(layer, "recurrent_states") for layer in cache.layers)
