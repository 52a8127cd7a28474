"""Sharding of a language model over a device mesh (FSDP2), one unit per decoder layer."""

from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from src.errors import InputError

PATIENCE = timedelta(hours=12)
"""How long processes wait for one another: a judge of the first one may take longer than Lightning's 30 minutes."""


class DataParallelStrategy(DDPStrategy):
    """DDP whose processes wait for one another as long as it takes."""

    def __init__(self) -> None:
        super().__init__(timeout=PATIENCE)


def make_patient(strategy: Strategy) -> None:
    """Let processes of Lightning's own DDP, which it takes by itself for several devices, wait as long as ours."""
    if type(strategy) is DDPStrategy and strategy._timeout == default_pg_timeout:
        strategy._timeout = PATIENCE


class FullyShardedStrategy(ModelParallelStrategy):
    """FSDP2 over all processes of the run, however many there are, without tensor parallelism.

    Lightning's own ``data_parallel_size: auto`` is the number of nodes, and leaves no other choice than a number.
    Checkpoints are single files.
    """

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, timeout=PATIENCE)

    def setup_environment(self) -> None:
        """Start the process group and lay the mesh over it."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Trained weights, whole, in the first process; Lightning's would gather the frozen base there as well."""
        assert self.model is not None
        # torch's ignore_frozen_params leaves a tied output layer in, by its second name.
        state = self.model.state_dict(keep_vars=True).items()
        trained = {name: weight for name, weight in state if weight.requires_grad}
        whole = {name: w.full_tensor() if isinstance(w, DTensor) else w for name, w in trained.items()}
        return {name: w.detach().cpu() for name, w in whole.items()} if self.is_global_zero else {}


def shard(model: torch.nn.Module, mesh: DeviceMesh | None) -> None:
    """Shard the parameters of every decoder layer, then the rest, over the mesh's data-parallel dimension.

    Raises:
        InputError: the model is quantised.
    """
    from torch.distributed.fsdp import fully_shard

    if mesh is None:
        raise RuntimeError("sharding needs a device mesh: the strategy has not set one up")
    if getattr(model, "is_quantized", False):
        raise InputError("base.quantization: weights of 8 or 4 bits cannot be sharded; use gpu.yaml or ddp.yaml")

    data = mesh["data_parallel"]
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=data)
    fully_shard(model, mesh=data)


def decoder_layers(model: torch.nn.Module) -> list[Any]:
    """The modules of the longest module list: a transformer's blocks."""
    lists = [list(module) for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    return max(lists, key=len, default=[])
