"""Random masks that are functions of (seed, expert, module, row): the same for any order, sharding or thread count.

Each (seed, expert, module) seeds one PCG64 stream by SHA-256; the element of row i and column j always takes the 32-bit
word number i·I + j of it, so any block of rows can be drawn alone.
"""

import hashlib

import numpy as np
import torch

WORD = 1 << 32


def keyed_words(seed: int, key: str, module: str, rows: slice, columns: int) -> np.ndarray:
    """(rows, columns) uniform 32-bit words of some rows of a module."""
    digest = hashlib.sha256(f"{seed}\0{key}\0{module}".encode()).digest()
    stream = np.random.PCG64DXSM(np.random.SeedSequence(int.from_bytes(digest, "little")))
    first, last = rows.start * columns, rows.stop * columns
    stream.advance(first // 2)
    drawn: np.ndarray = stream.random_raw((last + 1) // 2 - first // 2).view(np.uint32)
    return drawn[first % 2 : first % 2 + last - first].reshape(rows.stop - rows.start, columns)


def bernoulli(probability: float, seed: int, key: str, module: str, rows: slice, columns: int) -> torch.Tensor:
    """(rows, columns) mask, true with this probability (to 2⁻³²)."""
    words = keyed_words(seed, key, module, rows, columns)
    return torch.from_numpy(words < np.uint32(min(WORD - 1, round(probability * WORD))))


def uniform(seed: int, key: str, module: str, rows: slice, columns: int) -> torch.Tensor:
    """(rows, columns) uniform numbers in [0, 1), float64."""
    return torch.from_numpy(keyed_words(seed, key, module, rows, columns) / float(WORD))
