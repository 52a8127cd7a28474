"""The matrix-free solver where the diagonal is uneven, up to 1e12, and where rows are few: scipy is the judge.

At the default ridges (ρ = .1, ρ_s = 10) a soft filter needs no eigenpairs, and none are computed.
"""

import numpy as np
import pytest
import torch

from src.adapters.basis import core_basis
from src.fisher.accumulate import examples
from src.fisher.block import BlockAccumulator, BlockFisher
from src.fisher.diagonal import DiagonalFisher
from src.fisher.lowrank import LowRankFisher
from src.fisher.lowrank_accumulator import LowRankAccumulator
from src.gevp import iterations, krylov, matrix_free
from src.gevp.dense import solve_dense
from src.gevp.filters import soft, threshold, topk
from src.gevp.pencil import make_pencil
from src.gevp.relearn import RelearnProblem, relearn
from src.gevp.solve import solve
from src.merge.base import FisherPair
from src.merge.pencil_plot import plot_pencil
from src.merge.sst import Sst
from tests.oracles import dense_eigh, dense_filtered, dense_pencil, dense_relearned
from tests.test_gevp_matrix_free import few_coordinates_are_many  # noqa: F401 - a fixture
from tests.tiny import make_model, random_pairs, random_patch

SHAPES = {f"m.{i}": (4, 4) for i in range(20)}
DIM = 320


def scores(rows, seed, spread):
    """(rows, D) scores whose squares range over 10^spread, in a random order of the coordinates."""
    draw = torch.Generator().manual_seed(seed)
    found = torch.randn(rows, DIM, generator=draw, dtype=torch.float64)
    order = torch.randperm(DIM, generator=torch.Generator().manual_seed(99))
    return found * torch.logspace(0, -spread / 2, DIM, dtype=torch.float64)[order]


def diagonal_of(given):
    sums = {n: part.square().sum(0)[None] for n, part in zip(SHAPES, given.split(16, 1), strict=True)}
    return DiagonalFisher(SHAPES, torch.tensor([float(len(given))]).double(), sums)


def block_of(given):
    sums = {n: (part.T @ part)[None] for n, part in zip(SHAPES, given.split(16, 1), strict=True)}
    return BlockFisher(SHAPES, torch.tensor([float(len(given))]).double(), sums)


def lowrank_of(given):
    return LowRankFisher(given, len(given))


PAIRS = {
    "lowrank+diagonal": (lowrank_of, diagonal_of),
    "block+lowrank": (block_of, lowrank_of),
    "diagonal+block": (diagonal_of, block_of),
}


def pair_of(name, spread, rows=(20, 30)):
    return [make(scores(n, seed, spread)) for make, n, seed in zip(PAIRS[name], rows, (1, 2), strict=True)]


@pytest.fixture
def products(monkeypatch):
    """How often a matrix was multiplied with a vector."""
    made = []
    for kind in (LowRankFisher, BlockFisher, DiagonalFisher):
        real = kind.matvec
        monkeypatch.setattr(kind, "matvec", lambda own, v, real=real: (made.append(1), real(own, v))[1])
    return made


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("spread", [0, 4, 12])
@pytest.mark.parametrize("rows", [(20, 30), (1, 1), (1, 30)])
def test_soft_at_the_default_ridges_is_scipys_within_few_products(monkeypatch, products, name, spread, rows):
    monkeypatch.setattr(iterations, "eigsh", None)
    pair = pair_of(name, spread, rows)
    pencil = make_pencil(*pair, rho=0.1, rho_s=10.0)
    system = solve(pencil, eigenpairs=0)
    expansion, used = system.expand(random_patch(DIM)), len(products)
    left, right = dense_pencil(*(side.dense().numpy() for side in pair), rho=0.1, rho_s=10.0)
    for t in (10.0, 1.0, 1e-3):
        tau = t * pencil.trace_ratio
        expected = np.linalg.solve(left + tau * right, left @ random_patch(DIM).numpy())
        found = expansion.at(soft(tau)).numpy()
        assert np.linalg.norm(found - expected) < 1e-9 * np.linalg.norm(expected)
    assert len(products) - used < 600
    for side, dense in (("left", left), ("right", right)):
        assert system.conditions()[side] == pytest.approx(np.linalg.cond(dense), rel=1e-8)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize(("spread", "rho_s"), [(0, 10.0), (4, 10.0), (12, 0.1), (12, 0.0)])
