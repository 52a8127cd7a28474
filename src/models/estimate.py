"""What a Fisher pass will take, from the model's configuration alone: no weight is loaded."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch

from src.adapters.attach import linear_shape
from src.data.calibration import CalibrationData
from src.data.chat import Encoded
from src.errors import InputError
from src.fisher.base import Representation, Shapes
from src.fisher.scores import Granularity
from src.models.base import BaseSpec, model_without_weights
from src.sizes import human_size

PRECISION_BYTES = {"64-true": 8, "16-true": 2, "bf16-true": 2}
"""Bytes per number where the Trainer's precision converts the model."""
QUANTISED_BYTES = {"none": None, "8bit": 1.0, "4bit": 0.5625}
"""Bytes per weight; 4-bit blocks of 64 carry a 32-bit scale (QLoRA, 2305.14314)."""


@dataclass(frozen=True)
class Estimate:
    """Sizes of a pass.

    Attributes:
        rows: Rows of each pass.
        tokens: Tokens of the largest batch, padding included.
        dim: D, the number of coordinates.
        disk: Bytes of the Fisher files, bases included.
        shards: Bytes of unfinished parts, and of sums in mapped files, on the disk until the pass ends.
        joined: Bytes that low-rank scores, brought together in one file a pass at a time, add to files and parts.
        weights: Bytes of the base model in one process.
        activations: Bytes kept for the backward pass of the largest batch (one layer's worth is freed at a time).
        sums: Bytes of what a process accumulates between two shards.
        mapped: Whether those lie in mapped files instead of the memory.
    """

    rows: dict[str, int]
    tokens: int
    dim: int
    disk: int
    shards: int
    joined: int
    weights: int
    activations: int
    sums: int
    mapped: bool = False

    @property
    def peak_disk(self) -> int:
        """Most bytes on the disk: when the last files are written, and the parts are still there."""
        return self.disk + self.shards + self.joined

    @property
    def peak(self) -> int:
        """Bytes of memory in one process, the interpreter and its libraries not counted."""
        return self.weights + self.activations + (0 if self.mapped else self.sums)

    def lines(self) -> list[str]:
        """The estimate, for people."""
        passes = ", ".join(f"F_{name} {count}" for name, count in self.rows.items())
        return [
            f"rows          {passes}",
            f"coordinates   D = {self.dim}",
            f"largest batch {self.tokens} tokens",
            f"disk          {human_size(self.disk)} of Fisher files, {human_size(self.shards + self.joined)} of parts "
            f"until the pass ends: {human_size(self.peak_disk)} at most",
            f"memory        about {human_size(self.peak)} a process: weights {human_size(self.weights)}, activations "
            f"{human_size(self.activations)}, sums {human_size(self.sums)} "
            f"{'in mapped files' if self.mapped else 'of the host'}",
        ]


@dataclass(frozen=True)
class Kept:
    """What passes keep.

    Attributes:
        representation: Form of the Fisher matrices.
        draws: Draws of labels per row.
        halves: Whether sums are kept for two halves of the rows.
        shard_rows: Rows between two parts on the disk.
        weight_coordinates: Coordinates are the entries of the layers' weights, not of the cores.
        granularity: What an example is; ``lowrank`` keeps one score of each.
        undrawn: Passes whose labels are not drawn: one score per example.
        means: Passes that take mean scores too.
        started: Whether the files of these keep the patch at their point.
    """

    representation: Representation
    draws: int
    halves: bool
    shard_rows: int
    weight_coordinates: bool
    granularity: Granularity = "sequence"
    undrawn: Collection[str] = ()
    means: Collection[str] = ()
    started: bool = False


@dataclass(frozen=True)
class Hardware:
    """What passes run on.

    Attributes:
        processes: Number of processes.
        shards: Number of processes that the weights are sharded over.
        precision: The Trainer's.
        checkpointing: Whether activations are computed again in the backward pass.
    """

    processes: int = 1
    shards: int = 1
    precision: str = "32-true"
    checkpointing: bool = False


def matrix_bytes(
    representation: Representation, shapes: Shapes, rows: int, *, draws: int, halves: bool, score_bytes: int = 4
) -> int:
    """Bytes of one Fisher matrix: scores of so many examples, or float64 sums."""
    sides = list(shapes.values())
    if representation == "lowrank":
        return score_bytes * rows * draws * sum(p * q for p, q in sides)
    entries = {
        "block": sum((p * q) ** 2 for p, q in sides),
        "kronecker": sum(p * p + q * q for p, q in sides),
        "diagonal": sum(p * q for p, q in sides),
        "magnitude": sum(p * q for p, q in sides),
    }
    return 8 * entries[representation] * (2 if halves else 1)


