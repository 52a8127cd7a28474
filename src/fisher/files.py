"""The Fisher file: one safetensors file of a Fisher matrix, of the bases that define its coordinates, and a record.

The record names the representation, the modules and the coordinates; tensors are ``u.MODULE`` and ``v.MODULE`` (core
coordinates only), those of the representation, and ``mean`` where mean signed scores were taken too, with
``mean.halves`` of the two halves of the rows and, elsewhere than at the patched point, ``start``: the patch there.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from src.errors import InputError
from src.files import write_atomically
from src.fisher.base import Fisher, ModuleFisher, Shapes, check_shape
from src.fisher.block import BlockFisher
from src.fisher.diagonal import DiagonalFisher
from src.fisher.kronecker import KroneckerFisher
from src.fisher.lowrank import LowRankFisher
from src.fisher.magnitude import Magnitude
from src.fisher.score_tables import DTYPES, MappedTable

RECORD = "sst_fisher"
HALVES, START = "mean.halves", "start"
KINDS: dict[str, type] = {
    "count": int,
    **dict.fromkeys(("modules", "shapes", "rows", "seen", "utility"), list),
    **dict.fromkeys(("base", "safety"), dict),
}
"""Of what kind a record's entries are."""
NAMES: dict[type, str] = {int: "a whole number", list: "a list", dict: "a mapping"}
REPRESENTATIONS: dict[str, type[Fisher]] = {
    kind.representation: kind for kind in (LowRankFisher, BlockFisher, KroneckerFisher, DiagonalFisher, Magnitude)
}


@dataclass(frozen=True)
class FisherFile:
    """A Fisher matrix and what it is of.

    Attributes:
        fisher: The matrix.
        u: (O, p) output basis of each module, in the order of the coordinates; empty in weight coordinates.
        v: (I, q) input basis of each module; empty in weight coordinates.
        record: Provenance: labels, seed, rows, prompt hashes, base, reference point, adapters, versions, settings.
        mean: (D,) mean signed score with the data's labels, float64, where it was taken.
        half_means: (2, D) the same of each half of the rows, where they were kept apart.
        start: (D,) coordinates of the patch at the point where mean scores were taken, float64; nothing at the patched
            point, and where the core space has none.
    """

    fisher: Fisher
    u: dict[str, torch.Tensor]
    v: dict[str, torch.Tensor]
    record: dict[str, Any]
    mean: torch.Tensor | None = None
    half_means: torch.Tensor | None = None
    start: torch.Tensor | None = None

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(p, q) of each module in the order of the coordinates."""
        if isinstance(self.fisher, ModuleFisher):
            return self.fisher.shapes
        return {name: (self.u[name].shape[1], self.v[name].shape[1]) for name in self.u}

    def save(self, path: Path) -> None:
        """Write the file atomically.

        Raises:
            ValueError: scores without bases: in weight coordinates they would be as large as the model per example.
        """
        if not self.u and not isinstance(self.fisher, ModuleFisher):
            raise ValueError(f"{self.fisher.representation} has no weight coordinates: bases are missing")
        tensors = dict(self.fisher.tensors())
        tensors |= {f"u.{name}": matrix for name, matrix in self.u.items()}
        tensors |= {f"v.{name}": matrix for name, matrix in self.v.items()}
        tensors |= {} if self.mean is None else {"mean": self.mean}
        tensors |= {} if self.half_means is None else {HALVES: self.half_means}
        tensors |= {} if self.start is None else {START: self.start}
        record = self.record | {
            "modules": list(self.shapes),
            "shapes": list(self.shapes.values()),
            "coordinates": "core" if self.u else "weight",
            "count": self.fisher.count,
            "representation": self.fisher.representation,
        }
        metadata = {RECORD: json.dumps(record, ensure_ascii=False)}
        ready = {name: tensor.contiguous() for name, tensor in tensors.items()}
        write_atomically(path, lambda temporary: save_file(ready, temporary, metadata=metadata))


def load_fisher(path: Path) -> FisherFile:
    """Read and check a Fisher file. Tensors stay mapped: they take memory as they are read.

    Raises:
        InputError: the file is missing or broken, is no Fisher file, or holds NaN or infinite values or bases of other
            shapes; the message names the file and, for bad values, the module.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected a Fisher file (made by `python -m src fisher`)")
    try:
        with safe_open(path, "pt") as handle:
            metadata = handle.metadata() or {}
            if RECORD not in metadata:
                raise InputError(f"{path}: not a Fisher file (no {RECORD} record in its metadata)")
            record = _record(path, metadata[RECORD])
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - not a dict
            wide = "scores" in tensors and handle.get_slice("scores").get_dtype() in DTYPES
    except SafetensorError as error:
        raise InputError(f"{path}: not a readable safetensors file ({error})") from None
    try:
        core = record["coordinates"] == "core"
        u, v = ({n: tensors.pop(f"{side}.{n}") for n in record["modules"] if core} for side in "uv")
        shapes = _shapes(path, record, u, v)
        _check_finite(path, {f"{s}.{n}": t for s, side in (("u", u), ("v", v)) for n, t in side.items()}, shapes)
        kind = REPRESENTATIONS[record["representation"]]
        _check_finite(path, {name: tensor for name, tensor in tensors.items() if name != "scores"}, shapes)
        mean, half_means, start = (tensors.pop(key, None) for key in ("mean", HALVES, START))
        dim = sum(p * q for p, q in shapes.values())
        for key, own, expected in (("mean", mean, (dim,)), (HALVES, half_means, (2, dim)), (START, start, (dim,))):
            if own is not None:
                check_shape(key, own, expected)
        fisher = kind.from_tensors(tensors, shapes=shapes, count=record["count"])
        if isinstance(fisher, LowRankFisher):
            fisher = replace(fisher, stored=MappedTable(path, "scores")) if wide else fisher
            _check_scores(path, fisher, shapes)
            fisher = fisher.named(record.get("rows") or [])
    except KeyError as error:
        raise InputError(f"{path}: has no {error}; expected a file written by `python -m src fisher`") from None
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    return FisherFile(fisher, u, v, record, mean, half_means, start)


