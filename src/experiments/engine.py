"""The engine: computes the cells of a grid that are not known yet, beside any number of other processes that do so.

What is to be computed is settled anew before every step from what is on the disk, so a process that was killed, or
joins late, goes on where all of them together stand.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from src.errors import InputError
from src.experiments.cell import Cell, closure
from src.experiments.claim_files import Claims
from src.experiments.store import Record, Store
from src.experiments.timing import hours, time_left

log = logging.getLogger(__name__)

Compute = Callable[[Sequence[Cell]], Mapping[str, Record]]
"""Computes cells of one batch: key to result. Weights are in place when it returns."""
ORDER = ("given", "merge", "inspect", "fit", "fisher", "test")
"""Stages in the order in which ready cells are taken: merges take seconds and make evaluations ready, which wait until
they fill a command, to share one load of the base."""
POLL = 2.0
"""Seconds between looks at what other processes have finished."""


class CellError(Exception):
    """A cell could not be computed; the message says why."""


BROKEN = (CellError, OSError, KeyError, ValueError)
"""What a cell may fail by: its command, a file that it left broken or not at all, a key or value that is not there."""


@dataclass
class Outcome:
    """How a grid ended: cells computed by this process, why cells failed, and cells that need a failed one."""

    computed: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    blocked: list[Cell] = field(default_factory=list)


def to_compute(grid: Sequence[Cell], store: Store) -> list[Cell]:
    """Cells without a result, and those whose weights such cells need; what is needed first."""
    needed: set[str] = set()

    def need(cell: Cell) -> None:
        if cell.key not in needed:
            needed.add(cell.key)
            for parent in cell.parents:
                if not (store.has_result(parent) and store.has_weights(parent)):
                    need(parent)

    cells = closure(grid)
    for cell in cells:
        if not store.has_result(cell):
            need(cell)
    return [cell for cell in cells if cell.key in needed]


class Engine:
    """Works on a grid.

    Args:
        grid: The cells.
        store: Where results and weights are kept.
        compute: Computes a batch.
        batch_size: Most cells that one command computes.
        stale_after: Seconds after which an untouched claim of another host counts as left behind.
    """

    def __init__(
        self, grid: Sequence[Cell], store: Store, compute: Compute, *, batch_size: int = 8, stale_after: float = 600.0
    ) -> None:
        self.grid, self.store, self.compute, self.batch_size = closure(grid), store, compute, batch_size
        self.claims = Claims(store.claims, stale_after)
        self.started = self.claims.now()
        self.outcome = Outcome()

    def run(self) -> Outcome:
        """Compute until nothing is left that this process can do, or wait for."""
        try:
            while todo := self._possible(to_compute(self.grid, self.store)):
                ready = [cell for cell in todo if self._is_ready(cell)]
                batch = self._take(self._in_order(ready))
                if batch:
                    self._work(batch)
                else:
                    time.sleep(POLL)
        finally:
            self.claims.close()
        self.outcome.blocked = [c for c in to_compute(self.grid, self.store) if c.key not in self.outcome.failed]
        return self.outcome

    def _possible(self, todo: Sequence[Cell]) -> list[Cell]:
        """What is left without cells that failed, and without those that need them."""
        out: set[str] = set()
        found: list[Cell] = []
        for cell in todo:
            if self._has_failed(cell) or any(parent.key in out for parent in cell.parents):
                out.add(cell.key)
            else:
                found.append(cell)
        return found

    def _has_failed(self, cell: Cell) -> bool:
        """Whether a cell failed here, or in another process since this one started; earlier ones are tried again."""
        if cell.key not in self.outcome.failed:
            message = self.store.failure(cell, since=self.started)
            if message is not None:
                log.warning("failed in another process: %s: %s", cell.label, message)
                self.outcome.failed[cell.key] = message
        return cell.key in self.outcome.failed

    def _is_ready(self, cell: Cell) -> bool:
        return all(self.store.has_result(parent) and self.store.has_weights(parent) for parent in cell.parents)

    def _in_order(self, ready: Sequence[Cell]) -> list[Cell]:
        """By stage; with two exceptions.

        Evaluations come first once they fill a command, for then merged weights can go from the disk. Trainings whose
        adapter only one cell needs come last, with that cell: what shares its experts has been evaluated by then.
        """
        waiting = Counter(cell.batch for cell in ready if cell.stage == "test")
        full = {batch for batch, count in waiting.items() if count >= self.batch_size}
        users = Counter(parent.key for cell in self.grid for parent in cell.parents)

        def is_one_off(cell: Cell) -> bool:
            return cell.stage == "fit" and users[cell.key] == 1

        def place(cell: Cell) -> int:
            if cell.batch in full:
                return -1
            late = is_one_off(cell) or any(map(is_one_off, cell.parents))
            return ORDER.index(cell.stage) + late * len(ORDER)

        return sorted(ready, key=place)

    def _take(self, ready: Sequence[Cell]) -> list[Cell]:
        """Claim the first cell that is free, and others of its batch."""
        batch: list[Cell] = []
        for cell in ready:
            fits = not batch or (cell.batch and cell.batch == batch[0].batch and cell.stage == batch[0].stage)
            if fits and len(batch) < self.batch_size and self.claims.take(cell.key):
                batch.append(cell)
        # Another process may have finished a cell, or failed, between our look at the disk and our claim.
        if batch:
            self.store.look_anew()
        still = {cell.key for cell in self._possible(to_compute(self.grid, self.store))}
        for cell in batch:
            if cell.key not in still:
                self.claims.release(cell.key)
        return [cell for cell in batch if cell.key in still]

    def _work(self, batch: Sequence[Cell]) -> None:
        log.info("%s: %s", batch[0].stage, "; ".join(cell.label for cell in batch))
        try:
            self._compute(batch)
        finally:
            for cell in batch:
                self.claims.release(cell.key)
        self._show_progress()

    def _compute(self, batch: Sequence[Cell]) -> None:
        """Compute a batch; where it fails, each of its cells alone, so that a bad one does not hide the others."""
        try:
            records = self.compute(batch)
        except BROKEN as error:
            if not all(map(self._is_ready, batch)):
                # Another study on this folder was through with merged weights that it shares with this one.
                log.info("%s: what it is made of is gone, and is made again", batch[0].label)
                return
            if len(batch) > 1:
                for cell in batch:
                    self._compute([cell])
                return
            told = isinstance(error, CellError | InputError)
            message = str(error) if told else f"{type(error).__name__}: {error}"
            log.warning("failed: %s: %s", batch[0].label, message, exc_info=not told)
            self.outcome.failed[batch[0].key] = message
            self.store.fail(batch[0], message)
            return
        for cell in batch:
            self.store.finish(cell, records[cell.key])
            self.outcome.computed += 1
        self._drop_merges(batch)

    def _drop_merges(self, batch: Sequence[Cell]) -> None:
        """Remove merged weights that no cell of the grid waits for: they are large, and made again in seconds."""
        waiting = {parent.key for cell in self.grid if not self.store.has_result(cell) for parent in cell.parents}
        for cell in batch:
            for parent in cell.parents:
                if parent.stage == "merge" and parent.key not in waiting:
                    self.store.drop_weights(parent)

    def _show_progress(self) -> None:
        todo = to_compute(self.grid, self.store)
        left = time_left(todo, self.store)
        failed = f", {len(self.outcome.failed)} failed" if self.outcome.failed else ""
        known = len(self.grid) - len(todo)
        log.info("%d of %d cells%s, %s left", known, len(self.grid), failed, hours(left))
