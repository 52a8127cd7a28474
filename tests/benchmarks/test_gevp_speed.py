"""The Gram solver against dense ``scipy.linalg.eigh``, and its memory and cost at the size of a 7B model, in one run.

``BENCH_DENSE_DIM`` sets D of the dense comparison (13 440: SmolLM2 at r = 8; the dense solve takes many minutes there).
Memory is that of a process of its own; scores are mapped files, as a merge reads them: what the process allocates, and
that with the pages of the files that it holds.
"""

import json
import os
import subprocess
import sys
import time

import pytest
import scipy.linalg
import torch
from safetensors.torch import save_file

from src.fisher.lowrank import LowRankFisher
from src.gevp.lowrank import lowrank_system
from src.gevp.pencil import make_pencil

DENSE_DIM = int(os.environ.get("BENCH_DENSE_DIM", "13440"))
SETTINGS = {"rho": 0.1, "rho_s": 10.0}
SOLVE = """
import json, resource, sys, time
from pathlib import Path
import torch
from src.fisher.lowrank import LowRankFisher
from src.fisher.score_tables import MappedTable
from src.gevp.filters import soft
from src.gevp.heldout import curve, split_rows
from src.gevp.lowrank import lowrank_system
from src.gevp.pencil import make_pencil
from tests.benchmarks.memory import own, watch
rows, dim, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
fishers = [LowRankFisher(MappedTable(Path(folder) / name, "scores"), rows) for name in ("safety", "utility")]
before = own()
seen = watch()
start = time.perf_counter()
system = lowrank_system(make_pencil(*fishers, rho=0.1, rho_s=10.0))
solved = time.perf_counter()
system.expand(torch.ones(dim)).at(soft(1.0))
applied = time.perf_counter()
fitted = seen[0]
# As a merge does: the solution of all rows is kept beside those of both halves.
folds = split_rows(*fishers, torch.ones(dim), lambda *two: make_pencil(*two, rho=0.1, rho_s=10.0), seed=0)
curve(folds)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = {"solve": solved - start, "apply": applied - solved, "held_out": time.perf_counter() - applied}
found |= {"peak": peak / 2**20, "own": fitted / 2**20, "merge": seen[0] / 2**20, "idle": before / 2**20}
print(json.dumps(found))
"""


def fishers(rows, dim):
    draw = torch.Generator().manual_seed(0)
    decay = torch.linspace(0, -6, dim).exp()
    return [LowRankFisher(torch.randn(rows, dim, generator=draw) * decay, rows) for _ in range(2)]


def test_gram_against_dense():
    safety, utility = fishers(512, DENSE_DIM)
    start = time.perf_counter()
    system = lowrank_system(make_pencil(safety, utility, **SETTINGS))
    ours = time.perf_counter() - start
    left = safety.dense() + system.pencil.sigma * torch.eye(DENSE_DIM, dtype=torch.float64)
    right = utility.dense() + system.pencil.epsilon * torch.eye(DENSE_DIM, dtype=torch.float64)
    start = time.perf_counter()
    values, vectors = scipy.linalg.eigh(left.numpy(), right.numpy(), overwrite_a=True, overwrite_b=True)
    dense = time.perf_counter() - start
    order = torch.from_numpy(values.copy()).flip(0)
    kept = int((system.values > system.complement_value).sum())
    torch.testing.assert_close(system.values[:kept], order[:kept], rtol=1e-8, atol=0.0)
    # The projections of one patch on the leading half of these directions agree.
    k = kept // 2
    patch = torch.randn(DENSE_DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    threshold = (order[k - 1] + order[k]) / 2
    found = system.expand(patch).at(lambda v: (v > threshold).to(v.dtype))
    leading = torch.from_numpy(vectors[:, ::-1][:, :k].copy())
    metric = utility.matvec(patch) + system.pencil.epsilon * patch
    expected = leading @ (leading.T @ metric)
    difference = ((found - expected).norm() / expected.norm()).item()
    sys.stderr.write(
        f"\nD = {DENSE_DIM}, n = 512 + 512: Gram {ours:.2f} s, dense eigh {dense:.1f} s, {dense / ours:.0f} x as fast, "
        f"projections differ by {difference:.1e}\n"
    )
    assert difference < 1e-8


@pytest.mark.parametrize("rows", [512, 1024, 4096])
def test_memory_and_cost_at_the_size_of_a_7b_model(rows, tmp_path):
    found = {}
    for dim in (14336, 57344) if rows == 1024 else (57344,):
        for name, fisher in zip(("safety", "utility"), (0, 1), strict=True):
            scores = torch.randn(rows, dim, generator=torch.Generator().manual_seed(fisher))
            save_file({"scores": scores}, tmp_path / name)
            del scores
        command = [sys.executable, "-c", SOLVE, str(rows), str(dim), str(tmp_path)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found[dim] = json.loads(output)
        for name in ("safety", "utility"):
            (tmp_path / name).unlink()
    for dim, numbers in found.items():
        sys.stderr.write(
            f"\nD = {dim}, n = {rows} + {rows}: solve {numbers['solve']:.1f} s, one filter {numbers['apply']:.1f} s, "
            f"{numbers['own']:.2f} GiB allocated at peak ({numbers['idle']:.2f} before); held-out shares "
            f"{numbers['held_out']:.1f} s, {numbers['merge']:.2f} GiB; {numbers['peak']:.2f} with mapped scores\n"
        )
        assert max(numbers["merge"], numbers["peak"]) < 4.0
    if len(found) > 1:
        sys.stderr.write(f"4 x the coordinates: {found[57344]['solve'] / found[14336]['solve']:.2f} x the time\n")