def test_leading_eigenpairs_are_scipys_within_few_products(products, name, spread, rho_s):
    pair = pair_of(name, spread)
    pencil = make_pencil(*pair, rho=0.1, rho_s=rho_s)
    system = solve(pencil, eigenpairs=12)
    assert len(products) < 3000
    left, right = dense_pencil(*(side.dense().numpy() for side in pair), rho=0.1, rho_s=rho_s)
    expected, _ = dense_eigh(left, right)
    np.testing.assert_allclose(system.values.numpy(), expected[:12], rtol=1e-11)
    for k in (1, 12):
        projected = dense_filtered(left, right, random_patch(DIM).numpy(), lambda _, k=k: np.arange(DIM) < k)
        found = system.expand(random_patch(DIM)).at(topk(system, k)).numpy()
        assert np.linalg.norm(found - projected) < 1e-6 * np.linalg.norm(projected)


def test_eigenvalues_too_close_to_each_other_end_in_one_line_that_says_what_to_do(monkeypatch, products):
    monkeypatch.setattr(iterations, "PRODUCTS", 400)
    pencil = make_pencil(*pair_of("lowrank+diagonal", 12), rho=0.1, rho_s=10.0)
    with pytest.raises(ValueError, match=r"of the 65 largest were found in 400") as error:
        solve(pencil)
    assert len(products) < 4000
    assert "\n" not in str(error.value)
    for way in ("filter soft", "fewer eigenpairs", "smaller ridge rho_s", "larger rho", "one representation"):
        assert way in str(error.value)


def test_conjugate_gradients_end_in_one_line_that_says_what_to_do(monkeypatch):
    monkeypatch.setattr(iterations, "PRODUCTS", 3)
    monkeypatch.setattr(matrix_free, "STEPS", 1)
    pencil = make_pencil(*pair_of("lowrank+diagonal", 4), rho=0.1, rho_s=10.0)
    with pytest.raises(ValueError, match=r"did not converge in 3 steps: raise the ridges rho and rho_s, or measure"):
        solve(pencil, eigenpairs=0).expand(random_patch(DIM)).at(soft(1.0))


@pytest.mark.parametrize("spread", [0, 6, 12])
def test_a_space_too_small_for_soft_gives_way_to_preconditioned_gradients(monkeypatch, products, spread):
    monkeypatch.setattr(matrix_free, "STEPS", 3)
    pair = pair_of("lowrank+diagonal", spread)
    pencil = make_pencil(*pair, rho=0.1, rho_s=10.0)
    tau = 10.0 * pencil.trace_ratio
    found = solve(pencil, eigenpairs=0).expand(random_patch(DIM)).at(soft(tau)).numpy()
    left, right = dense_pencil(*(side.dense().numpy() for side in pair), rho=0.1, rho_s=10.0)
    expected = np.linalg.solve(left + tau * right, left @ random_patch(DIM).numpy())
    assert np.linalg.norm(found - expected) < 1e-9 * np.linalg.norm(expected)
    assert len(products) < 300


@pytest.mark.parametrize("spread", [0, 12])
def test_a_relearned_step_of_unlike_uneven_matrices_is_the_dense_one(products, spread):
    safety, utility = pair_of("lowrank+diagonal", spread)
    benign, means = diagonal_of(scores(25, 3, spread)), scores(2, 4, spread)
    weights = {"tau": 2.0, "trust": 3.0, "sigma": 10.0 * safety.trace() / DIM}
    found, _ = relearn(RelearnProblem(safety, benign, utility, *means, **weights), random_patch(DIM))
    three = (f.dense().numpy() for f in (safety, benign, utility))
    expected = dense_relearned(*three, *means.numpy(), random_patch(DIM).numpy(), **weights)
    assert np.linalg.norm(found.numpy() - expected) < 1e-9 * np.linalg.norm(expected)
    assert len(products) < 400


def test_a_ridge_that_drowns_in_rounding_is_refused():
    pencil = make_pencil(*pair_of("diagonal+block", 0, (20, 3)), rho=1e-25, rho_s=1.0)
    for eigenpairs in (0, 3):
        with pytest.raises(ValueError, match="not positive definite: raise the ridge rho"):
            solve(pencil, eigenpairs=eigenpairs)


def test_filters_other_than_soft_say_that_no_eigenpairs_were_computed():
    system = solve(make_pencil(*pair_of("lowrank+diagonal", 0), rho=0.1, rho_s=1.0), eigenpairs=0)
    with pytest.raises(ValueError, match="k is 1, and 0 of 320 eigenpairs were computed"):
        topk(system, 1)
    with pytest.raises(ValueError, match="more than the 0 directions that were computed; expected"):
        threshold(system, 5.0)
    assert torch.equal(system.expand(random_patch(DIM)).at(soft(0.0)), random_patch(DIM))


