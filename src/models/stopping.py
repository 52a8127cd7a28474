"""What stops a run: a problem of one process stops all, which would wait for it for ever; SIGTERM stops every loop."""

from collections.abc import Iterable
from typing import Any

import torch.distributed
from lightning import Callback, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from src.errors import InputError
from src.signals import interrupt_at_sigterm


class StopAtSigterm(Callback):
    """Ends a prediction loop at SIGTERM, as Lightning (2.6) does with its other loops: after the batch at hand.

    What follows the last batch of an evaluation or a Fisher pass (grading, joining, writing) may take hours, and no
    loop looks for a signal there: it interrupts.

    Lightning's handler broadcasts where there are several processes: met in another step than theirs, it lets all wait
    for each other for ever. There, the signal interrupts a process at once, as Ctrl-C does, and the others end with it.
    """

    def on_train_start(self, trainer: Trainer, *_args: Any, **_kwargs: Any) -> None:
        """Take the handler's place, once Lightning has put it there."""
        if trainer.world_size > 1:
            interrupt_at_sigterm()

    on_sanity_check_start = on_validation_start = on_test_start = on_predict_start = on_train_start

    def on_predict_batch_end(self, trainer: Trainer, *_args: Any, **_kwargs: Any) -> None:
        """Stop, where the signal has come.

        Raises:
            SIGTERMException: it has.
        """
        if trainer.received_sigterm:
            raise SIGTERMException

    def on_test_epoch_end(self, trainer: Trainer, *_args: Any, **_kwargs: Any) -> None:
        """Let the signal interrupt what follows; Lightning puts the handler from before its run back in any case.

        Raises:
            SIGTERMException: the signal has come.
        """
        interrupt_at_sigterm()
        if trainer.received_sigterm:
            raise SIGTERMException

    on_predict_epoch_end = on_test_epoch_end


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
