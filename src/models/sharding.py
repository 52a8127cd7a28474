"""Sharding of a language model over a device mesh (FSDP2), one unit per decoder layer."""

from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import DeviceMesh


class FullyShardedStrategy(ModelParallelStrategy):
    """FSDP2 over all processes of the run, however many there are, without tensor parallelism.

    Lightning's own ``data_parallel_size: auto`` is the number of nodes, and leaves no other choice than a number.
    Checkpoints are single files.
    """

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """Start the process group and lay the mesh over it."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


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
