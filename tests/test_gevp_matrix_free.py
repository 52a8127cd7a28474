"""The matrix-free solver as one among the others: what it knows, its filters and sweeps, and where `solve` takes it."""

from functools import partial

import numpy as np
import pytest
import torch

from src.adapters.basis import core_basis
from src.errors import InputError
from src.fisher.block import BlockAccumulator
from src.fisher.diagonal import DiagonalAccumulator
from src.fisher.kronecker import KroneckerAccumulator
from src.fisher.lowrank_accumulator import LowRankAccumulator
from src.gevp import matrix_free
from src.gevp.dense import solve_dense
from src.gevp.diagnostics import summary
from src.gevp.filters import cut_at, position, soft, threshold, topk
from src.gevp.heldout import curve, energy_position, split_rows
from src.gevp.pencil import make_pencil
from src.gevp.solve import solve
from src.merge.base import FisherPair
from src.merge.pencil_plot import plot_pencil
from src.merge.sst import Sst
from tests import tiny
from tests.oracles import dense_eigh, dense_filtered, dense_pencil, eigenvectors
from tests.test_gevp_heldout import valid_cuts
from tests.tiny import make_model, random_pairs, random_patch

SHAPES = {"a": (4, 6), "b": (3, 5), "c": (6, 6)}
DIM = 75
PAIRS = [(LowRankAccumulator, KroneckerAccumulator), (BlockAccumulator, DiagonalAccumulator)]
KEPT = 9
random_fisher = partial(tiny.random_fisher, rows=20, shapes=SHAPES)


@pytest.fixture(autouse=True)
def few_coordinates_are_many(monkeypatch):
    monkeypatch.setattr("src.gevp.solve.DENSE_LIMIT", 40)


def pencil_of(kinds, rho_s=0.5, seeds=(1, 2)):
    return make_pencil(*(random_fisher(k, seed=s) for k, s in zip(kinds, seeds, strict=True)), rho=0.1, rho_s=rho_s)


def sides(pencil):
    return dense_pencil(pencil.left.dense().numpy(), pencil.right.dense().numpy(), rho=0.1, rho_s=0.5)


@pytest.mark.parametrize("kinds", PAIRS)
def test_unlike_representations_of_many_coordinates_get_their_leading_eigenpairs(kinds):
    pencil = pencil_of(kinds)
    system = solve(pencil, eigenpairs=KEPT)
    left, right = sides(pencil)
    expected, _ = dense_eigh(left, right)
    np.testing.assert_allclose(system.values.numpy(), expected[:KEPT], rtol=1e-9)
    assert system.unknown_at_most == pytest.approx(expected[KEPT], rel=1e-9)
    vectors = eigenvectors(system).numpy()
    np.testing.assert_allclose(vectors.T @ right @ vectors, np.eye(KEPT), atol=1e-9)
    assert abs(left @ vectors - right @ vectors * system.values.numpy()).max() < 1e-8 * abs(left @ vectors).max()
    # As many as there can be, where fewer coordinates are left than are asked for.
    whole = solve(pencil)
    assert (len(whole.values), whole.unknown) == (64, DIM - 64)


def test_what_is_not_known_is_said_and_never_zero():
    pencil = pencil_of(PAIRS[0])
    system = solve(pencil, eigenpairs=KEPT)
    found, left, right = summary(system), *sides(pencil)
    assert len(system.ordered()) == KEPT == found["span"]
    assert found["unknown"] == system.unknown == DIM - KEPT
    assert found["spectrum"] == {"rank": list(range(1, KEPT + 1)), "value": system.values.tolist()}
    assert found["complement_eigenvalue"] is found["effective_rank"] is None
    assert found["condition_safety"] == pytest.approx(np.linalg.cond(left), rel=1e-6)
    assert found["condition_utility"] == pytest.approx(np.linalg.cond(right), rel=1e-6)


