"""The column blocks in which scores are widened to float64: they bound the memory of every product."""

from collections.abc import Iterator

COLUMNS = 8192
"""Greatest width of a block."""
WIDE_ENTRIES = 2**24
"""Entries of a widened block (128 MiB), however many rows there are."""


def column_blocks(rows: int, dim: int) -> Iterator[slice]:
    """Slices of the coordinates whose blocks of so many rows are small enough to be widened."""
    width = max(64, min(COLUMNS, WIDE_ENTRIES // max(1, rows)))
    for start in range(0, dim, width):
        yield slice(start, min(start + width, dim))
