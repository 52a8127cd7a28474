"""The 4 GiB line for a Fisher pass of the size of a 7B model: scores to parts, parts to one file, and that file read.

n = 4 096 rows, D = 57 344 (``BENCH_ROWS`` sets n). The scores are random: what a model adds is not measured. Memory is
that of a process of its own; what it allocates and what it maps are told apart, as the kernel takes mapped pages back
when memory is short. The folder of temporary files holds up to 3 · 4 · n · D bytes (2.6 GiB).
"""

import json
import os
import subprocess
import sys

ROWS = int(os.environ.get("BENCH_ROWS", "4096"))
DIM = 57344
PASS = """
import json, resource, sys, time
from pathlib import Path
import torch
from src.fisher.accumulate import examples
from src.fisher.files import FisherFile, load_fisher
from src.fisher.shards import Shards
from src.models.fisher_pass import FisherPass, make_accumulators
from tests.benchmarks.memory import own, watch
rows, dim, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
shapes = {f"m{i}": (16, 16) for i in range(dim // 256)}
before = own()
seen = watch()
running = FisherPass(
    name="safety", rows=rows, weights={},
    make=lambda: make_accumulators("lowrank", shapes, mean=False, halves=True),
    shards=Shards(folder, "key"), rank=0, steps_per_shard=32, finished=frozenset(),
)
draw = torch.Generator().manual_seed(0)
start = time.perf_counter()
for step in range(rows // 8):
    index = torch.arange(8 * step, 8 * step + 8)
    running.fisher.begin(examples(index, [f"r{i}" for i in index.tolist()]))
    for name in shapes:
        running.fisher.update(name, *(torch.randn(8, 2, 16, generator=draw) for _ in range(2)))
    running.end_step(step, 8)
measured = time.perf_counter()
fisher, _ = running.join(torch.device("cpu"))
u, v = ({name: torch.eye(64, 16, dtype=torch.float64) for name in shapes} for _ in range(2))
FisherFile(fisher, u, v, {"rows": [f"r{i}" for i in range(rows)]}).save(folder / "f.safetensors")
del fisher
loaded = load_fisher(folder / "f.safetensors").fisher
loaded.trace()
found = {"parts": measured - start, "join": time.perf_counter() - measured, "own": seen[0] / 2**20}
found |= {"idle": before / 2**20, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
print(json.dumps(found))
"""


def test_memory_of_a_pass_of_the_size_of_a_7b_model(tmp_path):
    command = [sys.executable, "-c", PASS, str(ROWS), str(DIM), str(tmp_path)]
    numbers = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    sys.stderr.write(
        f"\nn = {ROWS}, D = {DIM}: parts written in {numbers['parts']:.1f} s, joined, written and read in "
        f"{numbers['join']:.1f} s, {numbers['own']:.2f} GiB allocated at peak ({numbers['idle']:.2f} before), "
        f"{numbers['peak']:.2f} with mapped files\n"
    )
    assert numbers["own"] < 4.0
