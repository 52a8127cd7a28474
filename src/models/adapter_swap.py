"""One of many adapters on a live model at a time; the base is loaded once."""

from collections.abc import Sequence
from contextlib import AbstractContextManager

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
        self._present: tuple[int, AbstractContextManager[None]] | None = None

    def to(self, number: int | None) -> None:
        """Attach an adapter in place of the present one; ``None`` leaves the bare base."""
        if self._present is not None:
            if self._present[0] == number:
                return
            self._present[1].__exit__(None, None, None)
            self._present = None
        if number is not None:
            adapter = self.adapters[number]
            manager = attached(self.model, adapter.pairs if adapter else {})
            manager.__enter__()
            self._present = number, manager
