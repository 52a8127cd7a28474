"""PEFT's adapter configuration: what of it pairs can express, the scaling it implies, and one for written pairs.

A merge works on updates of weights, ``y = (W + ΔW) x``. A trained bias of B (``lora_bias``) is one, of an input that is
always 1 (:mod:`src.adapters.constant_input`).
"""

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.adapters.base_weights import on_hub
from src.errors import InputError

FULL_RANK = {"use_dora": "DoRA's update", "modules_to_save": "that of fully trained modules"}
"""What is exact as full-rank updates, given the base's weights."""
UNSUPPORTED = {
    "trainable_token_indices": "trained tokens",
    "target_parameters": "updates of bare parameters",
    "alora_invocation_tokens": "an update that is active from some token on",
    "use_qalora": "QALoRA's pooled inputs",
    "use_bdlora": "BD-LoRA's block-diagonal factor",
    "layer_replication": "replicated layers",
    "arrow_config": "routed updates",
}
TASKS = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
SCALING = ("r", "rank_pattern", "lora_alpha", "alpha_pattern", "use_rslora")
"""Settings that decide the factor of B A."""
LARGEST = sys.float_info.max
"""Of JSON's whole numbers, those above are no number of floating point."""
MAIN = "main"
"""The revision of a hub repository where none is named."""
UNSLOTH = "unsloth"
"""What Unsloth wrote as the base's revision in 2024; no repository has it (unslothai/unsloth, issue 492)."""
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings of the names of initialisations that subtract the adapter's start from the base."""


@dataclass(frozen=True)
class Layout:
    """How updates lie in the model.

    Attributes:
        embeddings: Modules that look rows up; their update (V, d) is that of the table.
        transposed: Whether the model has layers that store their weight as (I, O), GPT-2's Conv1D.
        constant: Modules whose update (O, I + 1) has a last column for an input that is always 1: LoRA biases.
        task: PEFT's ``task_type``, which decides the class that loads the adapter; unset where none is named.
    """

    embeddings: frozenset[str] = frozenset()
    transposed: bool = False
    constant: frozenset[str] = frozenset()
    task: str | None = None

    def __or__(self, other: "Layout") -> "Layout":
        """The layout of a model that both fit."""
        return Layout(
            self.embeddings | other.embeddings,
            self.transposed or other.transposed,
            self.constant | other.constant,
            self.task or other.task,
        )


PLAIN = Layout()
"""Linear layers only."""


def check_config(path: Path, config: dict[str, Any], *, full_rank: bool) -> None:
    """Check that updates of weights can express all that the adapter does.

    Args:
        path: The configuration's file, for messages.
        config: The configuration.
        full_rank: Whether full-rank updates can be made, the base's weights being at hand.

    Raises:
        InputError: they cannot; the message names the file and the key.
    """
    if not isinstance(config, dict):
        raise InputError(f"{path}: holds a {type(config).__name__}; expected the settings of a PEFT LoRA adapter")
    kind = config.get("peft_type")
    if kind != "LORA":
        raise InputError(f"{path}: peft_type is {kind!r}; expected 'LORA'")
    _check_types(path, config)
    for key, what in FULL_RANK.items():
        if config.get(key) and not full_rank:
            raise InputError(
                f"{path}: {key} is set; {what} is no low-rank update. `merge --utility {path.parent} --base BASE "
                "--rank N --output FOLDER` makes it one; merge and inspect take it as it is with --base BASE"
            )
    for key, what in UNSUPPORTED.items():
        if config.get(key):
            raise InputError(f"{path}: {key} is set; {what} cannot be written as a low-rank update")
    _check_alphas(path, config)
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(CHANGES_BASE):
        raise InputError(
            f"{path}: init_lora_weights is {start!r}, with which PEFT changes the base's weights too; save the adapter "
            "with path_initial_model_for_weight_conversion, which makes it one of the unchanged base"
        )
    if config.get("bias", "none") != "none":
        raise InputError(
            f"{path}: bias is {config['bias']!r}; trained biases of the base are not a low-rank update; expected none "
            "(biases that PEFT trains beside B, lora_bias: true, can be merged)"
        )


