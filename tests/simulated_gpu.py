"""A GPU that there is not: tensors that say ``cuda:0``, compute on the CPU, and refuse what a GPU's tensors refuse.

An operation that mixes them with tensors of the CPU fails, and so does ``numpy()``. Python sees ``cuda``; to the C++
side they lie on ``lazy``, a device that needs no driver and whose backward passes run in the caller's thread. What is
simulated is where tensors lie, and how often the host waits for the GPU: no kernel, no memory limit, no rounding of a
GPU's, no mixed precision, and of NCCL one process (:func:`simulated_nccl`).

What remains in the process: torch's C++ side believes that CUDA has been set up, so that a later use of ``cuda`` fails
with another message than before.
"""

import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import lightning.fabric.accelerators.cuda as of_fabric
import lightning.pytorch.accelerators.cuda as of_lightning
import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers.utils.import_utils import is_torch_cuda_available

CPU, GPU, INSIDE = torch.device("cpu"), torch.device("cuda", 0), torch.device("lazy", 0)
aten = torch.ops.aten
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
"""Operations whose indices may lie on the CPU."""
WAITING = {
    aten._local_scalar_dense.default,
    aten._unique2.default,
    aten.bincount.default,
    aten.equal.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten.repeat_interleave.Tensor,
}
"""Operations whose result, or its size, the host needs before it goes on."""
COPIES = {aten._to_copy.default, aten.copy_.default}
"""Operations that may copy between the two; the host waits for their end in either direction."""
SINGLE = {aten.masked_fill.Tensor, aten.masked_fill_.Tensor, aten.fill_.Tensor}
"""Operations that take a single number of the CPU, beside those that work number by number."""
DRIVER = {
    "_lazy_init": None,
    "current_device": 0,
    "device_count": 1,
    "empty_cache": None,
    "get_device_capability": (9, 0),
    "get_device_name": "simulated",
    "get_rng_state_all": [],
    "is_available": True,
    "is_initialized": True,
    "manual_seed": None,
    "manual_seed_all": None,
    "set_device": None,
    "set_rng_state_all": None,
}
"""What functions of ``torch.cuda`` return."""
waits: Counter[str] = Counter()
"""How often the host has waited for the GPU, by operation."""

collectives: Counter[str] = Counter()
"""How often processes have talked, by operation (:func:`simulated_nccl`)."""


class GpuTensor(torch.Tensor):
    """A tensor of the simulated GPU; ``held`` has its values."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda _: GPU)
    is_cuda = property(lambda _: True)
    is_cpu = property(lambda _: False)

    @staticmethod
    def __new__(cls, held):
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "layout": held.layout}
        return torch.Tensor._make_wrapper_subclass(cls, held.size(), dtype=held.dtype, device=INSIDE, **layout)

    def __init__(self, held):
        self.held = held

    def __repr__(self, **_):
        return f"GpuTensor({self.held!r})"

    def __tensor_flatten__(self):
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner, *_):
        return GpuTensor(inner["held"])

    def __reduce_ex__(self, protocol):
        return self.detach().held.__reduce_ex__(protocol)  # a file is read on the CPU first

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _computed(func, args, kwargs or {})


def _computed(func, args, kwargs):
    """An operation, on the GPU where an operand lies there or its result shall."""
    if func.namespace == "c10d":
        collectives[func.__name__] += 1
        own = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if "barrier" not in func.__name__ and not all(isinstance(leaf, GpuTensor) for leaf in own):
            raise RuntimeError(f"{func}: no backend type associated with device type cpu")
    wanted = kwargs.get("device")
    onto = wanted is not None and torch.device(wanted).type in ("cuda", "lazy")
    if not onto and not any(isinstance(leaf, GpuTensor) for leaf in tree_leaves((args, kwargs))):
        return func(*args, **kwargs)
    if wanted is None and func not in COPIES and func.namespace != "c10d":
        _check(func, args, kwargs)
    if onto and kwargs.get("generator") is not None:
        raise RuntimeError(f"{func}: expected a 'cuda' device type for generator but found 'cpu'")
    off = (wanted is not None and not onto) or (func is aten.copy_.default and not isinstance(args[0], GpuTensor))
    between = func in COPIES and off == isinstance(args[0 if func is aten._to_copy.default else 1], GpuTensor)
    by_mask = func in INDEXED and any(i is not None and i.dtype == torch.bool for i in args[1])
    if between or by_mask or func in WAITING:
        waits[str(func)] += 1
    given, named = tree_map_only(GpuTensor, lambda leaf: leaf.held, (args, kwargs))
    found = func(*given, **named | ({"device": CPU} if onto else {}))
    if func is aten.copy_.default:
        return args[0]
    if off:
        return found
    found = tree_map_only(torch.Tensor, lambda leaf: leaf if isinstance(leaf, GpuTensor) else GpuTensor(leaf), found)
    return found if onto else return_and_correct_aliasing(func, args, kwargs, found)


def _check(func, args, kwargs):
    """Raise where a tensor of the CPU is an operand; a GPU takes some single numbers, and indices, from there."""
    changed = func._schema.arguments and func._schema.arguments[0].is_write
    if func in INDEXED:
        args, kwargs, changed = (args[0], *args[2:]), {}, True
    single = torch.Tag.pointwise in func.tags or func in SINGLE
    if changed and isinstance(args[0], torch.Tensor) and not isinstance(args[0], GpuTensor):
        raise RuntimeError(f"{func}: a tensor on the device cpu is changed or indexed by one on cuda:0")
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    if any(not isinstance(tensor, GpuTensor) and (tensor.dim() or not single) for tensor in tensors):
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, but found cuda:0 and cpu")


class _Operations(TorchDispatchMode):
    """Every operation, those that make a tensor on the GPU among them."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        with self:  # in inference mode composite operations arrive whole
            found = func.decompose(*args, **kwargs or {})
        return _computed(func, args, kwargs or {}) if found is NotImplemented else found


