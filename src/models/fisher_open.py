"""A Fisher pass made ready: its weights, its fresh sums, and what an earlier, killed run has left of it."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.adapters.attach import linear_shape
from src.fisher.accumulate import Accumulator, Allocate, MeanAccumulator, mapped, zeros
from src.fisher.base import Shapes
from src.fisher.shards import Shards
from src.models.fisher_output import parts_folder
from src.models.fisher_pass import FisherPass, make_accumulators
from src.models.fisher_record import pass_key
from src.models.fisher_weights import pass_weights

if TYPE_CHECKING:
    from src.models.fisher import FisherModule

log = logging.getLogger(__name__)


def open_pass(module: "FisherModule", name: str) -> FisherPass:
    """A pass with the parts of it that are on the disk already.

    Args:
        module: What measures, its model loaded and its Trainer running.
        name: The pass.
    """
    folder = parts_folder(module.output, name)
    folder.mkdir(parents=True, exist_ok=True)
    rank, world = module.trainer.global_rank, module.trainer.world_size
    shards = Shards(folder, pass_key(module, name))
    # Sharded processes must skip the same steps.
    watched = range(world) if module.sharded else [rank]
    finished = frozenset.intersection(*(frozenset(shards.numbers(other)) for other in watched))
    if finished:
        log.info("F_%s: %d parts of an interrupted pass are kept", name, len(finished))
    return FisherPass(
        name=name,
        rows=sum(len(row.ids) > row.answer_start for row in module.data.encoded[name]),
        weights=pass_weights(module, name),
        make=lambda: _sums(module, name, folder / f"rank-{rank}"),
        shards=shards,
        rank=rank,
        steps_per_shard=max(1, module.shard_rows // module.data.batch_size),
        finished=finished,
    )


def _sums(module: "FisherModule", name: str, folder: Path) -> tuple[Accumulator[Any], MeanAccumulator | None]:
    """Fresh sums; those of whole weights live in mapped files."""
    shapes: Shapes = module.core.shapes
    allocate: Allocate = zeros
    if module.coordinates == "weight":
        layers = {key: module.model.get_submodule(key) for key in module.core.modules}
        shapes = {key: shape for key, layer in layers.items() if (shape := linear_shape(layer))}
        folder.mkdir(parents=True, exist_ok=True)
        allocate = mapped(folder)
    mean = module.relearn and name != "utility"
    return make_accumulators(module.representation, shapes, mean=mean, halves=module.halves, allocate=allocate)
