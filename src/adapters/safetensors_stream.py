"""A safetensors file written one tensor at a time: memory stays that of the largest tensor.

Format: eight bytes with the header's length, the header (JSON: name to dtype, shape and byte range), the bytes.
"""

import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.complex64: "C64",
}


@dataclass(frozen=True)
class Entry:
    """A tensor to write: its key, dtype (one of ``NAMES``) and shape now, its values when its turn comes."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    values: Callable[[], torch.Tensor]

    @property
    def size(self) -> int:
        """Bytes."""
        return prod(self.shape) * self.dtype.itemsize


def write_stream(path: Path, entries: Sequence[Entry]) -> None:
    """Write the entries in their order."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        span = [offset, offset + entry.size]
        header[entry.key] = {"dtype": NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": span}
        offset = span[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for entry in entries:
            values = entry.values().contiguous()
            if values.dtype != entry.dtype or tuple(values.shape) != entry.shape:
                raise ValueError(f"{entry.key}: got {values.dtype} {tuple(values.shape)}, announced {entry.shape}")
            file.write(values.reshape(-1).view(torch.uint8).numpy().data)


def shards(entries: Sequence[Entry], most_bytes: int) -> list[list[Entry]]:
    """Split entries in their order into groups of at most this many bytes (or of one entry)."""
    groups: list[list[Entry]] = []
    room = 0
    for entry in entries:
        if not groups or entry.size > room:
            groups.append([])
            room = most_bytes
        groups[-1].append(entry)
        room -= entry.size
    return groups
