"""Finished parts of a Fisher pass on the disk: a killed pass goes on from its last one and gives the same numbers.

A shard holds what an accumulator took up over a fixed range of one process's steps. The result adds shards in their
order, so it does not depend on where a pass was cut. Each shard carries the key of its pass (a hash of everything that
its numbers depend on) and the SHA-256 of its tensors: one of another pass, or one that was damaged, is never read.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from src.errors import InputError
from src.files import write_atomically
from src.fisher.accumulate import mapped_tensor
from src.fisher.lowrank import LowRankFisher
from src.fisher.lowrank_accumulator import score_order

log = logging.getLogger(__name__)

RECORD = "sst_shard"
JOINED = "scores.joined"
"""File of the scores of all shards, in their folder: as large as they, and of use until the pass's file is written."""


def tensor_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, formats, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


@dataclass(frozen=True)
class Shards:
    """The shards of one pass.

    Attributes:
        folder: Where they lie; all processes see it.
        key: Hash of everything that the numbers depend on.
    """

    folder: Path
    key: str

    def _path(self, rank: int, number: int) -> Path:
        return self.folder / f"{rank:05d}-{number:06d}.safetensors"

    def write(self, rank: int, number: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write shard ``number`` of a process, atomically."""
        ready = {name: tensor.contiguous() for name, tensor in tensors.items()}
        record = {RECORD: json.dumps({"key": self.key, "sha256": tensor_digest(ready)})}
        write_atomically(self._path(rank, number), lambda path: save_file(ready, path, metadata=record))

    def read(self, rank: int, number: int) -> dict[str, torch.Tensor] | None:
        """The tensors of a shard, mapped; None where it is absent, damaged or of another pass."""
        path = self._path(rank, number)
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as handle:
                record = dict(json.loads((handle.metadata() or {})[RECORD]))
                if record["key"] != self.key:
                    return None
                tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - not a dict
        except (SafetensorError, ValueError, TypeError, KeyError) as error:
            # Bits may have changed in the tensors' directory, in the record, or in the name of the record.
            log.warning("%s is damaged (%s): its rows are measured again", path, error)
            return None
        if tensor_digest(tensors) != record.get("sha256"):
            log.warning("%s does not match its checksum: its rows are measured again", path)
            return None
        return tensors

    def numbers(self, rank: int) -> set[int]:
        """Numbers of a process's sound shards."""
        names = [path.stem.split("-") for path in self.folder.glob(f"{rank:05d}-*.safetensors")]
        return {int(number) for _, number in names if self.read(rank, int(number)) is not None}

    def of(self, rank: int | None = None) -> Iterator[dict[str, torch.Tensor]]:
        """Sound shards of a process, in the order of steps; unset means all processes, in their order."""
        process = "*" if rank is None else f"{rank:05d}"
        for path in sorted(self.folder.glob(f"{process}-*.safetensors")):
            tensors = self.read(*map(int, path.stem.split("-")))
            if tensors is not None:
                yield tensors


def join_scores(shards: Shards, rows: int) -> LowRankFisher:
    """One low-rank Fisher matrix of all shards; its scores are a mapped file in the shards' folder.

    Args:
        shards: Shards with ``scores`` (k, D), ``keys`` (k, 2: row and answer token), ``weights`` (k,) and ``counts``;
            one of no row has none of them.
        rows: Number of rows that must occur.

    Raises:
        InputError: a row is missing or occurs in two shards, such as when processes don't share the folder.
    """
    parts = [part for part in shards.of() if "scores" in part]
    found = [(part["keys"], part["counts"].sum().item(), part["scores"]) for part in parts]
    keys = torch.cat([keys for keys, _, _ in found]) if found else torch.zeros(0, 2, dtype=torch.int64)
    count = round(sum(count for _, count, _ in found))
    seen = len(keys[:, 0].unique())
    if seen != rows or len(keys) % max(count, 1) or len(keys.unique(dim=0)) != count:
        raise InputError(
            f"{shards.folder}: {seen} of {rows} rows, {len(keys)} scores of {count} examples; expected each row once "
            "(all processes must write to one file system); run the same command again"
        )
    whole = score_order(keys, torch.cat([part["weights"] for part in parts]), count)
    places = torch.empty_like(whole.order).index_copy_(0, whole.order, torch.arange(len(keys)))
    first = found[0][2]
    path = shards.folder / JOINED
    path.unlink(missing_ok=True)
    scores = mapped_tensor(path, (len(keys), first.shape[1]), first.dtype)
    for (_, _, part), place in zip(found, places.split([len(own) for own, _, _ in found]), strict=True):
        scores[place] = part
    return LowRankFisher(scores, count, whole.groups, weights=whole.weights)
