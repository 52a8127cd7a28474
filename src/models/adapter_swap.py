"""One of many adapters on a live model at a time; the base is loaded once."""

from collections.abc import Sequence
from contextlib import ExitStack

import torch

from src.adapters.attach import attached
from src.adapters.peft_files import Adapter


class Swap:
    """Attaches adapters to a model in turn.

    Args:
        model: The bare base model.
        adapters: Adapters by their number; nothing stands for the base alone.
    """

    def __init__(self, model: torch.nn.Module, adapters: Sequence[Adapter | None]) -> None:
        self.model, self.adapters = model, list(adapters)
        self._present: int | None = None
        self._attached = ExitStack()

    def to(self, number: int | None) -> None:
        """Attach an adapter in place of the present one; ``None`` leaves the bare base."""
        if number == self._present:
            return
        self._attached.close()
        self._present = number
        if number is not None:
            adapter = self.adapters[number]
            self._attached.enter_context(attached(self.model, adapter.pairs if adapter else {}))
