"""What stops one process stops all: the others would wait for it for ever in the next collective operation."""

from collections.abc import Iterable

import torch.distributed

from src.errors import InputError


def stop_together(problems: Iterable[str]) -> None:
    """Stop where a process has met a problem; a collective operation, for all processes at the same place.

    Args:
        problems: Those of this process, in words; empty ones are none.

    Raises:
        InputError: there is one, on this process or another.
    """
    found = list(filter(None, problems))
    if torch.distributed.is_initialized():
        parts: list[list[str]] = [[] for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather_object(parts, found)
        found = [problem for part in parts for problem in part]
    if found:
        raise InputError(found[0])
