"""What tests of the merge stage share: Fisher matrices with known scores, and other factors of the same update."""

import torch

from src.adapters.basis import core_basis
from src.adapters.pairs import LowRankPair
from src.adapters.peft_files import read_adapter
from src.fisher.files import FisherFile
from src.fisher.lowrank import LowRankFisher
from src.merge.base import FisherPair


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


def regauged(pairs):
    draw = torch.Generator().manual_seed(5)
    turned = {}
    for name, pair in pairs.items():
        q = torch.randn(pair.rank, pair.rank, generator=draw, dtype=torch.float64)
        turned[name] = LowRankPair(torch.linalg.inv(q) @ pair.a.double(), pair.b.double() @ q)
    return turned


def write_fishers(folder, adapters, base):
    """Fisher files of the session's adapters with random scores in the right coordinates."""
    safety, utility = read_adapter(adapters["safety"]), read_adapter(adapters["utility"])
    pair = weight_space_fishers(safety.pairs)
    for name, fisher in (("safety", pair.safety), ("utility", pair.utility)):
        record = {
            "pass": name,
            "base": {"name": str(base), "fingerprint": None},
            "safety": {"path": safety.name, "sha256": safety.sha256},
            "utility": [{"path": utility.name, "sha256": utility.sha256, "weight": 1.0}],
            "basis_sha256": pair.basis.digest(),
            "seen": [f"{name}-prompt"],
        }
        FisherFile(fisher, pair.basis.u, pair.basis.v, record).save(folder / f"{name}.safetensors")
    return folder
