"""What the modules of all commands are: their rotary frequencies keep their precision, and they may be sharded."""

from collections.abc import Callable

import torch
from lightning import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy


class KeptBuffers(LightningModule):
    """A module whose ``to`` leaves rotary frequencies at their precision, and that knows whether it is sharded.

    transformers keeps them in float32 beside weights of any format. Lightning's ``bf16-true`` and ``16-true`` convert
    whole modules, buffers included, and a frequency that is rounded to bfloat16 turns position 500 by up to a radian:
    another model than the one that the base's name promises.
    """

    @property
    def sharded(self) -> bool:
        """Whether other processes hold parts of the weights."""
        return isinstance(self.trainer.strategy, ModelParallelStrategy)

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