def part_count(rows: int, batch_size: int, shard_rows: int, processes: int) -> int:
    """Parts that all processes leave on the disk; at most, as the last batches may be dealt unevenly."""
    batches = ceil(rows / batch_size)
    steps = ceil(batches / processes)
    return min(batches, processes * ceil(steps / max(1, shard_rows // batch_size)))


def mean_bytes(shapes: Shapes, *, halves: bool) -> int:
    """Bytes of the mean scores in a file, of all rows and of each half: float64."""
    return 8 * sum(p * q for p, q in shapes.values()) * (3 if halves else 1)


def _activation_bytes(model: Any, tokens: int, rows: int, answers: int, width: int, *, recomputed: bool) -> int:
    """Inputs and outputs of every linear layer, attention weights where they are formed, and logits.

    Where they are recomputed: those of one decoder layer, and the input of each.
    """
    head = model.get_output_embeddings()
    sides = [linear_shape(module) or () for module in model.modules() if module is not head]
    kept = sum(map(sum, sides)) * tokens * width
    config = model.config.get_text_config()
    formed = config._attn_implementation == "eager"
    layers = config.num_hidden_layers
    kept += 2 * layers * config.num_attention_heads * tokens * (tokens // max(rows, 1)) * width if formed else 0
    if recomputed:
        kept = kept // layers + layers * config.hidden_size * tokens * width
    # Logits, their logarithms, and two tables in float64 while labels are drawn.
    return kept + 24 * answers * config.vocab_size


def estimate(
    base: BaseSpec,
    shapes: Shapes,
    data: CalibrationData,
    kept: Kept,
    hardware: Hardware,
) -> Estimate:
    """Sizes of the passes over some data.

    Args:
        base: The base model; only its configuration is read.
        shapes: (p, q) of each core, by module.
        data: Calibration rows, tokenised.
        kept: What the passes keep.
        hardware: What they run on.

    Raises:
        InputError: an adapted layer is not in the model.
    """
    model: Any = model_without_weights(base)
    layers = {name: shape for name, module in model.named_modules() if (shape := linear_shape(module))}
    if missing := [name for name in shapes if name not in layers]:
        raise InputError(f"base.name {base.name}: has no linear layer {missing[0]}, which the adapters update")
    whole = {name: layers[name] for name in shapes}
    sides = whole if kept.weight_coordinates else shapes
    rows = {name: len(encoded) for name, encoded in data.encoded.items()}
    own_width = (model.dtype if base.dtype == "auto" else getattr(torch, base.dtype)).itemsize
    width = PRECISION_BYTES.get(hardware.precision, own_width)
    per_weight = QUANTISED_BYTES[base.quantization] or width
    batches = [sorted(encoded, key=lambda row: -len(row.ids))[: data.batch_size] for encoded in data.encoded.values()]
    tokens, answers = (
        max(len(batch) * len(batch[0].ids) for batch in batches),
        max(sum(len(row.ids) - row.answer_start for row in batch) for batch in batches),
    )
    counts = {name: _examples(encoded, kept.granularity) for name, encoded in data.encoded.items()}
    form: dict[str, Any] = {"halves": kept.halves, "score_bytes": max(4, width)}
    drawn = {name: 1 if name in kept.undrawn else kept.draws for name in counts}
    size = [matrix_bytes(kept.representation, sides, sum(each), draws=drawn[n], **form) for n, each in counts.items()]
    parts, mean = list(size), mean_bytes(sides, halves=kept.halves)
    if kept.representation != "lowrank":
        left = [part_count(n, data.batch_size, kept.shard_rows, hardware.processes) for n in rows.values()]
        more = hardware.processes if kept.weight_coordinates else 0
        parts = [one * (n + more) for one, n in zip(size, left, strict=True)]
    spans = {} if kept.weight_coordinates else shapes
    bases = 8 * sum(whole[name][0] * p + whole[name][1] * q for name, (p, q) in spans.items())
    open_scores = max(drawn[n] * sum(sorted(each, reverse=True)[: kept.shard_rows]) for n, each in counts.items())
    dim = sum(p * q for p, q in sides.values())
    return Estimate(
        rows=rows,
        tokens=tokens,
        dim=dim,
        disk=sum(size) + bases * len(rows) + (mean + (8 * dim if kept.started else 0)) * len(kept.means),
        shards=sum(parts),
        joined=_joined_bytes(size, bases) if kept.representation == "lowrank" else 0,
        weights=int(sum(p.numel() for p in model.parameters()) * per_weight / hardware.shards),
        activations=_activation_bytes(
            model, tokens, data.batch_size, answers, width, recomputed=hardware.checkpointing
        ),
        sums=matrix_bytes(kept.representation, sides, open_scores, draws=1, **form) + (mean if kept.means else 0),
        mapped=kept.weight_coordinates,
    )


def _joined_bytes(size: Sequence[int], bases: int) -> int:
    """Bytes over those of all files when the joined scores of a pass lie beside the files of the passes up to it.

    Args:
        size: Bytes of the scores of each pass, in the order in which they are joined.
        bases: Bytes of the bases in each file.
    """
    missing = [sum(size[i + 1 :]) + bases * (len(size) - i - 1) for i in range(len(size))]
    return max(own - later for own, later in zip(size, missing, strict=True))


def _examples(encoded: Sequence[Encoded], granularity: Granularity) -> list[int]:
    """Number of examples of each row."""
    return [1 if granularity == "sequence" else len(row.ids) - row.answer_start for row in encoded]
