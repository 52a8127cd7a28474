"""A ridge of Kronecker form against dense matrices, and the step of re-learned coefficients under it."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from src.adapters.basis import CoreBasis
from src.errors import InputError
from src.fisher.block import BlockAccumulator
from src.fisher.lowrank import LowRankFisher
from src.fisher.lowrank_accumulator import LowRankAccumulator
from src.gevp.kronecker_ridge import kronecker_ridge
from src.merge.base import PatchedFisher
from src.merge.sst import Sst
from src.merge.sst_relearn import RelearnSettings, held_out, relearned
from tests.oracles import dense_kronecker_ridge, dense_relearned
from tests.test_fisher_files import SHAPES, random_fisher

DIM = sum(p * q for p, q in SHAPES.values())
U = {name: torch.eye(5, p).double() for name, (p, _) in SHAPES.items()}
BASIS = CoreBasis(U, {name: torch.eye(6, q).double() for name, (_, q) in SHAPES.items()})
FREE = RelearnSettings(2.0, 3.0, rho_s=5.0, radius=1e9, control="none", ridge="kronecker", damping=0.2)


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense_ridge(fisher, damping):
    return dense_kronecker_ridge(fisher.scores.double().numpy(), fisher.total, SHAPES, damping)


def weighted(fisher):
    """The same rows with weights, as a pass over weighted sources writes them."""
    weights = torch.linspace(0.5, 1.5, fisher.count, dtype=torch.float64)
    return replace(fisher, stored=fisher.scores * weights.sqrt()[:, None], weights=weights)


def silent(fisher):
    """The same rows, of which no score touches the first module."""
    scores = fisher.scores.clone()
    scores[:, :6] = 0
    return replace(fisher, stored=scores)


FISHERS = {
    "many rows": lambda: random_fisher(LowRankAccumulator, 40, 1),
    "one row": lambda: random_fisher(LowRankAccumulator, 1, 1),
    "half of the rows": lambda: random_fisher(LowRankAccumulator, 20, 1).halves(0)[0],
    "weights": lambda: weighted(random_fisher(LowRankAccumulator, 20, 1)),
    "a module without scores": lambda: silent(random_fisher(LowRankAccumulator, 20, 1)),
}


@pytest.mark.parametrize("kind", FISHERS)
@pytest.mark.parametrize("damping", [0.1, 10.0])
def test_the_ridge_is_the_identity_in_its_coordinates(kind, damping):
    fisher = FISHERS[kind]()
    ridge, dense = kronecker_ridge(fisher, SHAPES, damping), dense_ridge(fisher, damping)
    vectors, scores = draw(3, 4, DIM), draw(4, 4, DIM)
    inside = ridge.coordinates(vectors)
    np.testing.assert_allclose(inside @ inside.T, vectors.numpy() @ dense @ vectors.numpy().T, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ridge.scores(scores) @ inside.T, scores @ vectors.T)
    torch.testing.assert_close(ridge.vectors(inside), vectors)
    torch.testing.assert_close(ridge.coordinates(vectors[0]), inside[0])
    assert np.trace(dense) == pytest.approx(DIM * (1 + damping))
    changed = ridge.fisher(fisher)
    torch.testing.assert_close(changed.energies(inside), fisher.energies(vectors))
    assert (changed.count, changed.total) == (fisher.count, fisher.total)


def test_scores_keep_their_format():
    fisher = random_fisher(LowRankAccumulator, 70, 1)
    single = replace(fisher, stored=fisher.scores.float())
    ridge = kronecker_ridge(single, SHAPES, 0.1)
    assert ridge.fisher(single).scores.dtype == torch.float32
    torch.testing.assert_close(
        ridge.fisher(single).scores.double(), ridge.scores(single.scores).double(), rtol=1e-5, atol=1e-5
    )


def patched(rows=(30, 25, 20), seed=0):
    three = [random_fisher(LowRankAccumulator, n, seed + i) for i, n in enumerate(rows)]
    return PatchedFisher(three[0], three[1], BASIS, three[2], draw(seed + 7, DIM), draw(seed + 8, DIM))


@pytest.mark.parametrize("control", ["none", "utility_only"])
@pytest.mark.parametrize("radius", [1e9, 0.05])
@pytest.mark.parametrize("start", [None, draw(11, DIM)])
def test_a_step_equals_the_dense_solve_with_that_ridge(control, radius, start):
    fisher, whole = replace(patched(), start=start), draw(5, DIM)
    settings = replace(FREE, control=control, radius=radius)
    made, found = relearned(fisher, whole, settings)
    begin = whole if start is None else start
    s, b, u = (each.dense().numpy() for each in (fisher.safety, fisher.benign, fisher.utility))
    weights = {"tau": 2.0 * np.trace(s) / np.trace(b), "trust": 3.0 * np.trace(s) / np.trace(u)}
    g_s, each = fisher.safety_mean.numpy(), np.trace(s) / DIM
    if control == "utility_only":
        s, g_s = 0 * s, 0 * g_s
    ridge = dense_ridge(fisher.benign, 0.2)
    sigma, g_u = found["sigma"], fisher.benign_mean.numpy()
    expected = dense_relearned(s, b, u, g_s, g_u, begin.numpy(), **weights, sigma=sigma, ridge=ridge)
    np.testing.assert_allclose(made.numpy(), expected, rtol=1e-7, atol=1e-9)
    length = np.sqrt(whole.numpy() @ ridge @ whole.numpy())
    step = np.sqrt((expected - begin.numpy()) @ ridge @ (expected - begin.numpy())) / length
    assert found["step"] == pytest.approx(step, rel=1e-6)
    if radius < 1:
        assert 0.99 * radius <= step <= radius
    else:
        assert sigma == pytest.approx((6.0 if control == "utility_only" else 5.0) * each)
    assert found["objective_after"] < found["objective_before"]
    assert (found["tau"], found["trust"]) == pytest.approx((weights["tau"], weights["trust"]))


def test_a_step_does_not_depend_on_the_bases_of_the_space():
    """K turns with the coordinates: orthogonal changes of U and V change nothing that is merged."""
    fisher, whole = patched(), draw(5, DIM)
    turns = [
        (torch.linalg.qr(draw(20 + p, p, p))[0], torch.linalg.qr(draw(30 + q, q, q))[0]) for p, q in SHAPES.values()
    ]
    turn = torch.block_diag(*(torch.kron(left.contiguous(), right.contiguous()) for left, right in turns))
    names = ("safety", "utility", "benign")
    turned = {name: replace(getattr(fisher, name), stored=getattr(fisher, name).scores @ turn.T) for name in names}
    means = {name: turn @ getattr(fisher, name) for name in ("safety_mean", "benign_mean")}
    settings = replace(FREE, radius=0.3)
    made, found = relearned(fisher, whole, settings)
    again, same = relearned(replace(fisher, **turned, **means), turn @ whole, settings)
    torch.testing.assert_close(turn.T @ again, made)
    assert same["sigma"] == pytest.approx(found["sigma"])


def test_what_is_held_out_comes_from_the_half_that_was_fitted():
    """The ridge as well: the half that judges has no part in it."""
    one, two, whole = patched(seed=40), patched(seed=50), draw(5, DIM)
    found = held_out((one, two), whole, whole, replace(FREE, radius=0.3))
    expected = {"safety_energy_kept": 0.0, "utility_tax_kept": 0.0}
    for fitted, judge in ((one, two), (two, one)):
        made, _ = relearned(fitted, whole, replace(FREE, radius=0.3))
        for name, side in zip(expected, (judge.safety, judge.utility), strict=True):
            expected[name] += side.energy(made) / side.energy(whole) / 2
    assert found == pytest.approx(expected)


def test_inputs_that_benign_rows_use_are_moved_less():
    """Benign rows hold ten times as much of one input: a step that refusals want everywhere goes elsewhere."""
    loud = torch.ones(DIM, dtype=torch.float64)
    loud[[0, 3]] = 10.0  # the first of the three inputs of the first module, which has two outputs
    fisher, whole, alike = patched(), draw(5, DIM), torch.ones(DIM, dtype=torch.float64)
    fisher = replace(
        fisher,
        safety=replace(fisher.safety, stored=fisher.safety.scores * 1e-3),
        benign=replace(fisher.benign, stored=fisher.benign.scores * loud),
        safety_mean=alike,
        benign_mean=0 * alike,
    )
    settings = replace(FREE, t=1e-6, trust=0.0, radius=0.3)
    steps = [relearned(fisher, whole, replace(settings, ridge=r))[0] - whole for r in ("identity", "kronecker")]
    shares = [step[[0, 3]].abs().mean() / step.abs().mean() for step in steps]
    assert shares[0] > 0.9
    assert shares[1] < 0.3


@pytest.mark.parametrize("damping", [0.0, -1.0, float("inf"), float("nan")])
def test_a_damping_out_of_range_is_refused(damping):
    with pytest.raises(ValueError, match="damping is"):
        kronecker_ridge(random_fisher(LowRankAccumulator, 4), SHAPES, damping)
    with pytest.raises(InputError, match=r"method.damping is .*; expected a number above 0"):
        Sst(coefficients="relearn", ridge="kronecker", damping=damping)


@pytest.mark.parametrize("options", [{}, {"coefficients": "relearn", "control": "safety_only"}])
def test_a_ridge_of_benign_rows_is_refused_where_there_are_none(options):
    with pytest.raises(InputError, match=r"method.ridge is 'kronecker'.*; expected relearn, and control none"):
        Sst(ridge="kronecker", **options)


def test_other_representations_and_zero_scores_are_refused():
    with pytest.raises(ValueError, match="needs lowrank Fisher files, not block"):
        kronecker_ridge(random_fisher(BlockAccumulator), SHAPES, 0.1)
    with pytest.raises(ValueError, match="is zero"):
        kronecker_ridge(LowRankFisher(torch.zeros(2, DIM), 2), SHAPES, 0.1)
    ridge = kronecker_ridge(random_fisher(LowRankAccumulator), SHAPES, 0.1)
    with pytest.raises(ValueError, match="needs lowrank Fisher files, not block"):
        ridge.fisher(random_fisher(BlockAccumulator))
