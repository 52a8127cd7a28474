"""Subspace combinations and data-aware averages against dense twins."""

import pytest
import torch

from src.adapters.deltas import DenseDelta
from src.adapters.pairs import LowRankPair
from src.errors import InputError
from src.merge.combination import Expert
from src.merge.combinations.compress_then_merge import CompressThenMerge
from src.merge.combinations.core_space import CoreSpace
from src.merge.combinations.dare import Dare
from src.merge.combinations.della import Della
from src.merge.combinations.fisher_average import FisherAverage, diagonal_average, kronecker_average
from src.merge.combinations.iso_c import IsoC
from src.merge.combinations.knots import Knots
from src.merge.combinations.linear import Linear
from src.merge.combinations.magnitude_prune import MagnitudePrune
from src.merge.combinations.regmean import RegMean, regmean, smallest_eigenvalue
from src.merge.combinations.task_arithmetic import TaskArithmetic
from src.merge.combinations.ties import Ties
from src.merge.combinations.tsv_m import TsvM, polar
from src.merge.led import cut, disjoint, important, led
from tests.merging import weight_fisher


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def experts(count=3, rank=2, shape=(9, 7), weights=(1.0, 0.5, 2.0)):
    return [
        Expert(
            f"e{i}", weights[i], {"m": LowRankPair(drawn(rank, shape[1], seed=i), drawn(shape[0], rank, seed=9 + i))}
        )
        for i in range(count)
    ]


def result(combination, given):
    return combination.combine(given).deltas["m"].dense()


def elementwise(combination, tensors, given):
    from src.adapters.deltas import DenseDelta, matrix

    merged = combination.combine(
        [Expert(e.key, e.weight, {"m": DenseDelta(t)}) for e, t in zip(given, tensors, strict=True)]
    )
    return matrix(merged.deltas["m"])


@pytest.mark.parametrize("inner", [Ties(0.4), Dare(0.5)])
def test_knots_is_the_full_svd_of_updates_side_by_side(inner):
    given = experts()
    dense = [e.deltas["m"].dense() for e in given]
    u, sigma, v = torch.linalg.svd(torch.cat(dense, dim=1), full_matrices=False)
    kept = int((sigma > 1e-5).sum())
    parts = (sigma[:kept, None] * v[:kept]).split(7, dim=1)
    torch.testing.assert_close(result(Knots(inner), given), u[:, :kept] @ elementwise(inner, parts, given))


def balanced(updates, rank=2):
    """Factors of each update with the same singular values on both sides."""
    triplets = (torch.linalg.svd(update, full_matrices=False) for update in updates)
    return [(u[:, :rank] * s[:rank].sqrt(), v[:rank].T * s[:rank].sqrt()) for u, s, v in triplets]


def test_core_space_merges_in_the_bases_of_the_stacked_factors():
    given = experts()
    dense = [e.deltas["m"].dense() for e in given]
    lefts, rights = zip(*balanced(dense), strict=True)
    u = torch.linalg.svd(torch.cat(lefts, dim=1), full_matrices=False).U
    v = torch.linalg.svd(torch.cat(rights, dim=1), full_matrices=False).U
    cores = [u.T @ delta @ v for delta in dense]
    expected = u @ elementwise(Ties(0.4), cores, given) @ v.T
    torch.testing.assert_close(result(CoreSpace(Ties(0.4)), given), expected)


@pytest.mark.parametrize("method", [CoreSpace(), CompressThenMerge(rank=1), CoreSpace(inner=MagnitudePrune())])
def test_small_cores_are_not_trimmed_to_nothing(method):
    assert result(method, experts(count=2, rank=1)).norm() > 0


def test_compression_reports_the_energy_that_it_keeps():
    combined = CompressThenMerge(rank=2, inner=TaskArithmetic()).combine(experts())
    kept = combined.findings["modules"]["m"]["kept_energy"]
    assert combined.deltas["m"].rank == 2
    assert all(0 < share < 1 for share in kept)


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("inner", [Ties(0.4), TaskArithmetic()])
def test_compression_merges_in_the_leading_directions_of_the_stacked_factors(rank, inner):
    given = experts()
    dense = [e.deltas["m"].dense() for e in given]
    u, v = (torch.linalg.svd(torch.cat(s, dim=1)).U[:, :rank] for s in zip(*balanced(dense), strict=True))
    cores = [u.T @ delta @ v for delta in dense]
    combined = CompressThenMerge(rank, inner).combine(given)
    torch.testing.assert_close(combined.deltas["m"].dense(), u @ elementwise(inner, cores, given) @ v.T)
    kept = [(core.norm() / delta.norm()).item() ** 2 for core, delta in zip(cores, dense, strict=True)]
    assert combined.findings["modules"]["m"]["kept_energy"] == pytest.approx(kept)


