"""Rotary frequencies, which no change of a model's number format may round."""

from collections.abc import Callable

import torch
from lightning import LightningModule


class KeptBuffers(LightningModule):
    """A module whose ``to`` leaves rotary frequencies at their precision.

    transformers keeps them in float32 beside weights of any format. Lightning's ``bf16-true`` and ``16-true`` convert
    whole modules, buffers included, and a frequency that is rounded to bfloat16 turns position 500 by up to a radian:
    another model than the one that the base's name promises.
    """

    def _apply(
        self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> "KeptBuffers":  # what ``to``, ``cuda`` and ``half`` call
        kept = [
            (module, name, buffer)
            for module in self.modules()
            for name, buffer in module.named_buffers(recurse=False)
            if name.endswith("inv_freq")
        ]
        super()._apply(fn, recurse)
        for module, name, before in kept:
            after = module.get_buffer(name)
            if after.element_size() < before.element_size():
                setattr(module, name, before.to(after.device))
        return self