def _check_types(path: Path, config: Mapping[str, Any]) -> None:
    """Check the types of the settings that are read, and that patterns are regular expressions.

    Raises:
        InputError: one is not; the message names the key.
    """
    task = config.get("task_type")
    if task is not None and task not in TASKS:
        raise InputError(f"{path}: task_type is {task!r}; expected one of {', '.join(TASKS)}")
    base, saved = config.get("base_model_name_or_path"), config.get("modules_to_save")
    if base is not None and not isinstance(base, str):
        raise InputError(f"{path}: base_model_name_or_path is {base!r}; expected the name of a model")
    if not isinstance(config.get("revision"), str | None):
        raise InputError(f"{path}: revision is {config['revision']!r}; expected a git revision of the base, or null")
    if saved and not (isinstance(saved, list) and all(isinstance(name, str) for name in saved)):
        raise InputError(f"{path}: modules_to_save is {saved!r}; expected a list of modules")
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict):
            raise InputError(f"{path}: {key} is {patterns!r}; expected a mapping from patterns of modules to numbers")
        for pattern in patterns:
            try:
                re.compile(_regex(pattern))
            except re.error as error:
                raise InputError(f"{path}: {key} has {pattern!r}, which is no regular expression ({error})") from None


def _regex(pattern: str) -> str:
    """PEFT's pattern of the ends of modules' names."""
    return rf"(.*\.)?({pattern})$"


def _check_alphas(path: Path, config: Mapping[str, Any]) -> None:
    alphas = {"lora_alpha": config.get("lora_alpha")} | (config.get("alpha_pattern") or {})
    for key, value in alphas.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not -LARGEST <= value <= LARGEST:
            raise InputError(f"{path}: the alpha of {key} is {value!r}; expected a finite number")


def named_base(config: Mapping[str, Any]) -> tuple[str, str | None]:
    """The base's name, empty where there is none, and its git revision.

    What lies here has none, and the main branch is what PEFT takes where none is named.
    """
    name, revision = config.get("base_model_name_or_path") or "", config.get("revision") or None
    return name, revision if revision not in (UNSLOTH, MAIN) and on_hub(name) else None


def scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    """The factor of ``B A`` in this module."""
    alpha = _pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank


def _pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the end of the module's name."""
    for pattern, value in (patterns or {}).items():
        if re.match(_regex(pattern), module):
            return value
    return default


def lora_config(ranks: Mapping[str, int], base: str, layout: Layout) -> dict[str, Any]:
    """What a file says of an adapter with these ranks and scaling 1."""
    more = {"task_type": layout.task or "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True}
    config = lora_settings(ranks, layout, **more).to_dict()
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}


def lora_settings(ranks: Mapping[str, int], layout: Layout, **more: Any) -> Any:
    """PEFT's configuration of updates with these ranks and scaling 1; ``more`` are further settings of it."""
    from peft import LoraConfig

    most = max(ranks.values())
    # PEFT takes a name for the end of one: where it is the end of another's too, only a whole expression tells.
    ambiguous = {name for name in ranks for other in ranks if other.endswith(f".{name}")}
    whole = {name: "^" * (name in ambiguous) + re.escape(name) for name in ranks}
    other = {whole[name]: rank for name, rank in ranks.items() if rank != most}
    return LoraConfig(
        r=most,
        lora_alpha=most,
        target_modules="|".join(map(re.escape, ranks)) if ambiguous else list(ranks),
        rank_pattern=dict(other),
        alpha_pattern=dict(other),
        fan_in_fan_out=layout.transposed,
        lora_bias=bool(layout.constant),
        **more,
    )