# Three experts of rank 3 have 9 triplets where 7 are orthonormal at most: 7 // 3 of each are kept.
@pytest.mark.parametrize(("rank", "keep", "each"), [(2, None, 2), (2, 1, 1), (3, None, 2), (3, 1, 1), (2, 2, 2)])
def test_tsv_merge_uses_the_nearest_orthonormal_bases(rank, keep, each):
    given = experts(rank=rank)
    triplets = [torch.linalg.svd(e.deltas["m"].dense(), full_matrices=False) for e in given]
    stacked_u = torch.cat([t.U[:, :each] for t in triplets], dim=1)
    stacked_v = torch.cat([t.Vh[:each].T for t in triplets], dim=1)
    sigma = torch.cat([e.weight * t.S[:each] for e, t in zip(given, triplets, strict=True)])

    def nearest(m):
        p, _, q = torch.linalg.svd(m, full_matrices=False)
        return p @ q

    expected = nearest(stacked_u) @ torch.diag(sigma) @ nearest(stacked_v).T
    torch.testing.assert_close(result(TsvM(keep), given), expected)


def test_the_polar_factor_of_dependent_columns_is_a_partial_isometry():
    columns = torch.cat([drawn(6, 2)] * 2, dim=1)
    found = polar(columns)
    values = torch.linalg.svdvals(found)
    torch.testing.assert_close(values, torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64))


def test_iso_c_has_a_flat_spectrum_of_the_same_mean_in_the_same_bases():
    given = experts()
    total = sum(e.weight * e.deltas["m"].dense() for e in given)
    u, sigma, v = torch.linalg.svd(total)
    expected = sigma[:6].mean() * u[:, :6] @ v[:6]
    torch.testing.assert_close(result(IsoC(), given), expected)
    torch.testing.assert_close(result(IsoC(scale=1.7), given), 1.7 * expected)


def test_regmean_solves_its_least_squares_problem():
    inputs = [drawn(20, 5, seed=i) for i in range(2)]
    updates = [drawn(4, 5, seed=5 + i) for i in range(2)]
    found = regmean(updates, [x.T @ x for x in inputs], off_diagonal=1.0)
    stacked = torch.cat(inputs)
    targets = torch.cat([x @ d.T for x, d in zip(inputs, updates, strict=True)])
    torch.testing.assert_close(found, torch.linalg.lstsq(stacked, targets).solution.T)
    torch.testing.assert_close(regmean(updates[:1], [inputs[0].T @ inputs[0]]), updates[0])


def dense_regmean(updates, grams, weights, off_diagonal):
    """The definition: ΔWᵀ = (Σ w_i G_i)⁻¹ Σ w_i G_i ΔW_iᵀ, off-diagonal elements of G_i scaled."""
    scale = torch.full_like(grams[0], off_diagonal).fill_diagonal_(1.0)
    scaled = [w * gram * scale for w, gram in zip(weights, grams, strict=True)]
    return torch.linalg.solve(sum(scaled), sum(g @ d.T for g, d in zip(scaled, updates, strict=True))).T


@pytest.mark.parametrize("off_diagonal", [0.9, 0.4, 0.0])
def test_regmean_scales_what_is_off_the_diagonal_and_weighs_experts(off_diagonal):
    given = experts()
    shapes = {"m": (9, 7)}
    held = [Expert(e.key, e.weight, e.deltas, weight_fisher(shapes, "kronecker", i)) for i, e in enumerate(given)]
    updates, weights = [e.deltas["m"].dense() for e in held], [e.weight for e in held]
    grams = [e.fisher.factors("m")[1] for e in held]
    expected = dense_regmean(updates, grams, weights, off_diagonal)
    torch.testing.assert_close(regmean(updates, grams, weights, off_diagonal=off_diagonal), expected)
    torch.testing.assert_close(result(RegMean(off_diagonal), held), expected)
    full = [Expert(e.key, e.weight, {"m": DenseDelta(u)}, e.fisher) for e, u in zip(held, updates, strict=True)]
    torch.testing.assert_close(result(RegMean(off_diagonal), full), expected)
    if off_diagonal == 0.9:
        torch.testing.assert_close(result(RegMean(), held), expected)
    # The basis of the core space, up to signs, which change nothing: singular vectors of the stacked right sides.
    v = torch.linalg.svd(torch.cat([side for _, side in balanced(updates)], dim=1), full_matrices=False).U
    inside = dense_regmean([u @ v for u in updates], [v.T @ gram @ v for gram in grams], weights, off_diagonal)
    torch.testing.assert_close(result(RegMean(off_diagonal, space="core"), held), inside @ v.T)


