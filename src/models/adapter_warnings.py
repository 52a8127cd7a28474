"""Warnings of adapters that do not fit what goes through them: the base's chat template, rows that they have learnt."""

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from src.adapters.peft_files import Adapter
from src.data.chat import Template
from src.data.rows import Row

log = logging.getLogger(__name__)


def warn_of_templates(adapters: Sequence[Adapter], templates: Collection[Template], tokenizer: Any) -> None:
    """Warn of adapters that come with another chat template than the base's, by which prompts go in.

    Args:
        adapters: The adapters.
        templates: How prompts are wrapped; where all are bare, templates are of no interest.
        tokenizer: The base's.
    """
    if not set(templates) - {"raw"}:
        return
    used = tokenizer.chat_template
    if isinstance(used, dict):  # several by name
        used = used.get("default")
    for adapter in adapters:
        if adapter.template is None or adapter.template.strip() == (used or "").strip():
            continue
        log.warning(
            "%s: the chat template beside it is not read, and %s; where it was trained with its own, put that into a "
            "local copy of the base (docs/your_model.md, Prompts)",
            adapter.name,
            "prompts go in by the base's, which is another" if used else "the base has none: prompts go in as they are",
        )


def warn_of_learnt(adapters: Sequence[Adapter], rows: Mapping[str, Sequence[Row]]) -> None:
    """Warn of rows that adapters have learnt: Fisher information there is not that of prompts they have not seen.

    Args:
        adapters: The adapters; what they have learnt is known of those that were made here.
        rows: Calibration rows by the option that names them.
    """
    for option, asked in rows.items():
        for adapter in adapters:
            if learnt := sum(row.prompt_hash in adapter.seen for row in asked):
                log.warning(
                    "%s: %d of %d prompts were used to train or calibrate %s, whose scores on them are not those on "
                    "prompts that it has not seen; expected other rows",
                    option,
                    learnt,
                    len(asked),
                    adapter.name,
                )
