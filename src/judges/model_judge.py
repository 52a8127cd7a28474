"""What judges that are models share: how they are opened, and that one which was never trained to judge is none."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from src.errors import InputError, one_line
from src.files import UNLOADABLE
from src.hub import UNREACHABLE
from src.judges.model_files import model_content
from src.metrics.judging import Judge


class ModelJudge(Judge):
    """A judge that is a transformers model, on a device once it is loaded."""

    name: str
    revision: str | None
    _model: Any = None
    _tokenizer: Any = None

    @property
    def content(self) -> str:
        """Digest of the model's files."""
        return model_content(self.name, self.revision)

    def unload(self) -> None:
        """Let go of the model."""
        self._model = self._tokenizer = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _open(self, auto: Any, what: str, **options: Any) -> Any:
        """Load the tokenizer and a model of an Auto class, on the CPU whatever device is the default.

        Raises:
            InputError: nothing loadable has that name, or it has no weights for what makes it a ``what``.
        """
        from transformers import AutoTokenizer

        with self._loading(what), torch.device("cpu"):
            self._tokenizer = AutoTokenizer.from_pretrained(self.name, revision=self.revision)
            model, found = auto.from_pretrained(self.name, revision=self.revision, output_loading_info=True, **options)
        # transformers only warns of an output layer that it has drawn at random.
        made_up = sorted(key for key in found["missing_keys"] if not key.startswith(f"{model.base_model_prefix}."))
        if made_up:
            raise InputError(f"judge {self.name}: its files have no weights of {made_up[0]}; expected a trained {what}")
        return model

    def _placed(self, model: Any, device: str) -> Any:
        """The model, ready to judge on a device.

        Raises:
            InputError: there is no such device, or no room on it.
        """
        try:
            return model.eval().requires_grad_(False).to(device)
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"judge {self.name}: it cannot run on {device} ({one_line(error)})") from None

    @contextmanager
    def _loading(self, what: str) -> Iterator[None]:
        try:
            yield
        except (*UNLOADABLE, *UNREACHABLE) as error:
            raise InputError(f"judge {self.name}: the {what} cannot be loaded ({one_line(error)})") from None


def positions(model: torch.nn.Module) -> int:
    """How many tokens a model has positions for; RoBERTa's and Longformer's begin behind that of the padding."""
    found: int = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            found = min(found, module.num_embeddings - first)
    return found