def test_regmean_in_the_core_space_is_regmean_where_inputs_lie_in_it():
    basis = torch.linalg.qr(drawn(8, 3)).Q
    inputs = [drawn(30, 3, seed=i) @ basis.T for i in range(2)]
    updates = [drawn(4, 3, seed=5 + i) for i in range(2)]
    small = regmean(updates, [basis.T @ x.T @ x @ basis for x in inputs], off_diagonal=1.0)
    stacked = torch.cat(inputs)
    targets = torch.cat([x @ (d @ basis.T).T for x, d in zip(inputs, updates, strict=True)])
    torch.testing.assert_close(stacked @ (small @ basis.T).T, stacked @ torch.linalg.pinv(stacked) @ targets)


def test_a_singular_gram_matrix_is_refused():
    one = torch.ones(2, 5, dtype=torch.float64)
    with pytest.raises(ValueError, match="singular"):
        regmean([drawn(4, 5)], [one.T @ one], off_diagonal=1.0)


def test_a_gram_matrix_that_rounding_alone_makes_regular_is_refused():
    """Fewer tokens than inputs, multiplied in float32 as in a pass: the rest is noise, and its inverse anything."""
    updates = [drawn(4, 64, seed=i) for i in range(2)]
    passed = 0
    for seed in range(8):
        tokens = drawn(63, 64, seed=10 + seed).float()
        gram = sum((part.T @ part).double() for part in tokens.split(16))
        passed += not torch.linalg.cholesky_ex(gram)[1]
        with pytest.raises(ValueError, match="singular"):
            regmean(updates, [gram, gram], off_diagonal=1.0)
        found = regmean(updates, [gram, gram])
        assert found.norm() < 2 * max(update.norm() for update in updates)
    assert passed  # where it would have been inverted


def of_inputs(x):
    """What a Fisher file of a layer of 4 outputs says of these inputs (T, 6)."""
    found = weight_fisher({"m": (4, 6)}, "kronecker", 0)
    found.right["m"], found.tokens["m"] = (x.T @ x)[None], torch.tensor([float(len(x))]).double()
    return found


def test_the_smallest_eigenvalue_is_that_of_the_dense_matrix():
    root = drawn(20, seed=1).abs() + 0.1
    x = drawn(30, 20)
    gram = root[:, None] * (x.T @ x) * root
    scale = gram.diagonal().sqrt()
    expected = torch.linalg.eigvalsh(gram / scale / scale[:, None])[0].item()
    found = smallest_eigenvalue(torch.linalg.cholesky(gram), gram.diagonal(), steps=100)
    assert found == pytest.approx(expected, rel=1e-6)
    assert smallest_eigenvalue(torch.linalg.cholesky(gram), gram.diagonal()) >= found * (1 - 1e-12)


@pytest.mark.parametrize("space", ["weight", "core"])
def test_updates_of_inputs_that_were_zero_for_all_are_averaged(space):
    weights, tokens = [1.0, 3.0], [drawn(30, 6, seed=i) for i in range(2)]
    for x in tokens:
        x[:, 2] = 0.0
    tokens[0][:, 4] = 0.0  # what one alone has not seen is not averaged
    updates = [drawn(4, 6, seed=5 + i) for i in range(2)]
    held = [
        Expert(str(i), w, {"m": LowRankPair(u.clone(), torch.eye(4, dtype=torch.float64))}, of_inputs(x))
        for i, (w, u, x) in enumerate(zip(weights, updates, tokens, strict=True))
    ]
    found = result(RegMean(space=space), held)
    grams = [x.T @ x / len(x) for x in tokens]
    if space == "weight":
        alive = [0, 1, 3, 4, 5]
        rest = dense_regmean([u[:, alive] for u in updates], [g[alive][:, alive] for g in grams], weights, 0.9)
        torch.testing.assert_close(found[:, alive], rest)
        torch.testing.assert_close(found[:, 2], (updates[0][:, 2] + 3 * updates[1][:, 2]) / 4)
    assert found.isfinite().all()
    nothing = [Expert(e.key, e.weight, e.deltas, of_inputs(torch.zeros(5, 6, dtype=torch.float64))) for e in held]
    torch.testing.assert_close(result(RegMean(space=space), nothing), (updates[0] + 3 * updates[1]) / 4)


