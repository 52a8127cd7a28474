import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from src.fisher.base import weighted_mean
from src.fisher.lowrank import LowRankFisher
from src.gevp.dense import whitened_eigh
from src.gevp.filters import soft, topk
from src.gevp.lowrank import lowrank_system
from src.gevp.pencil import make_pencil
from tests.oracles import dense_eigh, dense_filtered, dense_pencil, eigenvectors


def fishers(n_s, n_u, dim, seed=0, scale_u=1.0):
    draw = torch.Generator().manual_seed(seed)
    g_s = torch.randn(n_s, dim, generator=draw, dtype=torch.float64)
    g_u = scale_u * torch.randn(n_u, dim, generator=draw, dtype=torch.float64)
    patch = torch.randn(dim, generator=draw, dtype=torch.float64)
    return LowRankFisher(g_s, n_s), LowRankFisher(g_u, n_u), patch


CASES = [(5, 7, 20), (1, 1, 6), (30, 4, 12), (4, 30, 12), (12, 12, 12), (1, 9, 3)]


@pytest.mark.parametrize(("n_s", "n_u", "dim"), CASES)
@pytest.mark.parametrize("rho_s", [0.0, 0.5, 10.0])
def test_eigenvalues_equal_scipy(n_s, n_u, dim, rho_s):
    safety, utility, _ = fishers(n_s, n_u, dim)
    system = lowrank_system(make_pencil(safety, utility, rho=0.1, rho_s=rho_s))
    left, right = dense_pencil(safety.dense().numpy(), utility.dense().numpy(), rho=0.1, rho_s=rho_s)
    expected, _ = dense_eigh(left, right)
    found = np.sort(np.append(system.values.numpy(), np.full(system.complement_dim, system.complement_value)))[::-1]
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10 * expected[0])


@pytest.mark.parametrize(("n_s", "n_u", "dim"), CASES)
def test_eigenvectors_are_orthonormal_in_the_metric(n_s, n_u, dim):
    safety, utility, _ = fishers(n_s, n_u, dim)
    system = lowrank_system(make_pencil(safety, utility, rho=0.1, rho_s=1.0))
    metric = utility.dense() + system.pencil.epsilon * torch.eye(dim, dtype=torch.float64)
    vectors = eigenvectors(system)
    torch.testing.assert_close(vectors.T @ metric @ vectors, torch.eye(len(system.values)).double())


@pytest.mark.parametrize(("n_s", "n_u", "dim"), CASES)
@pytest.mark.parametrize("rho_s", [0.0, 10.0])
def test_soft_filter_equals_the_direct_solve(n_s, n_u, dim, rho_s):
    safety, utility, patch = fishers(n_s, n_u, dim)
    system = lowrank_system(make_pencil(safety, utility, rho=0.1, rho_s=rho_s))
    tau = 3.0 * system.pencil.trace_ratio
    left, right = dense_pencil(safety.dense().numpy(), utility.dense().numpy(), rho=0.1, rho_s=rho_s)
    direct = np.linalg.solve(left + tau * right, left @ patch.numpy())
    np.testing.assert_allclose(system.expand(patch).at(soft(tau)).numpy(), direct, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("rho_s", [0.0, 1.0])
def test_topk_equals_the_dense_projection(k, rho_s):
    safety, utility, patch = fishers(6, 7, 20)
    system = lowrank_system(make_pencil(safety, utility, rho=0.1, rho_s=rho_s))
    left, right = dense_pencil(safety.dense().numpy(), utility.dense().numpy(), rho=0.1, rho_s=rho_s)
    expected = dense_filtered(left, right, patch.numpy(), lambda _: (np.arange(20) < k).astype(float))
    np.testing.assert_allclose(system.expand(patch).at(topk(system, k)).numpy(), expected, rtol=1e-8, atol=1e-9)


def test_topk_with_all_directions_is_the_identity():
    safety, utility, patch = fishers(3, 4, 11)
    system = lowrank_system(make_pencil(safety, utility, rho=0.1, rho_s=0.0))
    torch.testing.assert_close(system.expand(patch).at(topk(system, 11)), patch)


def test_topk_past_the_complement_equals_the_dense_projection():
    safety, utility, patch = fishers(3, 4, 20)
    system = lowrank_system(make_pencil(safety, utility, rho=0.1, rho_s=10.0))
    above = int((system.values > system.complement_value).sum())
    k = above + system.complement_dim + 1
    left, right = dense_pencil(safety.dense().numpy(), utility.dense().numpy(), rho=0.1, rho_s=10.0)
    expected = dense_filtered(left, right, patch.numpy(), lambda _: (np.arange(20) < k).astype(float))
    np.testing.assert_allclose(system.expand(patch).at(topk(system, k)).numpy(), expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("k", [0, 21, 10])
def test_topk_out_of_range_or_inside_the_complement_is_refused(k):
    safety, utility, _ = fishers(3, 4, 20)
    system = lowrank_system(make_pencil(safety, utility, rho=0.1, rho_s=1.0))
    with pytest.raises(ValueError, match=f"k is {k}"):
        topk(system, k)


def test_one_sided_pencil_drops_what_no_row_has_seen():
    safety, utility, _ = fishers(3, 4, 20)
    system = lowrank_system(make_pencil(safety, utility, rho=0.1, rho_s=0.0))
    span = torch.cat([safety.scores, utility.scores])
    unseen = torch.linalg.svd(span).Vh[-1]
    assert system.expand(unseen).at(soft(1.0)).norm() < 1e-10


def test_rank_deficient_and_badly_scaled_inputs():
    draw = torch.Generator().manual_seed(1)
    thin = torch.randn(2, 15, generator=draw, dtype=torch.float64)
    safety = LowRankFisher(torch.randn(8, 2, generator=draw, dtype=torch.float64) @ thin * 1e6, 8)
    utility = LowRankFisher(torch.randn(9, 2, generator=draw, dtype=torch.float64) @ thin * 1e-6, 9)
    patch = torch.randn(15, generator=draw, dtype=torch.float64)
    system = lowrank_system(make_pencil(safety, utility, rho=0.1, rho_s=1.0))
    tau = system.pencil.trace_ratio
    left, right = dense_pencil(safety.dense().numpy(), utility.dense().numpy(), rho=0.1, rho_s=1.0)
    direct = np.linalg.solve(left + tau * right, left @ patch.numpy())
    np.testing.assert_allclose(system.expand(patch).at(soft(tau)).numpy(), direct, rtol=1e-7)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 12), st.integers(0, 10**6), st.floats(1e-3, 1e3))
