"""A line on how far a long evaluation or Fisher pass is: rows done, rows per second, time left."""

import logging
import time

log = logging.getLogger(__name__)

EVERY = 20.0
"""Seconds between two lines."""


class Progress:
    """Counts rows and tells of them from time to time.

    Args:
        total: Rows to do, in this process.
    """

    def __init__(self, total: int) -> None:
        self.total, self.done, self.known = total, 0, 0
        self._started = self._told = time.monotonic()

    def skip(self, rows: int) -> None:
        """Leave out rows that an earlier run has done: they take no time."""
        self.known += rows

    def advance(self, rows: int, where: str) -> None:
        """Count rows; says so where enough time has passed."""
        self.done += rows
        now = time.monotonic()
        if now - self._told >= EVERY:
            self._told = now
            log.info("%s: %s", where, self.line(now - self._started))

    def line(self, seconds: float) -> str:
        """Progress after so many seconds."""
        done = self.done + self.known
        place = f"{done} of {self.total} rows"
        if not self.done:
            return place
        rate = self.done / seconds
        return f"{place}, {rate:.1f} rows/s, {(self.total - done) / rate:.0f} s left"
