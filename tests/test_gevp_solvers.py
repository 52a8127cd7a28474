"""Every solver against scipy's dense generalised eigenproblem, and the edges of its input."""

from functools import partial

import numpy as np
import pytest
import torch

from src.fisher.accumulate import examples
from src.fisher.block import BlockAccumulator
from src.fisher.diagonal import DiagonalAccumulator
from src.fisher.kronecker import KroneckerAccumulator
from src.fisher.lowrank import LowRankFisher
from src.fisher.lowrank_accumulator import LowRankAccumulator
from src.gevp.controls import random_projection
from src.gevp.dense import solve_dense, whitened_eigh
from src.gevp.filters import soft, threshold, topk
from src.gevp.matrix_free import solve_matrix_free
from src.gevp.pencil import make_pencil
from src.gevp.solve import solve
from tests import tiny
from tests.oracles import dense_eigh, dense_filtered, dense_pencil, dense_ridged_kronecker, eigenvectors
from tests.tiny import random_patch

SHAPES = {"a": (2, 3), "b": (1, 4), "c": (3, 3)}
DIM = 19
KINDS = [LowRankAccumulator, BlockAccumulator, KroneckerAccumulator, DiagonalAccumulator]
random_fisher = partial(tiny.random_fisher, shapes=SHAPES)


def sides(safety, utility, *, rho, rho_s):
    """The pencil as dense arrays, by the representation's own ridge rule."""
    if safety.representation == "kronecker":
        sigma, epsilon = rho_s * safety.trace() / DIM, rho * utility.trace() / DIM
        return dense_ridged_kronecker(safety, sigma), dense_ridged_kronecker(utility, epsilon)
    return dense_pencil(safety.dense().numpy(), utility.dense().numpy(), rho=rho, rho_s=rho_s)