def test_soft_filter_equals_the_direct_solve_on_random_shapes(n_s, n_u, dim, seed, scale):
    safety, utility, patch = fishers(n_s, n_u, dim, seed, scale)
    system = lowrank_system(make_pencil(safety, utility, rho=0.1, rho_s=2.0))
    left, right = dense_pencil(safety.dense().numpy(), utility.dense().numpy(), rho=0.1, rho_s=2.0)
    tau = 10 * system.pencil.trace_ratio
    direct = np.linalg.solve(left + tau * right, left @ patch.numpy())
    np.testing.assert_allclose(system.expand(patch).at(soft(tau)).numpy(), direct, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("rho", "rho_s"), [(0.0, 1.0), (-1.0, 1.0), (float("nan"), 1.0), (0.1, -1.0)])
def test_ridges_out_of_range_are_refused(rho, rho_s):
    safety, utility, _ = fishers(3, 4, 5)
    with pytest.raises(ValueError, match="rho"):
        lowrank_system(make_pencil(safety, utility, rho=rho, rho_s=rho_s))


def test_a_zero_fisher_is_refused():
    safety, _, _ = fishers(3, 4, 5)
    with pytest.raises(ValueError, match="utility Fisher matrix is zero"):
        lowrank_system(make_pencil(safety, LowRankFisher(torch.zeros(4, 5), 4), rho=0.1, rho_s=1.0))


def test_an_indefinite_right_side_is_refused():
    with pytest.raises(ValueError, match="positive definite"):
        whitened_eigh(torch.eye(2).double(), torch.diag(torch.tensor([1.0, -1.0])).double())


def test_fisher_algebra_equals_dense():
    safety, _, patch = fishers(5, 3, 9000, seed=2)
    small, _, vector = fishers(5, 3, 9)
    torch.testing.assert_close(small.matvec(vector), small.dense() @ vector)
    torch.testing.assert_close(small.energy(vector), (vector @ small.dense() @ vector).item())
    torch.testing.assert_close(small.trace(), small.dense().trace().item())
    torch.testing.assert_close(safety.energy(patch), (safety.factor() @ patch).square().sum().item())


def test_concatenation_is_the_weighted_mean():
    one, two, _ = fishers(3, 5, 6)
    mean = weighted_mean([one, two], [1.0, 3.0])
    torch.testing.assert_close(mean.dense(), (one.dense() + 3 * two.dense()) / 4)