def test_an_expert_of_weight_0_adds_nothing_to_tsv_merge():
    one, other = experts(2)
    alone = result(TsvM(), [one])
    both = result(TsvM(), [one, Expert(other.key, 0.0, other.deltas)])
    torch.testing.assert_close(both, alone)
    none = TsvM().combine([Expert(one.key, 0.0, one.deltas)]).deltas
    assert not result(TsvM(), [Expert(one.key, 0.0, one.deltas)]).any()
    # PEFT reads no module of rank 0.
    assert [pair.rank for pair in none.values()] == [1] * len(none)


def test_fisher_averages_agree_where_factors_are_diagonal():
    updates = [drawn(4, 3, seed=i) for i in range(3)]
    left = [drawn(4, seed=20 + i).abs() + 0.1 for i in range(3)]
    right = [drawn(3, seed=30 + i).abs() + 0.1 for i in range(3)]
    whole = kronecker_average(updates, [m.diag() for m in left], [m.diag() for m in right], ridge=0.0)
    fishers = [torch.outer(a, b) for a, b in zip(left, right, strict=True)]
    torch.testing.assert_close(whole, diagonal_average(updates, fishers, floor=0.0))


@pytest.mark.parametrize("weights", [None, [1.0, 0.5, 2.0]])
def test_the_kronecker_average_solves_the_dense_system(weights):
    updates = [drawn(4, 3, seed=i) for i in range(3)]
    left = [m @ m.T for m in (drawn(4, 9, seed=20 + i) for i in range(3))]
    right = [m @ m.T for m in (drawn(3, 9, seed=30 + i) for i in range(3))]
    given = zip(left, right, weights or [1.0] * 3, strict=True)
    fishers = [w * torch.kron(a, b) for a, b, w in given]
    target = sum(f @ d.reshape(-1) for f, d in zip(fishers, updates, strict=True))
    expected = torch.linalg.solve(sum(fishers), target).reshape(4, 3)
    torch.testing.assert_close(kronecker_average(updates, left, right, weights, ridge=0.0), expected)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_kronecker_average_of_factors_that_few_rows_gave(count):
    """Factors of rank 3 with a ridge are badly conditioned (1e11): conjugate gradients alone do not get there."""
    updates = [drawn(12, 9, seed=i) for i in range(count)]
    left = [m @ m.T for m in (drawn(12, 3, seed=20 + i) for i in range(count))]
    right = [m @ m.T for m in (drawn(9, 3, seed=30 + i) for i in range(count))]
    ridged = [[m + 1e-5 * m.diagonal().mean() * torch.eye(len(m)) for m in each] for each in (left, right)]
    fishers = [torch.kron(a, b) for a, b in zip(*ridged, strict=True)]
    target = sum(f @ d.reshape(-1) for f, d in zip(fishers, updates, strict=True))
    expected = torch.linalg.solve(sum(fishers), target).reshape(12, 9)
    found = kronecker_average(updates, left, right, ridge=1e-5)
    # What the data see agrees closely; where they see next to nothing, both solvers lose digits.
    error = sum(f @ (found - expected).reshape(-1) for f in fishers).norm() / target.norm()
    assert error < 1e-8
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_the_diagonal_average_follows_the_informed_expert():
    updates = [torch.ones(1, 2), -torch.ones(1, 2)]
    fishers = [torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0]])]
    found = diagonal_average(updates, fishers, floored="normalised")
    assert found[0, 0] > 0.999
    assert found[0, 1] == 0.0
    # As in the authors' code, what no data has seen keeps the first expert's value.
    assert diagonal_average(updates, fishers)[0].tolist() == [1.0, 1.0]
    assert diagonal_average(updates[::-1], fishers[::-1])[0].tolist() == pytest.approx([1.0, -1.0], abs=1e-5)