CASES = [(9, 9, ()), (1, 9, ()), (9, 1, ()), (1, 1, ()), (40, 30, ()), (9, 9, ("b",)), (30, 9, ("a", "c"))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n_s", "n_u", "zero"), CASES)
@pytest.mark.parametrize("rho_s", [0.0, 0.5, 10.0])
def test_eigenvalues_equal_scipy(kind, n_s, n_u, zero, rho_s):
    safety, utility = random_fisher(kind, n_s, 1), random_fisher(kind, n_u, 2, zero=zero)
    system = solve(make_pencil(safety, utility, rho=0.1, rho_s=rho_s))
    expected, _ = dense_eigh(*sides(safety, utility, rho=0.1, rho_s=rho_s))
    np.testing.assert_allclose(system.ordered().numpy(), expected, rtol=1e-9, atol=1e-10 * expected[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n_s", "n_u", "zero"), CASES)
def test_eigenvectors_solve_the_pencil_and_are_orthonormal_in_its_metric(kind, n_s, n_u, zero):
    safety, utility = random_fisher(kind, n_s, 1, zero=zero), random_fisher(kind, n_u, 2)
    system = solve(make_pencil(safety, utility, rho=0.1, rho_s=1.0))
    left, right = sides(safety, utility, rho=0.1, rho_s=1.0)
    vectors = eigenvectors(system).numpy()
    np.testing.assert_allclose(vectors.T @ right @ vectors, np.eye(len(system.values)), atol=1e-9)
    residual = left @ vectors - right @ vectors * system.values.numpy()
    assert abs(residual).max() < 1e-8 * abs(left @ vectors).max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n_s", "n_u", "zero"), CASES)
def test_the_soft_filter_equals_the_direct_solve(kind, n_s, n_u, zero):
    safety, utility, patch = random_fisher(kind, n_s, 1), random_fisher(kind, n_u, 2, zero=zero), random_patch(DIM)
    system = solve(make_pencil(safety, utility, rho=0.1, rho_s=3.0))
    left, right = sides(safety, utility, rho=0.1, rho_s=3.0)
    tau = 4.0 * system.pencil.trace_ratio
    direct = np.linalg.solve(left + tau * right, left @ patch.numpy())
    np.testing.assert_allclose(system.expand(patch).at(soft(tau)).numpy(), direct, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("control", ["safety_only", "utility_only", "swapped"])
def test_controls_put_a_multiple_of_the_identity_in_one_place_or_swap(kind, control):
    safety, utility, patch = random_fisher(kind, 9, 1), random_fisher(kind, 8, 2), random_patch(DIM)
    system = solve(make_pencil(safety, utility, rho=0.1, rho_s=3.0, control=control))
    sigma, epsilon = 3.0 * safety.trace() / DIM, 0.1 * utility.trace() / DIM
    left, right = sides(safety, utility, rho=0.1, rho_s=3.0)
    if control == "safety_only":
        right = (utility.trace() / DIM + epsilon) * np.eye(DIM)
    elif control == "utility_only":
        left = (safety.trace() / DIM + sigma) * np.eye(DIM)
    else:
        left, right = sides(utility, safety, rho=0.1, rho_s=3.0)
    of_left, of_right = (utility, safety) if control == "swapped" else (safety, utility)
    assert abs(safety.trace() / utility.trace() - 1) > 1e-3
    assert system.pencil.trace_ratio == pytest.approx(of_left.trace() / of_right.trace(), rel=1e-12)
    tau = 2.0 * system.pencil.trace_ratio
    direct = np.linalg.solve(left + tau * right, left @ patch.numpy())
    np.testing.assert_allclose(system.expand(patch).at(soft(tau)).numpy(), direct, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 3, DIM])
def test_topk_and_threshold_equal_the_dense_projection(kind, k):
    safety, utility, patch = random_fisher(kind, 30, 1), random_fisher(kind, 25, 2), random_patch(DIM)
    system = solve(make_pencil(safety, utility, rho=0.1, rho_s=0.5))
    expected = dense_filtered(
        *sides(safety, utility, rho=0.1, rho_s=0.5), patch.numpy(), lambda _: (np.arange(DIM) < k).astype(float)
    )
    np.testing.assert_allclose(system.expand(patch).at(topk(system, k)).numpy(), expected, rtol=1e-8, atol=1e-9)
    ordered = system.ordered()
    tau = ((ordered[k - 1] + ordered[k]) / 2).item() if k < DIM else 0.0
    cut = threshold(system, tau)
    assert cut.k == k
    torch.testing.assert_close(system.expand(patch).at(cut), system.expand(patch).at(topk(system, k)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_path_of_filters_equals_each_filter(kind):
    safety, utility, patch = random_fisher(kind, 6, 1), random_fisher(kind, 5, 2), random_patch(DIM)
    system = solve(make_pencil(safety, utility, rho=0.1, rho_s=1.0))
    expansion = system.expand(patch)
    filters = [soft(0.0), soft(0.3), soft(5.0), threshold(system, 1.0)]
    path = expansion.along(filters)
    for row, phi in zip(path, filters, strict=True):
        torch.testing.assert_close(row, system.expand(patch).at(phi))
    torch.testing.assert_close(path[0], patch)


@pytest.mark.parametrize("kind", KINDS)
def test_condition_numbers_equal_numpy(kind):
    safety, utility = random_fisher(kind, 9, 1), random_fisher(kind, 3, 2, zero=("b",))
    left, right = sides(safety, utility, rho=0.1, rho_s=2.0)
    found = solve(make_pencil(safety, utility, rho=0.1, rho_s=2.0)).conditions()
    np.testing.assert_allclose(found["left"], np.linalg.cond(left), rtol=1e-6)
    np.testing.assert_allclose(found["right"], np.linalg.cond(right), rtol=1e-6)
    one = random_fisher(kind, 1, 1, tokens=1)
    if kind is not DiagonalAccumulator:
        assert solve(make_pencil(one, utility, rho=0.1, rho_s=0.0)).conditions()["left"] is None


@pytest.mark.parametrize("kind", KINDS)
def test_the_dense_solver_takes_any_representation(kind):
    safety, utility, patch = random_fisher(kind, 9, 1), random_fisher(BlockAccumulator, 8, 2), random_patch(DIM)
    system = solve(make_pencil(safety, utility, rho=0.1, rho_s=1.0))
    left, right = dense_pencil(safety.dense().numpy(), utility.dense().numpy(), rho=0.1, rho_s=1.0)
    np.testing.assert_allclose(system.values.numpy(), dense_eigh(left, right)[0], rtol=1e-10)
    direct = np.linalg.solve(left + 2.0 * right, left @ patch.numpy())
    np.testing.assert_allclose(system.expand(patch).at(soft(2.0)).numpy(), direct, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("kinds", [(LowRankAccumulator, KroneckerAccumulator), (BlockAccumulator, DiagonalAccumulator)])
@pytest.mark.parametrize("k", [1, 4, DIM - 1])
def test_the_matrix_free_solver_equals_the_dense_one(kinds, k):
    pencil = make_pencil(random_fisher(kinds[0], 30, 1), random_fisher(kinds[1], 20, 2), rho=0.1, rho_s=0.5)
    dense, free, patch = solve_dense(pencil), solve_matrix_free(pencil, k=k), random_patch(DIM)
    torch.testing.assert_close(free.values, dense.values[:k], rtol=1e-9, atol=1e-12)
    cut = topk(dense, k)
    torch.testing.assert_close(free.expand(patch).at(topk(free, k)), dense.expand(patch).at(cut), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(
        free.expand(patch).at(soft(0.7)), dense.expand(patch).at(soft(0.7)), rtol=1e-8, atol=1e-10
    )
    assert torch.equal(free.expand(patch).at(soft(0.0)), patch)
    assert torch.equal(free.values, solve_matrix_free(pencil, k=k).values)


def test_the_matrix_free_solver_never_guesses_past_its_eigenpairs():
    pencil = make_pencil(random_fisher(BlockAccumulator, 9, 1), random_fisher(BlockAccumulator, 9, 2), rho=1, rho_s=1)
    free = solve_matrix_free(pencil, k=3)
    with pytest.raises(ValueError, match="more than the 3 directions"):
        free.expand(random_patch(DIM)).at(threshold(free, 0.0))
    for k in (0, DIM):
        with pytest.raises(ValueError, match=f"k is {k}"):
            solve_matrix_free(pencil, k=k)


@pytest.mark.parametrize("k", [1, 5, 18, 19])
def test_the_random_subspace_is_a_projection_in_the_metric(k):
    utility, patch = random_fisher(BlockAccumulator), random_patch(DIM)
    once = random_projection(patch, utility, 0.5, k=k, seed=3)
    torch.testing.assert_close(random_projection(once, utility, 0.5, k=k, seed=3), once)
    metric = utility.dense() + 0.5 * torch.eye(DIM, dtype=torch.float64)
    assert abs((patch - once) @ metric @ once) < 1e-8 * (patch @ metric @ patch)
    rows = torch.eye(DIM, dtype=torch.float64)
    whole = torch.stack([random_projection(row, utility, 0.5, k=k, seed=3) for row in rows])
    assert torch.linalg.matrix_rank(whole, rtol=1e-8) == min(k, DIM)
    assert whole.trace().item() == pytest.approx(min(k, DIM))
    if k < DIM:
        other = random_projection(patch, utility, 0.5, k=k, seed=4)
        assert (other - once).norm() > 1e-3 * patch.norm()
    else:
        assert torch.equal(once, patch)


@pytest.mark.parametrize("kind", KINDS)
def test_condition_1e12_between_modules(kind):
    scales = {"a": 1e3, "b": 1.0, "c": 1e-3}
    safety = random_fisher(kind, 40, 1, scales={"a": 1e-3, "b": 1.0, "c": 1e3})
    utility, patch = random_fisher(kind, 40, 2, scales=scales), random_patch(DIM)
    system = solve(make_pencil(safety, utility, rho=1e-10, rho_s=1e-10))
    left, right = sides(safety, utility, rho=1e-10, rho_s=1e-10)
    expected, _ = dense_eigh(left, right)
    assert np.linalg.cond(right) > 1e9
    np.testing.assert_allclose(system.ordered()[:9].numpy(), expected[:9], rtol=1e-4)
    tau = float(expected[9])
    direct = np.linalg.solve(left + tau * right, left @ patch.numpy())
    # A Gram matrix squares the scores: 1e-16/s² where they are s = 1e-6 of the largest (see its module's docstring).
    bound = 1e-3 if kind is LowRankAccumulator else 1e-5
    assert np.linalg.norm(system.expand(patch).at(soft(tau)).numpy() - direct) < bound * np.linalg.norm(direct)


def test_a_dense_pencil_of_condition_1e12_equals_scipy():
    draw = np.random.default_rng(0)
    turn = np.linalg.qr(draw.standard_normal((12, 12)))[0]
    right = turn * np.logspace(-12, 0, 12) @ turn.T
    half = draw.standard_normal((12, 5))
    left = half @ half.T
    values, vectors = whitened_eigh(torch.from_numpy(left), torch.from_numpy(right))
    expected, _ = dense_eigh(left, (right + right.T) / 2)
    # Both carry an error of condition × 1e-16 relative to the largest eigenvalue.
    np.testing.assert_allclose(values.numpy(), expected, rtol=1e-3, atol=1e-4 * expected[0])
    found = vectors.numpy()
    np.testing.assert_allclose(found.T @ right @ found, np.eye(12), atol=1e-3)


def test_a_planted_spectrum_is_found_at_condition_1e12():
    """No other solver to compare with: left = L W Λ Wᵀ Lᵀ and right = L Lᵀ have the eigenvalues Λ."""
    draw = np.random.default_rng(0)
    turn, w = (np.linalg.qr(draw.standard_normal((12, 12)))[0] for _ in range(2))
    lower = turn * np.logspace(-6, 0, 12)
    planted = np.array([5.0, 4.0, 3.0, 2.0, 1.0] + [0.0] * 7)
    left, right = lower @ (w * planted) @ w.T @ lower.T, lower @ lower.T
    assert 1e11 < np.linalg.cond(right) < 1e13
    values, vectors = whitened_eigh(torch.from_numpy(left), torch.from_numpy(right))
    # Condition × 1e-16 relative to the largest eigenvalue, as src.gevp.dense says.
    np.testing.assert_allclose(values.numpy(), planted, atol=1e-4 * planted[0])
    # Vᵀ right V = I by the factor that made it: (LᵀV)ᵀ (LᵀV).
    half = lower.T @ vectors.numpy()
    np.testing.assert_allclose(half.T @ half, np.eye(12), atol=1e-4)


def test_a_side_that_rounding_made_indefinite_is_no_trouble():
    safety, utility = random_fisher(BlockAccumulator, 1, 1, tokens=1), random_fisher(BlockAccumulator, 9, 2)
    for total in safety.sums.values():
        total[:] = total - 1e-14 * torch.eye(total.shape[-1], dtype=torch.float64)
    system = solve(make_pencil(safety, utility, rho=0.1, rho_s=0.0))
    assert torch.linalg.eigvalsh(safety.dense())[0] < 0
    assert (system.values >= 0).all()
    assert (system.values > 1e-9 * system.values[0]).sum() == 3


# The diagonal depends on the basis that it is taken in: rotations change it.
@pytest.mark.parametrize("kind", KINDS[:3])
def test_rotating_a_modules_coordinates_rotates_the_filtered_patch(kind):
    draw = torch.Generator().manual_seed(0)
    turns = {
        n: [torch.linalg.qr(torch.randn(s, s, generator=draw).double()).Q for s in shape] for n, shape in SHAPES.items()
    }
    filtered = []
    for turned in (False, True):
        pair = []
        for seed in (1, 2):
            draw, accumulator = torch.Generator().manual_seed(seed), kind(SHAPES)
            accumulator.begin(examples(torch.arange(8), [str(i) for i in range(8)]))
            for name, (p, q) in SHAPES.items():
                delta, x = (torch.randn(8, 3, side, generator=draw, dtype=torch.float64) for side in (p, q))
                left, right = turns[name] if turned else (torch.eye(p).double(), torch.eye(q).double())
                accumulator.update(name, delta @ left, x @ right)
            pair.append(accumulator.finish())
        cores = dict(zip(SHAPES, random_patch(DIM).split([p * q for p, q in SHAPES.values()]), strict=True))
        if turned:
            cores = {n: (turns[n][0].T @ c.view(SHAPES[n]) @ turns[n][1]).flatten() for n, c in cores.items()}
        system = solve(make_pencil(*pair, rho=0.1, rho_s=1.0))
        made = system.expand(torch.cat(list(cores.values()))).at(soft(system.pencil.trace_ratio))
        parts = dict(zip(SHAPES, made.split([p * q for p, q in SHAPES.values()]), strict=True))
        if turned:
            parts = {n: (turns[n][0] @ c.view(SHAPES[n]) @ turns[n][1].T).flatten() for n, c in parts.items()}
        filtered.append(torch.cat(list(parts.values())))
    torch.testing.assert_close(filtered[0], filtered[1], rtol=1e-8, atol=1e-10)


def test_cuts_through_equal_eigenvalues_are_refused_in_every_representation():
    safety, utility = random_fisher(DiagonalAccumulator), random_fisher(DiagonalAccumulator, seed=2)
    safety.sums["b"].zero_()
    system = solve(make_pencil(safety, utility, rho=0.1, rho_s=0.0))
    with pytest.raises(ValueError, match=r"cuts through 4 directions .*expected at most 15 or at least 19"):
        topk(system, 17)
    assert topk(system, 15).k == 15


def test_memory_mapped_scores_are_read_block_by_block(tmp_path, monkeypatch):
    monkeypatch.setattr("src.fisher.score_tables.WIDE_ENTRIES", 64 * 11)
    monkeypatch.setattr("src.gevp.stack.ROWS", 4)
    dim, draw = 200, torch.Generator().manual_seed(0)
    patch = torch.randn(dim, generator=draw, dtype=torch.float64)
    mapped, held = [], []
    for name, rows in (("s", 6), ("u", 5)):
        scores = torch.from_file(str(tmp_path / name), shared=True, size=rows * dim, dtype=torch.float32)
        scores.copy_(torch.randn(rows * dim, generator=draw))
        mapped.append(LowRankFisher(scores.view(rows, dim), rows))
        held.append(LowRankFisher(scores.view(rows, dim).clone().double(), rows))
    widest = []
    real = torch.Tensor.double
    monkeypatch.setattr(torch.Tensor, "double", lambda t: (widest.append(t.numel()), real(t))[1])
    pencil = make_pencil(*mapped, rho=0.1, rho_s=1.0)
    found = solve(pencil).expand(patch).at(soft(pencil.trace_ratio))
    monkeypatch.undo()
    assert max(widest) <= 64 * 11
    left, right = dense_pencil(*(f.dense().numpy() for f in held), rho=0.1, rho_s=1.0)
    direct = np.linalg.solve(left + pencil.trace_ratio * right, left @ patch.numpy())
    np.testing.assert_allclose(found.numpy(), direct, rtol=1e-7, atol=1e-10)


def test_random_directions_without_a_projection():
    utility, patch = random_fisher(LowRankAccumulator, rows=3), random_patch(DIM)
    assert not random_projection(patch, utility, 0.5, k=0, seed=3).any()
    with pytest.raises(ValueError, match="raise the ridge rho"):
        random_projection(patch, utility, 1e-25, k=DIM - 1, seed=3)
