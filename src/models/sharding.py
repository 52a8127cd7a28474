"""Sharding of a language model over a device mesh (FSDP2), one unit per decoder layer."""

from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh


def shard(model: torch.nn.Module, mesh: DeviceMesh | None) -> None:
    """Shard the parameters of every decoder layer, then the rest, over the mesh's data-parallel dimension."""
    from torch.distributed.fsdp import fully_shard

    if mesh is None:
        raise RuntimeError("sharding needs a device mesh: the strategy has not set one up")

    data = mesh["data_parallel"]
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=data)
    fully_shard(model, mesh=data)


def decoder_layers(model: torch.nn.Module) -> list[Any]:
    """The modules of the longest module list: a transformer's blocks."""
    lists = [list(module) for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    return max(lists, key=len, default=[])
