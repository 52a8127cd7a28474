"""What a base model is made of where weights alone do not tell: its embedding, its output head, transposed layers.

The model is built from its configuration without weights (on the device ``meta``), so names and classes are those that
transformers gives them.
"""

import logging
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from src.adapters.attach import is_conv1d
from src.adapters.base_weights import BaseWeights
from src.errors import one_line
from src.files import read_json

log = logging.getLogger(__name__)
CONFIG = "config.json"
EMBEDDINGS = frozenset({"model.embed_tokens", "transformer.wte", "gpt_neox.embed_in"})
HEAD = "lm_head"


@dataclass(frozen=True)
class Architecture:
    """Parts of a model.

    Attributes:
        embeddings: Names that the module which looks tokens up may have.
        head: Module that gives the logits.
        tied: Whether both share one weight.
        transposed: Modules that store their weight as (I, O), as GPT-2's Conv1D.
        modules: All modules; none where transformers could not build the model.
    """

    embeddings: frozenset[str]
    head: str
    tied: bool
    transposed: frozenset[str] = frozenset()
    modules: frozenset[str] = frozenset()

    def stores_transposed(self, module: str, *, told: bool) -> bool:
        """Whether a module's weight is stored as (I, O); an adapter's word (``told``) counts where nothing else tells.

        PEFT's layers on quantised bases, for one, disregard an adapter's ``fan_in_fan_out`` and keep it.
        """
        return module in self.transposed or (told and module not in self.modules)

    def embedding_key(self, base: BaseWeights) -> str | None:
        """The key of the embedding's weight."""
        return next((key for name in sorted(self.embeddings) if (key := base.key_of(name))), None)


@lru_cache(maxsize=32)
def read_architecture(folder: Path) -> Architecture:
    """Parts of the model in a directory; the usual names where transformers cannot build it, or weights lie alone.

    Raises:
        InputError: its configuration is broken.
    """
    if not (folder / CONFIG).is_file():
        return Architecture(EMBEDDINGS, HEAD, tied=True)
    config = read_json(folder / CONFIG, "the configuration of the base model")
    usual = Architecture(EMBEDDINGS, HEAD, bool(config.get("tie_word_embeddings", True)))
    try:
        from transformers import AutoConfig, AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    except (ValueError, KeyError, OSError, ImportError, RuntimeError) as error:
        reason = one_line(error)[:120]
        log.warning(
            "%s: transformers cannot build this model (%s); its parts are taken to have the usual names", folder, reason
        )
        return usual
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = names.get(id(model.get_input_embeddings())), names.get(id(model.get_output_embeddings()))
    return Architecture(
        usual.embeddings if embedding is None else frozenset({embedding}),
        head or HEAD,
        usual.tied,
        frozenset(name for name, module in model.named_modules() if is_conv1d(module)),
        frozenset(names.values()),
    )