@pytest.mark.parametrize("kinds", PAIRS)
def test_every_filter_of_a_path_equals_scipy(kinds):
    pencil, patch = pencil_of(kinds), random_patch(DIM)
    system, (left, right) = solve(pencil, eigenpairs=KEPT), sides(pencil)
    values, _ = dense_eigh(left, right)
    tau = float(values[4] + values[5]) / 2
    filters = [topk(system, 1), topk(system, KEPT), threshold(system, tau), soft(1e-3), soft(0.7), soft(300.0)]
    filters += [topk(system, DIM), soft(0.0)]
    factors = [np.arange(DIM) < 1, np.arange(DIM) < KEPT, values > tau]
    factors += [values / (values + t) for t in (1e-3, 0.7, 300.0)] + [np.ones(DIM)] * 2
    expansion = system.expand(patch)
    for row, phi, factor in zip(expansion.along(filters), filters, factors, strict=True):
        expected = dense_filtered(left, right, patch.numpy(), lambda _, factor=factor: factor)
        np.testing.assert_allclose(row.numpy(), expected, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(system.expand(patch).at(phi), row, rtol=1e-9, atol=1e-11)


def test_a_sweep_costs_no_product_with_a_fisher_matrix(monkeypatch):
    expansion = solve(pencil_of(PAIRS[1]), eigenpairs=KEPT).expand(random_patch(DIM))
    first = expansion.along([soft(0.01)])
    expected = [expansion.system.expand(random_patch(DIM)).at(soft(tau)) for tau in (0.05, 0.7, 20.0)]

    def product(*_):
        raise AssertionError("a product with a Fisher matrix")

    for kind in ("BlockFisher", "DiagonalFisher"):
        monkeypatch.setattr(f"src.fisher.{kind.removesuffix('Fisher').lower()}.{kind}.module_product", product)
    with pytest.raises(AssertionError):
        expansion.system.expand(random_patch(DIM)).at(soft(0.01))
    path = expansion.along([soft(0.05), soft(0.7), soft(20.0), topk(expansion.system, 3), soft(0.01)])
    torch.testing.assert_close(path[:3], torch.stack(expected), rtol=1e-9, atol=1e-11)
    assert torch.equal(path[-1], first[0])


@pytest.mark.parametrize("steps", [1, 3, 256])
def test_a_small_krylov_space_is_never_taken_for_a_large_one(monkeypatch, steps):
    monkeypatch.setattr(matrix_free, "STEPS", steps)
    pencil, patch = pencil_of(PAIRS[0]), random_patch(DIM)
    free, dense = solve(pencil, eigenpairs=KEPT), solve_dense(pencil)
    for tau in (1e-4, 0.3, 1e3):
        torch.testing.assert_close(
            free.expand(patch).at(soft(tau)), dense.expand(patch).at(soft(tau)), rtol=1e-8, atol=1e-10
        )


def test_a_patch_of_the_eigenvectors_alone_has_no_rest():
    system = solve(pencil_of(PAIRS[0]), eigenpairs=KEPT)
    weights = torch.arange(1.0, KEPT + 1).double()
    made = system.expand(system.combine(weights)).at(soft(0.7))
    torch.testing.assert_close(made, system.combine(weights * soft(0.7)(system.values)))


def test_filters_that_need_more_eigenpairs_are_refused():
    system = solve(pencil_of(PAIRS[0]), eigenpairs=KEPT)
    with pytest.raises(ValueError, match=rf"k is {KEPT + 1}, and {KEPT} of {DIM} eigenpairs were computed.*eigenpairs"):
        topk(system, KEPT + 1)
    with pytest.raises(ValueError, match=f"more than the {KEPT} directions that were computed"):
        threshold(system, system.unknown_at_most / 2)
    with pytest.raises(ValueError, match=f"more than the {KEPT} directions that were computed"):
        system.expand(random_patch(DIM)).at(lambda values: values.sqrt())
    assert threshold(system, system.unknown_at_most).k == KEPT
    assert [cut.k for cut in valid_cuts(system)] == [*range(1, KEPT + 1), DIM]
    assert [cut_at(system, position(system, k)).k for k in (1, KEPT, DIM)] == [1, KEPT, DIM]
    assert cut_at(system, 0.999).k == KEPT


def test_a_cut_through_an_eigenvalue_of_which_one_half_is_unknown_is_refused():
    safety, utility = random_fisher(LowRankAccumulator, rows=5), random_fisher(DiagonalAccumulator, seed=2)
    for total in utility.sums.values():
        total.fill_(utility.counts.sum() / 2)
    # F_u + εI is a multiple of the identity, and what 5 rows have not seen has the one eigenvalue σ/ε'.
    system = solve(make_pencil(safety, utility, rho=0.1, rho_s=0.5), eigenpairs=KEPT)
    assert system.unknown_at_most == pytest.approx(system.values[-1].item(), rel=1e-9)
    assert [cut.k for cut in valid_cuts(system)] == [1, 2, 3, 4, 5, DIM]
    with pytest.raises(ValueError, match=f"k is {KEPT}, which cuts through"):
        topk(system, KEPT)


@pytest.mark.parametrize("kinds", PAIRS)
def test_held_out_rules_and_curves_use_what_is_known(kinds):
    safety, utility = (random_fisher(kind, seed=seed) for kind, seed in zip(kinds, (1, 2), strict=True))
    folds = [
        split_rows(
            safety, utility, random_patch(DIM), lambda *two: make_pencil(*two, rho=0.1, rho_s=0.5), seed=0, **few
        )
        for few in ({"eigenpairs": KEPT}, {"eigenpairs": DIM - 1})
    ]
    kept = curve(folds[0], points=3)
    assert kept["safety_energy_kept"][-1] == pytest.approx(1.0)
    within = min(fold.kept(fold.expansion.at(topk(fold.expansion.system, KEPT))[None])[0].item() for fold in folds[0])
    places = [energy_position(each, 0.9 * within) for each in folds]
    both = zip(folds, places, strict=True)
    ks = [[cut_at(fold.expansion.system, where).k for fold in each] for each, where in both]
    assert max(ks[0]) <= KEPT
    assert abs(sum(ks[0]) - sum(ks[1])) <= 2
    with pytest.raises(ValueError, match=rf"the {KEPT} leading directions, of {DIM}, keep less than the share 0.999"):
        energy_position(folds[0], 0.999)


def test_sst_merges_unlike_representations_of_many_coordinates(tmp_path):
    safety = random_pairs(make_model(), 2, 2)
    core = core_basis([safety])
    kinds = (LowRankAccumulator, BlockAccumulator)
    pair = [tiny.random_fisher(kind, 24, seed, shapes=core.shapes) for seed, kind in enumerate(kinds, 1)]
    fisher, whole = FisherPair(*pair, core), core.coordinates(safety)
    dense = solve_dense(make_pencil(*pair, rho=0.1, rho_s=1.0))
    for options, phi in (
        ({"filter": "soft", "t": 2.0}, soft(2.0 * dense.pencil.trace_ratio)),
        ({"filter": "topk", "k": 4}, topk(dense, 4)),
    ):
        patch = Sst(**options, rho_s=1.0, eigenpairs=6).patch({}, safety, fisher)
        found = core.coordinates(patch.pairs)
        torch.testing.assert_close(found, dense.expand(whole).at(phi), rtol=1e-6, atol=1e-8)
        assert patch.findings["representation"] == "lowrank+block"
        # A soft filter needs no eigenpairs, and none are computed.
        assert patch.findings["unknown"] == core.dim - (0 if options["filter"] == "soft" else 6)
        assert 0 < patch.findings["held_out"]["safety_energy_kept"] < 1.5
    plot_pencil(patch.findings, tmp_path / "pencil.png")
    assert (tmp_path / "pencil.png").stat().st_size > 1000
    with pytest.raises(InputError, match=r"method\.k is 7, and 6 of 56 eigenpairs were computed"):
        Sst(filter="topk", k=7, rho_s=1.0, eigenpairs=6).patch({}, safety, fisher)
    with pytest.raises(InputError, match=r"method\.eigenpairs is 0"):
        Sst(eigenpairs=0)
