"""Speed of merges against PEFT's and mergekit's way, on the shapes of a 7B Llama, in one run.

Random adapters of rank 16. Prints the numbers with what was run; asserts on results, never on time.
``MERGE_BENCH_LAYERS`` sets the number of layers of the whole merge (32 in a 7B Llama); the other measurements are of
4096 x 4096 layers (``MERGE_BENCH_WIDTH``). Ours run as the merge command runs them, PEFT with all its threads.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import merge_utils

from src.adapters.deltas import matrix
from src.adapters.pairs import LowRankPair
from src.adapters.truncate import truncate
from src.merge.combination import Expert
from src.merge.combinations.dare import Dare
from src.merge.combinations.task_arithmetic import TaskArithmetic
from src.merge.combinations.ties import Ties
from src.merge.parallel import in_order, one_thread_each

WIDTH = int(os.environ.get("MERGE_BENCH_WIDTH", "4096"))
LAYERS = int(os.environ.get("MERGE_BENCH_LAYERS", "32"))
RANK = 16
MODULES = 4
ROOT = Path(__file__).resolve().parents[2]


def in_a_merge(function):
    """Time a function under the conditions of the merge command: modules in parallel, one thread each."""
    with one_thread_each() as workers:
        seconds, results = timed(lambda: in_order(function, list(range(MODULES)), workers))
    return seconds / MODULES, results[0]


def timed(function):
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def experts(count):
    draw = torch.Generator().manual_seed(0)
    factors = [
        (torch.randn(RANK, WIDTH, generator=draw), torch.randn(WIDTH, RANK, generator=draw) * 0.01)
        for _ in range(count)
    ]
    return [Expert(f"e{i}", 1.0, {"q": LowRankPair(a, b)}) for i, (a, b) in enumerate(factors)]


class OneLayer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q = torch.nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x):
        return self.q(x)


def pefts(given):
    """A PEFT model of one layer that holds the experts as its adapters."""
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["q"])
    model = get_peft_model(OneLayer(), config, adapter_name="e0")
    for expert in given[1:]:
        model.add_adapter(expert.key, config)
    layer = model.base_model.model.q
    for expert in given:
        layer.lora_A[expert.key].weight.data = expert.deltas["q"].a.clone()
        layer.lora_B[expert.key].weight.data = expert.deltas["q"].b.clone()
    return model


def weighted_adapter(given, kind, **options):
    model = pefts(given)
    names = [expert.key for expert in given]

    def run():
        model.add_weighted_adapter(names, [1.0] * len(names), "m", combination_type=kind, svd_rank=RANK, **options)
        return model.base_model.model.q.get_delta_weight("m")

    return timed(run)


def report(what, ours, peer, who):
    sys.stdout.write(f"\n{what}: {ours:.3f} s, {who} {peer:.3f} s, ratio {peer / ours:.1f}")


def test_task_arithmetic_to_rank_16():
    given = experts(3)
    ours, found = in_a_merge(lambda _: truncate(TaskArithmetic().combine(given).deltas["q"], rank=RANK, energy=None))
    exact, _ = timed(lambda: TaskArithmetic().combine(given).deltas["q"])
    peer, theirs = weighted_adapter(given, "svd")
    report(f"TA of 3 adapters, rank {RANK}, {WIDTH} x {WIDTH}", ours, peer, "PEFT svd")
    sys.stdout.write(f" (exact factors: {exact * 1e3:.2f} ms)")
    # PEFT's singular vectors are those of a float32 SVD; the largest element is about 0.3.
    torch.testing.assert_close(found.pair.dense().float(), theirs, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("name", ["ties", "dare_linear"])
def test_full_rank_merges(name):
    given = experts(3)
    method = Ties(0.2) if name == "ties" else Dare(0.2)
    ours, found = in_a_merge(lambda _: matrix(method.combine(given).deltas["q"]))

    def peer():
        deltas = [e.deltas["q"].b @ e.deltas["q"].a for e in given]
        return getattr(merge_utils, name)(deltas, torch.ones(3), 0.2)

    theirs_time, theirs = timed(peer)
    for _ in range(MODULES - 1):
        theirs_time += timed(peer)[0]
    theirs_time /= MODULES
    report(f"{name} of 3 adapters, full delta {WIDTH} x {WIDTH}", ours, theirs_time, "PEFT")
    if name == "ties":
        # Near the threshold an element may fall on either side, by the rounding of the product.
        assert ((found - theirs).abs() > 1e-5).double().mean() < 1e-5


def test_ties_to_rank_16_keeps_pefts_energy():
    given = experts(3)
    ours, found = in_a_merge(lambda _: truncate(Ties(0.2).combine(given).deltas["q"], rank=RANK, energy=None))
    peer, theirs = weighted_adapter(given, "ties_svd", density=0.2)
    energy = theirs.double().square().sum().item()
    report(f"TIES of 3 adapters to rank {RANK}, {WIDTH} x {WIDTH}", ours, peer, "PEFT ties_svd")
    sys.stdout.write(f" (kept energy {found.kept / found.total:.5f}, PEFT {energy / found.total:.5f})")
    assert found.kept >= energy * (1 - 1e-3)


@pytest.mark.parametrize("method", [TaskArithmetic(), Ties(0.2), Dare(0.2)], ids=lambda m: m.name)
def test_cost_is_linear_in_the_number_of_adapters(method):
    few, many = experts(8), experts(20)
    seconds = [in_a_merge(lambda _, n=n: matrix(method.combine(n).deltas["q"]))[0] for n in (few, many)]
    sys.stdout.write(f"\n{method.name}: 8 adapters {seconds[0]:.3f} s, 20 adapters {seconds[1]:.3f} s")
    sys.stdout.write(f", ratio {seconds[1] / seconds[0]:.2f} (2.5 is linear)")


WHOLE = """
import sys, torch
from pathlib import Path
from src.adapters.basis import core_basis
from src.adapters.pairs import LowRankPair
from src.adapters.peft_files import read_adapter, write_adapter
from src.fisher.files import FisherFile
from src.fisher.lowrank import LowRankFisher
root, layers, rank = Path(sys.argv[1]), int(sys.argv[2]), 16
draw = torch.Generator().manual_seed(0)
square, up, down = (4096, 4096), (11008, 4096), (4096, 11008)
shapes = {"self_attn.q_proj": square, "self_attn.k_proj": square, "self_attn.v_proj": square,
          "self_attn.o_proj": square, "mlp.gate_proj": up, "mlp.up_proj": up, "mlp.down_proj": down}
