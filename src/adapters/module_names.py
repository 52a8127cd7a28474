"""Names of text layers in models that also see or hear: transformers 4.52 moved them, and adapters keep the old names.

``language_model.model.layers.0`` became ``model.language_model.layers.0``, and ``language_model.lm_head`` ``lm_head``.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from src.adapters.peft_weights import AdapterWeights
from src.errors import InputError

EARLIER, LATER = "language_model.model.", "model.language_model."
HEADS = {"language_model.lm_head": "lm_head"}
T = TypeVar("T")


def later_name(module: str) -> str:
    """A module's name since transformers 4.52."""
    return HEADS.get(module) or (LATER + module.removeprefix(EARLIER) if module.startswith(EARLIER) else module)


def with_later_names(path: Path, values: Mapping[str, T]) -> dict[str, T]:
    """What is known of modules, in the same order, by their later names.

    Raises:
        InputError: a module is there under both of its names.
    """
    found: dict[str, T] = {}
    for module, value in values.items():
        name = later_name(module)
        if name in found:
            raise InputError(f"{path}: updates {name} under two names, one of before transformers 4.52; expected one")
        found[name] = value
    return found


def weights_by_later_names(path: Path, found: AdapterWeights) -> AdapterWeights:
    """An adapter's tensors by their modules' later names.

    Raises:
        InputError: a module is there under both of its names.
    """
    by_module = ("factors", "biases", "magnitudes", "saved", "saved_biases")
    renamed = {part: with_later_names(path, getattr(found, part)) for part in by_module}
    return replace(found, embeddings={later_name(module) for module in found.embeddings}, **renamed)
