"""Element-wise combinations against mergekit's own functions, in mergekit's own environment (make oracles)."""

import subprocess
from pathlib import Path

import pytest
import torch

from src.adapters.deltas import DenseDelta, matrix
from src.merge.combination import Expert
from src.merge.combinations.breadcrumbs import Breadcrumbs
from src.merge.combinations.dare import Dare
from src.merge.combinations.della import Della
from src.merge.combinations.linear import Linear
from src.merge.combinations.task_arithmetic import TaskArithmetic
from src.merge.combinations.ties import Ties
from src.merge.randomness import bernoulli, uniform

ROOT = Path(__file__).resolve().parents[1]
PYTHON = ROOT / ".oracles" / "mergekit" / "bin" / "python"
SPECS = {
    "ties": ("magnitude", "sum", True, 1.0),
    "ties_scaled": ("magnitude", "sum", True, 1.7),
    "ties_sum": ("magnitude", "sum", False, 1.0),
    "ties_count": ("magnitude", "count", True, 1.0),
    "linear": (None, None, True, 1.0),
    "task_arithmetic": (None, None, False, 1.0),
    "della": ("della_magprune", "sum", True, 1.3),
    "della_linear": ("della_magprune", None, False, 1.0),
    "breadcrumbs": ("magnitude_outliers", None, False, 1.0),
    "breadcrumbs_ties": ("magnitude_outliers", "sum", False, 1.0),
}
DENSITY, GAMMA, EPSILON, SEED = 0.6, 0.1, 0.2, 4


def ours(name):
    mergekit = {"density": DENSITY, "convention": "mergekit"}
    return {
        "ties": Ties(**mergekit),
        "ties_scaled": Ties(**mergekit, scale=1.7),
        "ties_sum": Ties(**mergekit, normalise=False),
        "ties_count": Ties(**mergekit, majority="frequency"),
        "linear": Linear(),
        "task_arithmetic": TaskArithmetic(),
        # Mergekit restores magnitudes by no factor but the l1 norm, here switched off.
        "della": Della(DENSITY, EPSILON, rescale="none", scale=1.3, seed=SEED),
        "della_linear": Della(DENSITY, EPSILON, rescale="none", election="none", normalise=False, seed=SEED),
        "breadcrumbs": Breadcrumbs(DENSITY, GAMMA),
        "breadcrumbs_ties": Breadcrumbs(DENSITY, GAMMA, election="mergekit"),
    }[name]


def inputs():
    draw = torch.Generator().manual_seed(0)
    wide = [torch.randn(11, 13, generator=draw) for _ in range(4)]
    edge = [torch.zeros(5, 4), torch.arange(-10.0, 10.0).reshape(5, 4) + 0.25]
    return {
        "equal": (wide, [1.0] * 4),
        "unequal": (wide, [0.3, 1.5, 0.7, 2.0]),
        "negative": (wide, [1.0, -0.5, 0.8, 1.2]),
        "one": (wide[:1], [1.0]),
        "zeros": (edge, [1.0, 0.5]),
    }


def result(combination, deltas, weights):
    experts = [Expert(f"e{i}", w, {"m": DenseDelta(d)}) for i, (d, w) in enumerate(zip(deltas, weights, strict=True))]
    return matrix(combination.combine(experts).deltas["m"])


@pytest.fixture(scope="module")
def mergekits(tmp_path_factory):
    if not PYTHON.exists():
        pytest.skip("mergekit is not installed in .oracles/mergekit (make oracles)")
    cases = {}
    for name, (sparsify, consensus, normalise, scale) in SPECS.items():
        for kind, (deltas, weights) in inputs().items():
            cases[f"{name}/{kind}"] = {
                "deltas": deltas,
                "weights": weights,
                "density": DENSITY,
                "gamma": GAMMA,
                "epsilon": EPSILON,
                # What decides which elements DELLA keeps: the same numbers for both.
                "drawn": [uniform(SEED, f"e{i}", "m", slice(0, len(d)), d.shape[1]) for i, d in enumerate(deltas)],
                "sparsify": sparsify,
                "consensus": consensus,
                "normalise": normalise,
                "scale": scale,
            }
    delta = inputs()["equal"][0][0]
    cases["l1"] = {"deltas": [delta], "mask": bernoulli(0.4, 2, "e0", "m", slice(0, 11), 13).float()}
    folder = tmp_path_factory.mktemp("mergekit")
    torch.save(cases, folder / "cases.pt")
    script = ROOT / "tests" / "mergekit_oracle.py"
    subprocess.run([PYTHON, script, folder / "cases.pt", folder / "results.pt"], check=True, capture_output=True)
    return torch.load(folder / "results.pt")


@pytest.mark.processes
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("kind", ["equal", "unequal", "negative", "one", "zeros"])
def test_element_wise_merges_are_mergekits(mergekits, name, kind):
    deltas, weights = inputs()[kind]
    torch.testing.assert_close(result(ours(name), deltas, weights), mergekits[f"{name}/{kind}"])


@pytest.mark.processes
def test_rescaling_to_the_l1_norm_is_mergekits(mergekits):
    found = result(Dare(0.4, rescale="l1", seed=2), inputs()["equal"][0][:1], [1.0])
    torch.testing.assert_close(found, mergekits["l1"])
