"""Evaluations that are refused before anything is loaded."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from src.adapters.peft_files import Adapter, read_seen
from src.data.rows import Row
from src.data.suite import Suite
from src.errors import InputError
from src.sandbox.run import check_isolation


def check_unseen(models: Mapping[str, Adapter | None], rows: Mapping[str, Sequence[Row]], base: str) -> None:
    """Check that no adapter was trained or calibrated on a prompt or goal of a suite, nor the base, where it is merged.

    Args:
        models: Adapters by the names of the models; nothing stands for the base alone.
        rows: Rows of each suite.
        base: Name of the base; a directory may say on what it was trained.

    Raises:
        InputError: one was; the message names the suite, the first row and the adapter.
    """
    below = read_seen(Path(base))
    for name, adapter in models.items():
        seen = below if adapter is None else below | adapter.seen
        for suite, asked in rows.items():
            both = [row for row in asked if seen & {row.prompt_hash, row.goal_hash}]
            if both:
                raise InputError(
                    f"suite {suite}: {len(both)} prompts, the first {both[0].id}, were used to train or calibrate "
                    f"{name}; evaluate on other rows (or pass --model.allow_seen true)"
                )


def check_programs(suites: Sequence[Suite], *, allow: bool) -> None:
    """Check that programs can be run in the end, before answers are generated.

    Raises:
        InputError: a suite has programs, this machine cannot isolate them and ``allow`` is false.
    """
    if not allow and any(suite.kind == "code" and suite.generates for suite in suites):
        check_isolation()


def check_sampling(suites: Sequence[Suite]) -> None:
    """Check that no suite samples: sharded weights decode greedily.

    Raises:
        InputError: one does.
    """
    for suite in suites:
        if suite.generates and suite.temperature > 0:
            raise InputError(
                f"suite {suite.name}: answers are sampled (temperature {suite.temperature:g}), which weights sharded "
                "over processes do not allow; use another --trainer file"
            )