def test_led_keeps_what_one_expert_alone_needs():
    scores = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    assert cut(DenseDelta(scores), 0.5) == 3.0
    assert cut(DenseDelta(scores), 0.2) == float("inf")
    assert important(scores, 3.0).tolist() == [[True, True, False, False]]
    assert important(torch.tensor([[0.0, 1.0]]), 0.0).tolist() == [[False, True]]
    masks = [torch.tensor([True, True, False]), torch.tensor([False, True, True])]
    assert [m.tolist() for m in disjoint(masks)] == [[True, False, False], [False, False, True]]
    updates = [torch.full((1, 4), 1.0), torch.full((1, 4), 10.0)]
    other = torch.tensor([[1.0, 4.0, 3.0, 2.0]])
    merged = led(updates, [important(scores, 3.0), important(other, 3.0)], [1.0, 0.5])
    assert merged.tolist() == [[1.0, 0.0, 5.0, 0.0]]


def test_settings_out_of_range_are_refused():
    with pytest.raises(InputError, match="TsvM keep is 0"):
        TsvM(keep=0)
    with pytest.raises(InputError, match="CompressThenMerge rank is 0"):
        CompressThenMerge(rank=0)


@pytest.mark.parametrize("method", [Knots, CoreSpace, CompressThenMerge])
def test_what_trims_whole_updates_is_no_inner_method(method):
    with pytest.raises(InputError, match=rf"{method.__name__} inner is Ties with trim 'global'; expected 'tensor'"):
        method(inner=Ties(trim="global"))
    assert method().inner.trim == "tensor"


@pytest.mark.parametrize(
    "inner",
    [
        IsoC(),
        TsvM(),
        Linear(),
        TaskArithmetic(),
        Knots(TaskArithmetic()),
        CoreSpace(IsoC()),
        CompressThenMerge(9, TsvM()),
    ],
)
@pytest.mark.parametrize("outer", [CoreSpace, Knots, lambda inner: CompressThenMerge(6, inner)])
def test_an_inner_that_no_rotation_changes_gives_what_it_gives_alone(outer, inner):
    given = experts()
    torch.testing.assert_close(result(outer(inner), given), result(inner, given))


@pytest.mark.parametrize(
    "inner", [Knots(), CoreSpace(), CompressThenMerge(2), IsoC(), TsvM(), Linear(), Ties(), Dare()]
)
def test_any_combination_merges_what_is_compressed(inner):
    found = CompressThenMerge(2, inner).combine(experts()).deltas["m"]
    assert found.rank == 2
    assert found.dense().norm() > 0


@pytest.mark.parametrize("inner", [FisherAverage(), RegMean()])
@pytest.mark.parametrize("outer", [Knots, CoreSpace, lambda inner: CompressThenMerge(2, inner)])
def test_an_inner_that_needs_fisher_files_is_refused(outer, inner):
    with pytest.raises(InputError, match=f"inner is {type(inner).__name__}, which needs Fisher files"):
        outer(inner)


def test_an_inner_of_weights_zero_gives_zero():
    given = [Expert(e.key, 0.0, e.deltas) for e in experts()]
    assert not result(CoreSpace(TaskArithmetic()), given).any()


@pytest.mark.parametrize("outer", [Knots, CoreSpace, lambda inner: CompressThenMerge(rank=6, inner=inner)])
@pytest.mark.parametrize("missing", ["module", "update"])
@pytest.mark.parametrize("inner", [Linear(), Ties(0.6), Dare(0.5), Della(0.6), MagnitudePrune(0.5), TaskArithmetic()])
def test_an_expert_without_a_module_counts_with_the_update_zero(outer, missing, inner):
    whole, other = experts(2)
    zero = LowRankPair(torch.zeros(2, 7, dtype=torch.float64), torch.zeros(9, 2, dtype=torch.float64))
    lacking = Expert(other.key, other.weight, {} if missing == "module" else {"m": zero})
    found = result(outer(inner), [whole, lacking])
    # Coordinates of the expert that has it, beside zeros: what the inner combination makes of both.
    if isinstance(inner, Linear):
        torch.testing.assert_close(found, whole.deltas["m"].dense() * 1.0 / 1.5)
    elif isinstance(inner, TaskArithmetic):
        torch.testing.assert_close(found, whole.deltas["m"].dense())
    else:
        assert found.isfinite().all()
        assert found.norm() > 0
