"""A new LoRA adapter on a base model: what is asked for, and PEFT's making of it."""

import re
from dataclasses import dataclass, field
from math import inf
from typing import Any

import torch

from src.errors import InputError, one_line

NAMES = re.compile(r"\w+(,\w+)*")


@dataclass
class LoraSpec:
    """The low-rank adapter to train (2106.09685).

    Args:
        rank: Inner dimension r of the update.
        alpha: The update is scaled by alpha / rank (alpha / √rank with ``rslora``).
        targets: Names of the layers to adapt, a regular expression of whole names, or ``all-linear``.
        dropout: Probability that an input of the update is dropped in training.
        rslora: Rank-stabilised scaling (2312.03732).
    """

    rank: int = 8
    alpha: float = 16.0
    targets: str | list[str] = field(default_factory=lambda: "all-linear")
    dropout: float = 0.0
    rslora: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 < self.alpha < inf or not 0 <= self.dropout < 1:
            raise InputError(
                f"lora: rank {self.rank}, alpha {self.alpha}, dropout {self.dropout}; expected rank of at least 1, "
                "alpha above 0 and dropout in [0, 1)"
            )
        if isinstance(self.targets, str) and self.targets != "all-linear" and NAMES.fullmatch(self.targets):
            self.targets = self.targets.split(",")  # PEFT would take a text for a pattern of whole names


def add_lora(model: Any, spec: LoraSpec, seed: int) -> Any:
    """A base model with a new adapter, as PEFT's model.

    Args:
        model: The base model; its layers are changed in place.
        spec: The adapter.
        seed: Seed of its initial weights.

    Raises:
        InputError: a target names no layer of the model, or one that cannot be adapted.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,  # type: ignore[arg-type]
        target_modules=spec.targets,
        exclude_modules=beside_the_decoder(model) or None,
        lora_dropout=spec.dropout,
        use_rslora=spec.rslora,
        task_type=TaskType.CAUSAL_LM,
    )
    # On the CPU, whose generator alone is seeded: every device starts alike, and a GPU's dropout keeps its seed.
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            found = get_peft_model(model, config)
        except (ValueError, re.error) as error:
            raise InputError(f"lora.targets {spec.targets}: {one_line(error)}") from None
    # PEFT turns the layers of experts that transformers keeps in one parameter into these.
    if found.peft_config["default"].target_parameters:
        raise InputError(
            f"lora.targets {spec.targets}: this base's experts are bare parameters, whose updates no command "
            "reads; expected attention layers, such as [q_proj, k_proj, v_proj, o_proj]"
        )
    if isinstance(spec.targets, list):
        _check_all_found(spec.targets, found.base_model.targeted_module_names)
    return found


def _check_all_found(targets: list[str], adapted: list[str]) -> None:
    """Stop where a name matches no adapted layer; PEFT does so only where none of the names matches any."""
    missing = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in adapted)]
    if missing:
        kinds = sorted({name.rpartition(".")[2] for name in adapted})
        raise InputError(
            f"lora.targets: this base has no layer {', '.join(missing)} to adapt (adapted: {', '.join(kinds)}); "
            "expected names of its linear layers, or all-linear"
        )


def beside_the_decoder(model: Any) -> list[str]:
    """Names of modules that no text passes: the towers for images and sound of models that have some.

    An adapter there would have no gradient, which DDP takes for an error, and PEFT refuses targets that are no linear
    layers but hold one, as those towers have. Empty without a linear layer there.
    """
    known = {*model.get_decoder().modules(), model.get_output_embeddings()}
    beside = {name: one for name, one in model.named_modules() if known.isdisjoint(one.modules())}
    return list(beside) if any(isinstance(one, torch.nn.Linear) for one in beside.values()) else []
