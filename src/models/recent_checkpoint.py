"""One checkpoint of the last minutes of a training, which a kill does not cost more than."""

import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

from lightning import Callback, Trainer
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment


class RecentCheckpoint(Callback):
    """Keeps one checkpoint of the last minutes of a training, and of the step at which SIGTERM or Ctrl-C ends it.

    Ctrl-C waits for the end of a batch (of a validation, where one has begun); a second one ends the training at once.
    Several processes hear of both at different batches: they have the checkpoint of the last minutes.

    It is no ``ModelCheckpoint``: those of the configuration alone say which checkpoint is the best.

    Args:
        path: File to write.
    """

    EVERY = 600.0
    """Seconds from one time to the next."""
    TOGETHER = 64
    """Most batches after which several processes ask the first whether it is time: an answer makes them wait for it."""
    ASKED = 60.0
    """Seconds after which they ask it, as long as batches take."""
    WAITS = b"\nCtrl-C: the training stops after this batch, with a checkpoint; again, it stops at once, without one\n"
    """What the first Ctrl-C says."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._saved = self._asked = 0.0
        self._batches, self._left = 0, 1
        self._requeued: int | None = None
        self._interrupted = False
        self._handler: Any = None

    def on_train_start(self, trainer: Trainer, *_args: Any) -> None:
        """Start the clock, take over Ctrl-C, and let several processes answer SLURM's signal together."""
        self._saved = self._asked = time.monotonic()
        self._batches, self._left = 0, 1
        self._requeued = None
        if trainer.world_size == 1 and threading.current_thread() is threading.main_thread():
            self._interrupted, self._handler = False, signal.signal(signal.SIGINT, self._on_interrupt)
        environment = getattr(trainer.strategy, "cluster_environment", None)
        if trainer.world_size > 1 and isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            # Lightning's handler writes a checkpoint, for which all must be at the same step, wherever it comes.
            signal.signal(environment.requeue_signal or signal.SIGUSR1, self._on_requeue)

    def on_train_end(self, *_args: Any) -> None:
        """Give Ctrl-C back."""
        self._give_back()

    def on_exception(self, _trainer: Trainer, _module: Any, exception: BaseException) -> None:
        """Give Ctrl-C back, but after Ctrl-C: Lightning lets no second one disturb its answer to the first."""
        if not isinstance(exception, KeyboardInterrupt):
            self._give_back()

    def _give_back(self) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
            self._handler = None

    def _on_interrupt(self, _number: int, _frame: FrameType | None) -> None:
        self._interrupted = True
        self._give_back()
        os.write(2, self.WAITS)  # a stream may be in the middle of a line

    def _on_requeue(self, number: int, _frame: FrameType | None) -> None:
        self._requeued = number

    def on_train_batch_end(self, trainer: Trainer, *_args: Any) -> None:
        """Save where it is time to; a collective operation.

        Raises:
            KeyboardInterrupt: Ctrl-C has come, and there is a checkpoint of this batch.
        """
        self._batches, self._left = self._batches + 1, self._left - 1
        if trainer.world_size > 1 and self._left > 0:
            return
        loop: Any = trainer.fit_loop
        # A run that goes on from here would leave out the validation that comes next.
        validates = trainer.is_last_batch or loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
        # Several processes learn of a signal at different batches, and cannot write together then.
        stopped = self._interrupted or (trainer.received_sigterm and trainer.world_size == 1)
        now = time.monotonic()
        due = stopped or now - self._saved >= self.EVERY
        each = (now - self._asked) / self._batches
        left = max(1, min(self.TOGETHER, int(self.ASKED / max(each, 1e-6))))
        asked = (due and not validates, left, None if validates else self._requeued)
        save, self._left, requeued = trainer.strategy.broadcast(asked)
        self._asked, self._batches = now, 0
        if requeued is not None:
            self._requeued = None
            connector: Any = trainer._signal_connector
            connector._slurm_sigusr_handler_fn(requeued, None)
        elif save:
            trainer.save_checkpoint(self.path)
            self._saved = time.monotonic()
            if self._interrupted:
                raise KeyboardInterrupt
