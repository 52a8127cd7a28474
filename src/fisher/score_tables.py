"""Tables of scores that may outgrow the memory: a mapped file, and several tables as one. Both give column blocks.

A mapped file takes memory as it is read, and the kernel takes it back when memory is short. :func:`release` gives it
back at once: a pass over the columns then holds little more than the block that it works on.

Legend of shapes: M rows, D coordinates.
"""

import json
import mmap
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

LENGTH = 8
"""Bytes at the start of a safetensors file that hold the length of its directory."""
DTYPES = {"F32": torch.float32, "F64": torch.float64}
COLUMNS = 8192
"""Greatest width of a column block that is widened to float64."""
WIDE_ENTRIES = 2**24
"""Entries of such a block (128 MiB), however many rows there are."""


class Table(Protocol):
    """What scores are read through; a tensor is one."""

    @property
    def shape(self) -> Sequence[int]:
        """(M, D)."""

    @property
    def ndim(self) -> int:
        """Two."""

    def __getitem__(self, place: tuple[slice, slice], /) -> torch.Tensor:
        """A block of rows and columns."""


class MappedTable:
    """A table in a safetensors file, mapped to be read only; it can be neither copied nor sent to other processes.

    Args:
        path: The file, sound.
        key: Name of the tensor, (M, D) in float32 or float64.
    """

    ndim = 2

    def __init__(self, path: Path, key: str) -> None:
        with path.open("rb") as handle:
            length = int.from_bytes(handle.read(LENGTH), "little")
            entry = json.loads(handle.read(length))[key]
            self._pages = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        first, last = entry["data_offsets"]
        dtype = DTYPES[entry["dtype"]]
        with warnings.catch_warnings():  # torch knows no tensors that can't be written to; nothing writes to this one
            warnings.simplefilter("ignore", UserWarning)
            count, offset = (last - first) // dtype.itemsize, LENGTH + length + first
            self._table = torch.frombuffer(self._pages, dtype=dtype, count=count, offset=offset).view(entry["shape"])

    @property
    def shape(self) -> Sequence[int]:
        """(M, D)."""
        return self._table.shape

    def __getitem__(self, place: tuple[slice, slice], /) -> torch.Tensor:
        """A view of a block."""
        return self._table[place]

    def release(self) -> None:
        """Give the pages back that were read; they are read again when they are needed."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._pages.madvise(mmap.MADV_DONTNEED)


@dataclass(frozen=True)
class StackedTables:
    """Several tables as one, each scaled.

    Attributes:
        tables: (M_i, D) each.
        chosen: Rows of each that count; None for all.
        factors: Factor of each.
    """

    tables: Sequence[Table]
    chosen: Sequence[torch.Tensor | None]
    factors: Sequence[float]
    ndim = 2

    @property
    def shape(self) -> Sequence[int]:
        """(M, D)."""
        rows = [t.shape[0] if own is None else len(own) for t, own in zip(self.tables, self.chosen, strict=True)]
        return (sum(rows), self.tables[0].shape[1])

    def __getitem__(self, place: tuple[slice, slice], /) -> torch.Tensor:
        """A block in float64."""
        rows, columns = place
        parts = zip(self.tables, self.chosen, self.factors, strict=True)
        return torch.cat([rows_of(table, own, columns).double() * factor for table, own, factor in parts])[rows]


def rows_of(table: Table, chosen: torch.Tensor | None, columns: slice) -> torch.Tensor:
    """Chosen rows of a column block, or all: a view where the table is one tensor and no rows are chosen."""
    block = table[:, columns]
    return block if chosen is None else block[chosen]


def column_blocks(rows: int, dim: int) -> Iterator[slice]:
    """Slices of the coordinates whose blocks of so many rows are small enough to be widened: they bound a product."""
    width = max(64, min(COLUMNS, WIDE_ENTRIES // max(1, rows)))
    for start in range(0, dim, width):
        yield slice(start, min(start + width, dim))


def release(table: Table) -> None:
    """Give back the memory of what was read of mapped files; their data stay where they are."""
    if isinstance(table, MappedTable):
        table.release()
    elif isinstance(table, StackedTables):
        for part in table.tables:
            release(part)