class _Calls(TorchFunctionMode):
    """What Python's side does before there is an operation."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name == "tolist" and isinstance(args[0], GpuTensor):
            waits["tolist"] += 1
            return args[0].held.tolist()
        if name == "numpy" and isinstance(args[0], GpuTensor):
            raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu() first")
        if func in (torch.tensor, torch.as_tensor) and str(kwargs.get("device")).startswith("cuda"):
            return func(*args, **kwargs | {"device": CPU}).to(GPU)
        if name == "__getitem__" and isinstance(args[0], GpuTensor) and isinstance(args[1], tuple):
            args = (args[0], tuple(torch.tensor(i) if isinstance(i, list) else i for i in args[1]))
        if name == "cuda":
            return args[0].to(GPU)
        if name == "to":
            args = (args[0], *(GPU if str(value) == "cuda" else value for value in args[1:]))
        return func(*args, **kwargs)


@contextlib.contextmanager
def simulated_gpu() -> Iterator[Counter[str]]:
    """One simulated GPU for the length of a ``with`` block; gives the count of the host's waits."""
    submit = ThreadPoolExecutor.submit

    def submitted(pool, function, *args, **kwargs):
        def inside(*given, **named):
            with _Calls(), _Operations():
                return function(*given, **named)

        return submit(pool, inside, *args, **kwargs)

    waits.clear()
    is_torch_cuda_available.cache_clear()
    with contextlib.ExitStack() as stack:
        for name, value in DRIVER.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, return_value=value))
        for module in (of_fabric, of_lightning):
            stack.enter_context(mock.patch.object(module, "num_cuda_devices", return_value=1))
            stack.enter_context(mock.patch.object(module, "_clear_cuda_memory"))
        stack.enter_context(mock.patch.object(of_fabric, "_get_all_visible_cuda_devices", return_value=[0]))
        stack.enter_context(mock.patch.object(ThreadPoolExecutor, "submit", submitted))
        stack.callback(is_torch_cuda_available.cache_clear)
        stack.enter_context(_Calls())
        stack.enter_context(_Operations())
        yield waits


@contextlib.contextmanager
def simulated_nccl() -> Iterator[Counter[str]]:
    """A process group of one process that takes tensors of the simulated GPU only; gives the count of collectives."""
    start = dist.init_process_group

    def started(backend, *args, device_id=None, **kwargs):
        assert backend == "nccl"
        assert device_id in (None, GPU)
        start("gloo", *args, **kwargs)

    collectives.clear()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ))
        stack.enter_context(mock.patch.object(dist, "init_process_group", started))
        stack.enter_context(mock.patch.object(dist.distributed_c10d, "_get_object_coll_device", return_value="cuda"))
        try:
            yield collectives
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