for name in ("utility", "safety"):
    pairs = {f"model.layers.{i}.{m}": LowRankPair(torch.randn(rank, s[1], generator=draw),
             torch.randn(s[0], rank, generator=draw) * .01) for i in range(layers) for m, s in shapes.items()}
    write_adapter(root / name, pairs, base="llama", manifest={}, seen=frozenset(), card="c")
utility, safety = read_adapter(root / "utility"), read_adapter(root / "safety")
step = sys.argv[3] == "step"
core = core_basis([utility.pairs, safety.pairs] if step else [safety.pairs])
between = {"utility": 1.0, "safety": 0.45}
start = 0.45 * core.coordinates(safety.pairs)
rows = {"safety": 256, "utility": 768, "benign": 768} if step else {"safety": 512, "utility": 512}
for name, n in rows.items():
    record = {"pass": name, "base": {"name": "llama", "fingerprint": None}, "seen": [], "labels": "model",
              "safety": {"path": "s", "sha256": safety.sha256}, "basis_sha256": "x",
              "reference": "utility" if name == "utility" else between,
              "utility": [{"path": "u", "sha256": utility.sha256, "weight": 1.0}]}
    scores = torch.randn(n, core.dim, generator=draw)
    more = {}
    if step and name != "utility":
        mean = scores.double().mean(0)
        more = {"mean": mean, "half_means": torch.stack([mean, mean]), "start": start}
    FisherFile(LowRankFisher(scores, n), core.u, core.v, record, **more).save(root / "fisher" / f"{name}.safetensors")
"""
MERGE = """
import resource, sys, time
from pathlib import Path
from src.merge.sst import Sst
from src.merge.stage import merge
root = Path(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
step = {"method": Sst(coefficients="relearn", ridge="kronecker", radius=0.3), "sweep": {"t": [20.0, 10.0]}}
given = step if sys.argv[2] == "step" else {"method": Sst(), "alpha": [0.5, 1.0]}
merge(utility=str(root / "utility"), safety=str(root / "safety"), fisher=str(root / "fisher"),
      output=str(root / "merged"), **given)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(f"{time.perf_counter() - start:.1f} s, peak memory {peak / 2**20:.2f} GiB (before: {before / 2**20:.2f})")
"""


@pytest.mark.parametrize(
    ("kind", "rows", "last"), [("filter", "512 + 512", "alpha-1"), ("step", "256 + 768 + 768", "t-10")]
)
def test_a_whole_sst_merge(tmp_path, kind, rows, last):
    """The filter in the safety expert's space, and a step from between in that of both experts."""
    subprocess.run([sys.executable, "-c", WHOLE, tmp_path, str(LAYERS), kind], check=True, cwd=ROOT)
    command = [sys.executable, "-c", MERGE, tmp_path, kind]
    done = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True)
    sys.stdout.write(
        f"\nSST merge ({kind}) at two strengths, {LAYERS} layers of 7B shapes, n = {rows}: {done.stdout.strip()}"
    )
    assert (tmp_path / "merged" / last / "adapter_config.json").exists()