def test_sst_soft_computes_no_eigenpairs_and_says_so_in_its_findings(monkeypatch, tmp_path):
    monkeypatch.setattr(iterations, "eigsh", None)
    safety = random_pairs(make_model(), 2, 2)
    core = core_basis([safety])
    pair = []
    for kind, seed in ((LowRankAccumulator, 1), (BlockAccumulator, 2)):
        draw, accumulator = torch.Generator().manual_seed(seed), kind(core.shapes)
        accumulator.begin(examples(torch.arange(24), [f"{seed}/{i}" for i in range(24)]))
        for name, sides in core.shapes.items():
            accumulator.update(name, *(torch.randn(24, 3, side, generator=draw, dtype=torch.float64) for side in sides))
        pair.append(accumulator.finish())
    fisher = FisherPair(*pair, core)
    dense = solve_dense(make_pencil(*pair, rho=0.1, rho_s=10.0))
    variants = [Sst(t=t) for t in (10.0, 0.5)]
    for method, made in zip(variants, Sst().patches(variants, {}, safety, fisher), strict=True):
        expected = dense.expand(core.coordinates(safety)).at(soft(method.t * dense.pencil.trace_ratio))
        torch.testing.assert_close(core.coordinates(made.pairs), expected, rtol=1e-8, atol=1e-10)
        assert made.findings["unknown"] == core.dim
        assert made.findings["spectrum"] is made.findings["held_out_curve"] is made.findings["effective_rank"] is None
        assert 0 < made.findings["held_out"]["safety_energy_kept"] < 1.5
    plot_pencil(made.findings, tmp_path / "pencil.png")
    assert (tmp_path / "pencil.png").stat().st_size > 1000


RANK = 5
EXACT = {"lowrank": (lowrank_of,) * 2, "block": (block_of,) * 2, "diagonal": (diagonal_of,) * 2, **PAIRS}


def deficient(name, spread):
    """A pencil whose F_s has seen few of the coordinates' directions, and how many; σ = 0."""
    given = scores(RANK, 1, spread)
    if name.startswith(("block", "diagonal")):
        given[:, 16:] = 0
    makes = EXACT[name]
    rank = 16 if makes[0] is diagonal_of else RANK
    return make_pencil(makes[0](given), makes[1](scores(30, 2, spread)), rho=0.1, rho_s=0.0), rank


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("spread", [0, 6])
def test_a_threshold_of_zero_keeps_what_safety_rows_have_seen_and_no_rounding(monkeypatch, name, spread):
    pencil, rank = deficient(name, spread)
    for limit in (40, DIM):
        monkeypatch.setattr("src.gevp.solve.DENSE_LIMIT", limit)
        system = solve(pencil, eigenpairs=20)
        left, right = (
            side.dense().numpy() + ridge * np.eye(DIM)
            for side, ridge in ((pencil.left, 0.0), (pencil.right, pencil.epsilon))
        )
        values, _ = dense_eigh(left, right)
        assert int((values > 1e-12 * values[0]).sum()) == rank
        cut = threshold(system, 0.0)
        assert cut.k == rank
        expected = dense_filtered(left, right, random_patch(DIM).numpy(), lambda _: np.arange(DIM) < rank)
        found = system.expand(random_patch(DIM)).at(cut).numpy()
        assert np.linalg.norm(found - expected) < 1e-6 * np.linalg.norm(expected)


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("spread", [0, 6])
@pytest.mark.parametrize("t", [1e-300, 1e-12, 1e-9, 1e-3])
def test_a_soft_filter_of_any_rate_keeps_no_rounding(name, spread, t):
    pencil, rank = deficient(name, spread)
    left, right = (
        side.dense().numpy() + ridge * np.eye(DIM)
        for side, ridge in ((pencil.left, 0.0), (pencil.right, pencil.epsilon))
    )
    tau = t * pencil.trace_ratio
    expected = dense_filtered(
        left,
        right,
        random_patch(DIM).numpy(),
        lambda values: np.where(np.arange(DIM) < rank, values / (values + tau), 0.0),
    )
    for eigenpairs in (0, 20):
        found = solve(pencil, eigenpairs=eigenpairs).expand(random_patch(DIM)).at(soft(tau)).numpy()
        assert np.linalg.norm(found - expected) < 1e-6 * np.linalg.norm(expected)


def test_a_tiny_rate_and_a_small_one_are_one_formula(monkeypatch):
    pencil = make_pencil(*pair_of("lowrank+diagonal", 0), rho=0.1, rho_s=10.0)
    tau, found = 1e-3 * pencil.trace_ratio, []
    for small in (0.0, 1e9):
        monkeypatch.setattr(krylov, "SMALL", small)
        found.append(solve(pencil, eigenpairs=0).expand(random_patch(DIM)).at(soft(tau)))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)
