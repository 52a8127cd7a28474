"""Run by mergekit's own interpreter: its functions on given tensors. Arguments: cases in, results out (torch files)."""

import sys
from types import SimpleNamespace

import torch
from mergekit.merge_methods.generalized_task_arithmetic import ConsensusMethod, GTATask
from mergekit.sparsify import RescaleNorm, SparsificationMethod, rescaled_masked_tensor


def merged(case):
    """GTATask.execute, unbound, on deltas from a base of zeros."""
    deltas = case["deltas"]
    names = [str(i) for i in range(len(deltas))]
    parameters = {
        name: {"weight": weight, **{key: case[key] for key in ("density", "gamma", "epsilon")}}
        for name, weight in zip(names, case["weights"], strict=True)
    }
    task = SimpleNamespace(
        method=SimpleNamespace(
            sparsification_method=SparsificationMethod(case["sparsify"]) if case["sparsify"] else None,
            consensus_method=ConsensusMethod(case["consensus"]) if case["consensus"] else None,
        ),
        weight_info=SimpleNamespace(name="w", is_embed=False),
        base_model="base",
        tensor_parameters=SimpleNamespace(data=parameters),
        int8_mask=False,
        normalize=case["normalise"],
        lambda_=case["scale"],
        rescale_norm=None,
    )
    drawn = iter(case["drawn"])
    torch.bernoulli = lambda probability: (next(drawn) < probability).float()
    tensors = dict(zip(names, (delta.clone() for delta in deltas), strict=True))
    return GTATask.execute(task, tensors | {"base": torch.zeros_like(deltas[0])})


cases = torch.load(sys.argv[1])
results = {}
for name, case in cases.items():
    if "mask" in case:
        results[name] = rescaled_masked_tensor(case["deltas"][0], case["mask"], RescaleNorm.l1)
    else:
        results[name] = merged(case)
torch.save(results, sys.argv[2])