def _record(path: Path, text: str) -> dict[str, Any]:
    """The record of a file."""
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: its {RECORD} record is no JSON ({error}); expected a mapping") from None
    if not isinstance(record, dict):
        raise InputError(f"{path}: its {RECORD} record is a {type(record).__name__}; expected a mapping")
    for key, kind in KINDS.items():
        value = record.get(key)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise InputError(f"{path}: {key!r} of its record is {value!r}; expected {NAMES[kind]}")
    for key in ("modules", "rows", "seen"):
        if not all(isinstance(name, str) for name in record.get(key) or []):
            raise InputError(f"{path}: {key!r} of its record holds what is no text; expected names")
    shapes = record.get("shapes") or []
    if not all(isinstance(sides, list) and [type(side) for side in sides] == [int, int] for sides in shapes):
        raise InputError(f"{path}: 'shapes' of its record is {shapes}; expected two sides a module")
    return record


def _shapes(
    path: Path, record: Mapping[str, Any], u: Mapping[str, torch.Tensor], v: Mapping[str, torch.Tensor]
) -> dict[str, tuple[int, int]]:
    """(p, q) of each module, by its bases where there are any."""
    given = dict(zip(record["modules"], record["shapes"], strict=True))
    for i, (side, bases) in enumerate((("u", u), ("v", v))):
        for name, basis in bases.items():
            wanted = given[name][i]
            if basis.ndim != 2 or 0 in basis.shape or wanted != basis.shape[1]:
                raise InputError(f"{path}: {side} of {name} has the shape {tuple(basis.shape)}; expected (·, {wanted})")
    if u:
        return {name: (u[name].shape[1], v[name].shape[1]) for name in u}
    return {name: (p, q) for name, (p, q) in given.items()}


def _check_columns(path: Path, what: str, block: torch.Tensor, first: int, shapes: Shapes) -> None:
    """Stop at NaN or infinite values in a block (rows, columns) of coordinates, and name the module of the first."""
    sound = torch.isfinite(block).all(0)
    if not sound.all():
        ends = torch.tensor([p * q for p, q in shapes.values()]).cumsum(0)
        place = int(torch.searchsorted(ends, first + int((~sound).nonzero()[0]), right=True))
        name = [*shapes, "no module"][place]
        raise InputError(f"{path}: the {what} of {name} hold NaN or infinite values")


def _check_scores(path: Path, fisher: LowRankFisher, shapes: Shapes) -> None:
    """Stop at NaN or infinite scores, block by block."""
    for columns, block in fisher.blocks():
        _check_columns(path, "scores", block, columns.start, shapes)


def _check_finite(path: Path, tensors: Mapping[str, torch.Tensor], shapes: Shapes) -> None:
    """Stop at NaN or infinite values, module by module."""
    for key, tensor in tensors.items():
        kind, _, module = key.partition(".")
        if kind in ("mean", START) and tensor.ndim:
            _check_columns(path, kind, tensor.reshape(-1, tensor.shape[-1]), 0, shapes)
        elif tensor.is_floating_point() and not torch.isfinite(tensor).all():
            what = "vectors" if kind in ("u", "v") else "sums"
            raise InputError(f"{path}: the {what} {kind} of {module or 'all modules'} hold NaN or infinite values")
