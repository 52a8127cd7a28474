"""What tests of the merge stage share: Fisher matrices with known scores, and other factors of the same update."""

import json

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from src.adapters.basis import CoreBasis, core_basis
from src.adapters.deltas import DenseDelta
from src.adapters.pairs import LowRankPair
from src.adapters.peft_files import read_adapter
from src.fisher.diagonal import DiagonalFisher
from src.fisher.files import FisherFile
from src.fisher.kronecker import KroneckerFisher
from src.fisher.lowrank import LowRankFisher
from src.fisher.magnitude import Magnitude
from src.merge.base import FisherBesideBase, FisherPair
from src.merge.settings import with_option
from tests.tiny import make_model


def updates(adapters):
    """Pairs of the utility and of the safety expert."""
    return [read_adapter(adapters[name]).pairs for name in ("utility", "safety")]


def weight_space_fishers(pairs, n_s=6, n_u=9, seed=0):
    """Scores drawn in weight space and written in the core space of ``pairs``: what a pass would measure."""
    core = core_basis([pairs])
    draw = torch.Generator().manual_seed(seed)
    scores = []
    for count in (n_s, n_u):
        rows = []
        for _ in range(count):
            gradient = {n: torch.randn(*pair.shape, generator=draw, dtype=torch.float64) for n, pair in pairs.items()}
            rows.append(torch.cat([(core.u[n].T @ gradient[n] @ core.v[n]).reshape(-1) for n in core.modules]))
        scores.append(LowRankFisher(torch.stack(rows), count))
    return FisherPair(scores[0], scores[1], core)


def weight_fisher(shapes, kind, seed):
    """A Fisher matrix in weight coordinates of a few examples with random gradients."""
    draw = torch.Generator().manual_seed(seed)
    sums = [{}, {}, {}]
    for name, (o, i) in shapes.items():
        deltas, inputs = (torch.randn(40, side, generator=draw, dtype=torch.float64) for side in (o, i))
        if kind == "diagonal":
            sums[0][name] = (deltas.square().T @ inputs.square()).reshape(1, -1)
        elif kind == "magnitude":
            sums[0][name] = (deltas.abs().T @ inputs.abs()).reshape(1, -1)
        else:
            sums[0][name], sums[1][name] = (deltas.T @ deltas)[None], (inputs.T @ inputs)[None]
            sums[2][name] = torch.tensor([40.0]).double()
    counts = torch.tensor([40.0]).double()
    if kind == "kronecker":
        return KroneckerFisher(shapes, counts, *sums)
    return (DiagonalFisher if kind == "diagonal" else Magnitude)(shapes, counts, sums[0])


def matching_fishers(method, utility, safety, model=None):
    """Fisher matrices in the coordinates and of a representation that a method takes."""
    if method.coordinates == "core":
        return weight_space_fishers(safety, n_s=40, n_u=40)
    shapes = {name: {**utility, **safety}[name].shape for name in sorted({**utility, **safety})}
    kind = method.representations[-1]
    pairs = [FisherPair(*(weight_fisher(shapes, kind, 2 * i + j) for j in (1, 2)), CoreBasis({}, {})) for i in (0, 1)]
    if kind != "magnitude":
        return pairs[0]
    model = model or make_model()
    modules = dict(model.named_modules())
    drawn = {name: torch.randn(shape, generator=torch.Generator().manual_seed(8)) for name, shape in shapes.items()}
    weights = {n: DenseDelta(modules[n].weight.detach() if n in modules else drawn[n]) for n in shapes}
    return FisherBesideBase(pairs[0].safety, pairs[0].utility, pairs[0].basis, base=pairs[1], weights=weights)


def rewritten(path, change):
    """Change the record of a Fisher file."""
    with safe_open(path, "pt") as handle:
        record = json.loads(handle.metadata()["sst_fisher"])
    change(record)
    save_file(load_file(path), path, metadata={"sst_fisher": json.dumps(record)})


def regauged(pairs):
    draw = torch.Generator().manual_seed(5)
    turned = {}
    for name, pair in pairs.items():
        q = torch.randn(pair.rank, pair.rank, generator=draw, dtype=torch.float64)
        turned[name] = LowRankPair(torch.linalg.inv(q) @ pair.a.double(), pair.b.double() @ q)
    return turned


def write_fishers(folder, adapters, base, *, method=None, model=None, **rows):
    """Fisher files of the session's adapters with random scores in the right coordinates."""
    safety, utility = read_adapter(adapters["safety"]), read_adapter(adapters["utility"])
    if method is None:
        pair = weight_space_fishers(safety.pairs, **rows)
    else:
        pair = matching_fishers(method, utility.pairs, safety.pairs, model)
    matrices = [("safety", pair.safety, ""), ("utility", pair.utility, "")]
    if isinstance(pair, FisherBesideBase):
        matrices += [("safety", pair.base.safety, "base"), ("utility", pair.base.utility, "base")]
    for name, fisher, at in matrices:
        record = {
            "pass": name,
            "reference": at or {name: 1.0},
            "base": {"name": str(base), "fingerprint": None},
            "safety": {"path": safety.name, "sha256": safety.sha256},
            "utility": [{"path": utility.name, "sha256": utility.sha256, "weight": 1.0}],
            "basis_sha256": pair.basis.digest(),
            "seen": [f"{name}-prompt"],
            "rows_sha256": f"rows of {name}",
            "labels": "data",
            "granularity": "sequence",
        }
        (folder / at).mkdir(parents=True, exist_ok=True)
        FisherFile(fisher, pair.basis.u, pair.basis.v, record).save(folder / at / f"{name}.safetensors")
    return folder


def anchored(method, folder):
    """The method, told where the files at the base lie, if it reads some."""
    return with_option(method, "base_fisher", str(folder / "base")) if hasattr(method, "base_fisher") else method
