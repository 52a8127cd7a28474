"""The Fisher file: one safetensors file of scores, of the bases that define their coordinates, and of provenance."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from src.errors import InputError
from src.files import write_atomically
from src.fisher.lowrank import LowRankFisher

RECORD = "sst_fisher"


@dataclass(frozen=True)
class FisherFile:
    """A Fisher matrix and what it is of.

    Attributes:
        fisher: The matrix.
        u: (O, p) output basis of each module, in the order of the coordinates.
        v: (I, q) input basis of each module.
        record: Provenance: labels, seed, rows, prompt hashes, base, reference point, adapters, versions, settings.
    """

    fisher: LowRankFisher
    u: dict[str, torch.Tensor]
    v: dict[str, torch.Tensor]
    record: dict[str, Any]

    def save(self, path: Path) -> None:
        """Write the file atomically."""
        tensors = {"scores": self.fisher.scores.contiguous()}
        tensors |= {f"u.{name}": matrix.contiguous() for name, matrix in self.u.items()}
        tensors |= {f"v.{name}": matrix.contiguous() for name, matrix in self.v.items()}
        record = self.record | {"modules": list(self.u), "count": self.fisher.count, "representation": "lowrank"}
        metadata = {RECORD: json.dumps(record, ensure_ascii=False)}
        write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def load_fisher(path: Path) -> FisherFile:
    """Read and check a Fisher file.

    Raises:
        InputError: the file is missing or broken, is no Fisher file, or holds NaN or infinite values; the message
            names the file and, for bad values, the module.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected a Fisher file (made by `python -m src fisher`)")
    try:
        with safe_open(path, "pt") as handle:
            metadata = handle.metadata() or {}
            if RECORD not in metadata:
                raise InputError(f"{path}: not a Fisher file (no {RECORD} record in its metadata)")
            record = json.loads(metadata[RECORD])
            scores = handle.get_tensor("scores")
            u = {name: handle.get_tensor(f"u.{name}") for name in record["modules"]}
            v = {name: handle.get_tensor(f"v.{name}") for name in record["modules"]}
    except SafetensorError as error:
        raise InputError(f"{path}: not a readable safetensors file ({error})") from None
    sizes = [u[name].shape[1] * v[name].shape[1] for name in u]
    if scores.shape[1] != sum(sizes):
        raise InputError(f"{path}: scores have {scores.shape[1]} coordinates, the bases {sum(sizes)}")
    for name, block in zip(u, scores.split(sizes, dim=1), strict=True):
        if not torch.isfinite(block).all():
            raise InputError(f"{path}: the scores of {name} hold NaN or infinite values")
    return FisherFile(LowRankFisher(scores, record["count"]), u, v, record)
