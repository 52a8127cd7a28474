"""Held-out shares, rules that use them, re-learned coefficients, diagnostics, and the settings of Sst that use them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import src.gevp.relearn as relearning
from src.adapters.basis import core_basis
from src.errors import InputError
from src.fisher.accumulate import examples
from src.fisher.block import BlockAccumulator
from src.fisher.diagonal import DiagonalAccumulator
from src.fisher.lowrank import LowRankFisher
from src.fisher.lowrank_accumulator import LowRankAccumulator
from src.gevp.controls import random_projection
from src.gevp.diagnostics import effective_rank, kept_by_module, summary
from src.gevp.filters import cut_at, cut_positions, cuts_at, number_of_cuts, position, soft, topk
from src.gevp.heldout import curve, energy_position, mean_kept, split_rows
from src.gevp.pencil import make_pencil
from src.gevp.relearn import RelearnProblem, relearn
from src.gevp.solve import solve
from src.merge.base import FisherPair
from src.merge.pencil_plot import module_grid, plot_pencil
from src.merge.sst import PatchedFisher, Sst
from tests.oracles import dense_eigh, dense_filtered, dense_pencil, dense_relearned
from tests.test_fisher_files import ACCUMULATORS, SHAPES, random_fisher
from tests.tiny import make_model, random_pairs, random_patch

DIM = 10


def valid_cuts(system):
    return cuts_at(system, cut_positions(system, number_of_cuts(system)))


def pencil(safety, utility):
    return make_pencil(safety, utility, rho=0.1, rho_s=0.5)


def folds_of(kind, rows=12):
    safety, utility = random_fisher(kind, rows, 1), random_fisher(kind, rows, 2)
    folds = split_rows(safety, utility, random_patch(DIM), pencil, seed=0)
    assert len(folds) == 2
    return safety, utility, folds


@pytest.mark.parametrize("kind", ACCUMULATORS)
def test_shares_are_measured_on_the_other_half(kind):
    safety, utility, folds = folds_of(kind)
    patch, halves = random_patch(DIM), (safety.halves(0), utility.halves(0))
    kept = {"safety_energy_kept": 0.0, "utility_tax_kept": 0.0}
    patches = [fold.expansion.at(soft(fold.expansion.system.pencil.trace_ratio)) for fold in folds]
    for fit, made in enumerate(patches):
        system = solve(pencil(halves[0][fit], halves[1][fit]))
        expected = system.expand(patch).at(soft(system.pencil.trace_ratio))
        torch.testing.assert_close(made, expected)
        for name, half in zip(kept, halves, strict=True):
            dense = half[1 - fit].dense()
            kept[name] += ((expected @ dense @ expected) / (patch @ dense @ patch)).item() / 2
    assert mean_kept(folds, patches) == pytest.approx(kept, rel=1e-9)


def dense_cut(values, level, where):
    """Number of directions that a cut keeps: places up to ½ lie above the eigenvalue of what no row has seen."""
    number, above = len(values), min(int((values > level).sum()), len(values) - 1)
    if where <= 0.5 and above:
        return 1 + round(2 * where * (above - 1))
    return above + max(1, round((2 * where - 1) * (number - above)))


def dense_shares(halves, patch, position, of=0):
    """Mean share of held-out safety energy (of utility tax: 1) at a position, by dense pencils: all cuts are valid."""
    found = []
    for fit in (0, 1):
        both = [half[fit].dense().numpy() for half in halves]
        left, right = dense_pencil(*both, rho=0.1, rho_s=0.5)
        level = 5 * np.trace(both[0]) / np.trace(both[1])  # σ/ε
        k = dense_cut(dense_eigh(left, right)[0], level, position)
        judge = halves[of][1 - fit].dense().numpy()
        made = dense_filtered(left, right, patch, lambda _, k=k: np.arange(len(patch)) < k)
        found.append((made @ judge @ made) / (patch @ judge @ patch))
    return np.mean(found)


def finest(folds):
    return max((fold.expansion.system for fold in folds), key=number_of_cuts)


@pytest.mark.parametrize("kind", [BlockAccumulator, DiagonalAccumulator])
@pytest.mark.parametrize("rows", [12, 40])
@pytest.mark.parametrize(("most", "chunk"), [(256, 32), (5, 3)])
def test_the_energy_rule_takes_the_smallest_cut_from_which_on_the_mean_share_is_kept(
    kind, rows, most, chunk, monkeypatch
):
    monkeypatch.setattr("src.gevp.heldout.ENERGY_CUTS", most)
    monkeypatch.setattr("src.gevp.heldout.CHUNK", chunk)
    safety, utility, folds = folds_of(kind, rows)
    halves, patch = (safety.halves(0), utility.halves(0)), random_patch(DIM).numpy()
    positions = cut_positions(finest(folds), most)
    number = len(positions)
    assert number == min(most, DIM)
    kept = [dense_shares(halves, patch, where) for where in positions[:-1]] + [np.inf]
    for share in (0.05, 0.3, 0.5, 0.8, 0.95, 1.0):
        expected = min(i for i in range(number) if min(kept[i:]) >= share)
        assert energy_position(folds, share) == pytest.approx(positions[expected])


@pytest.mark.parametrize("kind", [BlockAccumulator, DiagonalAccumulator])
def test_every_point_of_the_curve_equals_dense_shares(kind, monkeypatch):
    monkeypatch.setattr("src.gevp.heldout.CHUNK", 3)
    safety, utility, folds = folds_of(kind)
    halves, patch, found = (safety.halves(0), utility.halves(0)), random_patch(DIM).numpy(), curve(folds, DIM)
    for of, name in enumerate(("safety_energy_kept", "utility_tax_kept")):
        expected = [dense_shares(halves, patch, where, of) for where in found["position"]]
        assert len(expected) == DIM
        assert found[name] == pytest.approx(expected, rel=1e-6)


def uneven_folds(kind, n_s, n_u, spread, control="none"):
    """Folds of low-rank matrices of 60 coordinates whose squared scores range over 10^spread."""
    draw = torch.Generator().manual_seed(n_s)
    scale = torch.logspace(0, -spread / 2, 60, dtype=torch.float64)
    scores = [
        torch.randn(n, 60, generator=draw).double() * scale[torch.randperm(60, generator=draw)] for n in (n_s, n_u)
    ]
    if kind == "deficient":
        scores[0] = scores[0][:3].repeat(-(-n_s // 3), 1)[:n_s]
    pair = [LowRankFisher(some, len(some)) for some in scores]
    return split_rows(
        *pair, random_patch(60), lambda *two: make_pencil(*two, rho=0.1, rho_s=10.0, control=control), seed=0
    )


@pytest.mark.parametrize(("n_s", "n_u"), [(17, 22), (40, 30), (5, 90)])
@pytest.mark.parametrize(("kind", "spread"), [("random", 0), ("random", 4), ("random", 12), ("deficient", 0)])
@pytest.mark.parametrize("control", ["none", "swapped"])
def test_the_energy_rule_keeps_what_it_promises_and_more_for_a_larger_share(n_s, n_u, kind, spread, control):
    folds, before = uneven_folds(kind, n_s, n_u, spread, control), 0.0
    for share in (0.2, 0.5, 0.8, 0.9, 0.99, 1.0):
        where = energy_position(folds, share)
        patches = [fold.expansion.at(cut_at(fold.expansion.system, where)) for fold in folds]
        assert mean_kept(folds, patches)["safety_energy_kept"] >= share - 1e-9
        assert where >= before
        before = where


def test_the_energy_rule_compares_a_bounded_number_of_cuts(monkeypatch):
    monkeypatch.setattr("src.gevp.heldout.ENERGY_CUTS", 5)
    monkeypatch.setattr("src.gevp.heldout.CHUNK", 2)
    folds = uneven_folds("random", 40, 30, 2)
    places = cut_positions(finest(folds), 5)
    assert len(places) <= 5
    for share in (0.2, 0.9, 1.0):
        assert energy_position(folds, share) in places


def test_a_single_valid_cut_is_the_whole_patch():
    one = LowRankFisher(torch.ones(8, DIM), 8)
    folds = split_rows(one, one, random_patch(DIM), lambda *two: make_pencil(*two, rho=0.1, rho_s=0.1), seed=0)
    assert len(valid_cuts(folds[0].expansion.system)) == 1
    assert energy_position(folds, 0.5) == 1.0


@pytest.mark.parametrize("kind", ACCUMULATORS)
def test_the_curve_ends_with_the_whole_patch(kind):
    _, _, folds = folds_of(kind)
    found = curve(folds, points=7)
    assert found["position"] == cut_positions(finest(folds), 7)
    assert cut_at(finest(folds), found["position"][0]).k == 1
    assert found["position"][-1] == 1.0
    assert len(found["position"]) >= 4
    for name in ("safety_energy_kept", "utility_tax_kept"):
        assert found[name][-1] == pytest.approx(1.0)
        first = mean_kept(folds, [fold.expansion.at(cut_at(fold.expansion.system, 0.0)) for fold in folds])
        assert found[name][0] == pytest.approx(first[name])


def test_rows_that_cannot_be_split_have_no_held_out_share():
    few, many = random_fisher(LowRankAccumulator, 3), random_fisher(LowRankAccumulator, 9)
    assert split_rows(few, many, random_patch(DIM), pencil, seed=0) is None
    joined = random_fisher(BlockAccumulator, 12)
    assert split_rows(joined.half(0), joined, random_patch(DIM), pencil, seed=0) is None
    blind = LowRankFisher(torch.eye(DIM)[[0] * 4], 4)
    assert split_rows(blind, many, torch.eye(DIM)[1].double(), pencil, seed=0) is None


def test_a_position_and_its_cut_belong_together():
    system = solve(pencil(random_fisher(DiagonalAccumulator, 9, 1), random_fisher(DiagonalAccumulator, 9, 2)))
    for k in range(1, DIM + 1):
        assert cut_at(system, position(system, k)) == topk(system, k)
    assert [cut.k for cut in valid_cuts(system)] == list(range(1, DIM + 1))
    assert [cut.k for cut in cuts_at(system, [0, 1])] == [1, DIM]


def problem(kinds, *, tau=0.7, trust=2.0, sigma=0.3):
    three = [random_fisher(kind, rows, seed) for kind, rows, seed in zip(kinds, (6, 5, 7), (1, 2, 3), strict=True)]
    draw = torch.Generator().manual_seed(9)
    means = [torch.randn(DIM, generator=draw, dtype=torch.float64) for _ in range(2)]
    return RelearnProblem(*three, *means, tau=tau, trust=trust, sigma=sigma)


@pytest.mark.parametrize(
    "kinds",
    [[LowRankAccumulator] * 3, [BlockAccumulator] * 3, [LowRankAccumulator, BlockAccumulator, BlockAccumulator]],
)
@pytest.mark.parametrize("weights", [{}, {"tau": 0.0}, {"trust": 0.0}, {"sigma": 1e-8}, {"sigma": 1e4}])
def test_relearned_coefficients_equal_the_dense_solve(kinds, weights):
    given = problem(kinds, **weights)
    dense = [fisher.dense().numpy() for fisher in (given.safety, given.benign, given.utility)]
    means, start = (given.safety_mean.numpy(), given.benign_mean.numpy()), random_patch(DIM)
    expected = dense_relearned(*dense, *means, start.numpy(), tau=given.tau, trust=given.trust, sigma=given.sigma)
    found, sigma = relearn(given, start)
    assert sigma == given.sigma
    assert np.linalg.norm(found.numpy() - expected) < 1e-7 * np.linalg.norm(expected)
    step = 1e-3 * random_patch(DIM)
    least = given.objective(found, start)
    assert least <= given.objective(start, start)
    assert least <= min(given.objective(found + step, start), given.objective(found - step, start))


@pytest.mark.parametrize("kind", [LowRankAccumulator, BlockAccumulator])
@pytest.mark.parametrize("share", [0.9, 0.1, 1e-3])
def test_a_step_that_is_too_long_is_the_dense_solve_at_the_ridge_where_it_fits(kind, share):
    given, start = problem([kind] * 3, sigma=1e-4), random_patch(DIM)
    free, _ = relearn(given, start)
    radius = share * (free - start).norm().item()
    found, sigma = relearn(given, start, radius)
    assert sigma > given.sigma
    assert 0.98 * radius <= (found - start).norm().item() <= radius
    dense = [fisher.dense().numpy() for fisher in (given.safety, given.benign, given.utility)]
    means = (given.safety_mean.numpy(), given.benign_mean.numpy())
    expected = dense_relearned(*dense, *means, start.numpy(), tau=given.tau, trust=given.trust, sigma=sigma)
    assert np.linalg.norm(found.numpy() - expected) < 1e-7 * np.linalg.norm(expected)
    assert given.objective(found, start) < given.objective(start, start)


@pytest.mark.parametrize("kind", [LowRankAccumulator, BlockAccumulator])
def test_a_step_that_fits_is_left_alone(kind):
    given, start = problem([kind] * 3), random_patch(DIM)
    free, sigma = relearn(given, start)
    found, same = relearn(given, start, 1.01 * (free - start).norm().item())
    assert (sigma, same) == (given.sigma, given.sigma)
    torch.testing.assert_close(found, free)


@pytest.mark.parametrize("sigma", [1e-4, 1e-14])
@pytest.mark.parametrize("share", [0.9, 1e-3])
def test_a_ridge_is_looked_for_without_forming_steps(monkeypatch, sigma, share):
    """Norms from the Gram matrix choose the ridge that steps choose; where rounding hides a norm, steps do."""
    given, start = problem([LowRankAccumulator] * 3, sigma=sigma), random_patch(DIM)
    steps = relearning._steps(given, given.target(start))
    for one in (1e-2, 0.3, 20.0):
        assert steps.norm(one) == pytest.approx(steps.at(one).norm().item(), rel=1e-9)
    radius = share * steps.at(1e-4).norm().item()
    formed = []

    def watched(*given):
        found = steps_of(*given)
        return replace(found, at=lambda one: (formed.append(one), found.at(one))[1])

    steps_of = relearning._steps
    monkeypatch.setattr(relearning, "_steps", watched)
    found, chosen = relearn(given, start, radius)
    assert sigma < 1e-9 or len(formed) == 1
    monkeypatch.setattr(relearning, "_steps", lambda *given: replace(steps_of(*given), norm=None))
    expected, same = relearn(given, start, radius)
    assert chosen == same
    torch.testing.assert_close(found, expected)


def test_a_step_of_no_length_is_none():
    given, start = problem([LowRankAccumulator] * 3), random_patch(DIM)
    torch.testing.assert_close(relearn(given, start, 0.0)[0], start)


@pytest.mark.parametrize("weights", [{"sigma": 0.0}, {"tau": -1.0}, {"trust": float("nan")}])
def test_weights_of_the_step_out_of_range_are_refused(weights):
    with pytest.raises(ValueError, match="expected sigma above 0"):
        problem([LowRankAccumulator] * 3, **weights)


def test_effective_rank_counts_equal_eigenvalues():
    assert effective_rank(torch.tensor([2.0, 2.0, 2.0, 0.0]).double()) == pytest.approx(3.0)
    assert effective_rank(torch.tensor([5.0]).double()) == pytest.approx(1.0)


def test_the_summary_writes_at_most_so_many_eigenvalues(monkeypatch):
    monkeypatch.setattr("src.gevp.diagnostics.SPECTRUM_POINTS", 4)
    system = solve(pencil(random_fisher(LowRankAccumulator, 2, 1), random_fisher(LowRankAccumulator, 3, 2)))
    found = summary(system)
    assert found["spectrum"]["rank"] == [1, 4, 7, 10]
    assert found["spectrum"]["value"][0] == system.values[0].item()
    assert found["complement_eigenvalue"] == pytest.approx(system.pencil.sigma / system.pencil.epsilon)
    assert found["dim"] == DIM
    assert found["span"] == 5


def test_kept_by_module_is_a_ratio_of_norms():
    whole, filtered = torch.ones(10).double(), torch.ones(10).double()
    filtered[:6], whole[6:] = 0.5, 0.0
    assert kept_by_module(filtered, whole, SHAPES) == {"model.layers.0.a": pytest.approx(0.5), "model.layers.1.b": None}


@pytest.fixture
def case():
    """A safety adapter and Fisher matrices in its core space, of any representation."""
    safety = random_pairs(make_model(), 2, 2)
    core = core_basis([safety])

    def make(kind, rows=10, seed=0):
        draw, accumulator = torch.Generator().manual_seed(seed), kind(core.shapes)
        accumulator.begin(examples(torch.arange(rows), [f"{seed}/{i}" for i in range(rows)]))
        for name, (p, q) in core.shapes.items():
            sides = (torch.randn(rows, 3, side, generator=draw, dtype=torch.float64) for side in (p, q))
            accumulator.update(name, *sides)
        return accumulator.finish()

    return safety, core, make


SETTINGS = [
    {"filter": "soft"},
    {"filter": "threshold", "t": 1.0, "rho_s": 0.5},
    {"filter": "topk", "k": 4, "rho_s": 0.0},
    {"filter": "energy", "share": 0.6, "rho_s": 0.0},
]


@pytest.mark.parametrize("kind", ACCUMULATORS)
@pytest.mark.parametrize("options", SETTINGS)
def test_sst_filters_with_every_representation_and_reports_for_the_plots(case, kind, options, tmp_path):
    safety, core, make = case
    fisher = FisherPair(make(kind, seed=1), make(kind, seed=2), core)
    patch = Sst(**options).patch({}, safety, fisher)
    found, whole = core.coordinates(patch.pairs), core.coordinates(safety)
    findings = patch.findings
    assert 0 < findings["patch_norm_kept"] == pytest.approx((found.norm() / whole.norm()).item())
    assert findings["representation"] == fisher.safety.representation
    assert (findings["directions_kept"] is None) == (options["filter"] == "soft")
    assert set(findings["kept_by_module"]) == set(core.modules)
    assert findings["held_out_curve"]["safety_energy_kept"][-1] == pytest.approx(1.0)
    assert 0 < findings["held_out"]["safety_energy_kept"] < 1.5
    if options["filter"] == "topk":
        system = solve(make_pencil(fisher.safety, fisher.utility, rho=0.1, rho_s=0.0))
        torch.testing.assert_close(found, system.expand(whole).at(topk(system, 4)), rtol=1e-6, atol=1e-8)
    plot_pencil(findings, tmp_path / "pencil.png")
    assert (tmp_path / "pencil.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("control", ["random", "safety_only", "utility_only", "swapped"])
def test_every_control_is_a_setting_and_another_merge(case, control):
    safety, core, make = case
    fisher = FisherPair(make(LowRankAccumulator, seed=1), make(LowRankAccumulator, 8, seed=2), core)
    options = {"filter": "threshold", "t": 1.0, "rho_s": 0.5}
    plain, other = Sst(**options), Sst(**options, control=control)
    one, two = (core.coordinates(method.patch({}, safety, fisher).pairs) for method in (plain, other))
    assert (one - two).norm() > 1e-3 * one.norm()
    assert other.name == f"SST threshold ({control})"
    if control == "random":
        again = core.coordinates(other.patch({}, safety, fisher).pairs)
        assert torch.equal(again, two)
        seeded = Sst(**options, control=control, seed=1).patch({}, safety, fisher)
        assert not torch.equal(core.coordinates(seeded.pairs), two)


@pytest.mark.parametrize("control", ["none", "safety_only", "utility_only", "swapped"])
@pytest.mark.parametrize("filter", ["soft", "threshold"])
def test_controls_of_both_filters_equal_dense_filters(case, control, filter):
    """The exchange rate is relative to the two sides as they stand: swapped ones have the inverse ratio of traces."""
    safety, core, make = case
    one, two = make(LowRankAccumulator, seed=1), make(LowRankAccumulator, 8, seed=2)
    fisher = FisherPair(one, LowRankFisher(2 * two.scores, 8), core)
    s, u = (side.dense().numpy() for side in (fisher.safety, fisher.utility))
    flat_s, flat_u = (np.trace(side) / core.dim * np.eye(core.dim) for side in (s, u))
    pair = {"none": (s, u), "safety_only": (s, flat_u), "utility_only": (flat_s, u), "swapped": (u, s)}[control]
    tau = 0.7 * np.trace(pair[0]) / np.trace(pair[1])
    phi = {"soft": lambda values: values / (values + tau), "threshold": lambda values: values > tau}[filter]
    left, right = dense_pencil(*pair, rho=0.1, rho_s=0.05)
    expected = dense_filtered(left, right, core.coordinates(safety).numpy(), phi)
    patch = Sst(filter=filter, t=0.7, rho_s=0.05, control=control).patch({}, safety, fisher)
    np.testing.assert_allclose(core.coordinates(patch.pairs).numpy(), expected, rtol=1e-6, atol=1e-9)
    if filter == "threshold":
        kept = int(phi(dense_eigh(left, right)[0]).sum())
        assert patch.findings["directions_kept"] == kept
        assert 0 < kept < core.dim


@pytest.mark.parametrize(
    ("options", "number"),
    [
        ({"filter": "threshold", "t": 0.7, "rho_s": 0.05}, lambda values, tau: int((values > tau).sum())),
        # The fifth of eleven cuts (ten safety rows, and the whole patch) stands where the third of a half's six does.
        ({"filter": "topk", "k": 5, "rho_s": 0.0}, lambda *_: 3),
    ],
)
def test_the_random_control_projects_on_as_many_directions_as_the_filter_keeps(case, options, number):
    safety, core, make = case
    fisher = FisherPair(make(LowRankAccumulator, seed=1), make(LowRankAccumulator, 8, seed=2), core)
    patch = Sst(**options, control="random", seed=3).patch({}, safety, fisher)
    whole, k = core.coordinates(safety), patch.findings["directions_kept"]
    assert k == Sst(**options).patch({}, safety, fisher).findings["directions_kept"] < core.dim
    expected = random_projection(whole, fisher.utility, 0.1 * fisher.utility.trace() / core.dim, k=k, seed=3)
    torch.testing.assert_close(core.coordinates(patch.pairs), expected, rtol=1e-6, atol=1e-9)
    halves = [[half.dense().numpy() for half in side.halves(0)] for side in (fisher.safety, fisher.utility)]
    kept, c0 = [], whole.numpy()
    for fit in (0, 1):
        left, right = dense_pencil(halves[0][fit], halves[1][fit], rho=0.1, rho_s=options["rho_s"])
        k = number(dense_eigh(left, right)[0], 0.7 * np.trace(halves[0][fit]) / np.trace(halves[1][fit]))
        x = torch.randn(k, core.dim, generator=torch.Generator().manual_seed(3), dtype=torch.float64).numpy()
        made = x.T @ np.linalg.solve(x @ right @ x.T, x @ right @ c0)
        kept.append([(made @ side[1 - fit] @ made) / (c0 @ side[1 - fit] @ c0) for side in halves])
    shares = dict(zip(("safety_energy_kept", "utility_tax_kept"), np.mean(kept, axis=0), strict=True))
    assert patch.findings["held_out"] == pytest.approx(shares, rel=1e-6)


def test_sst_relearns_where_mean_scores_are_given(case):
    safety, core, make = case
    three = [make(LowRankAccumulator, rows, seed) for rows, seed in ((9, 1), (8, 2), (7, 3))]
    means = [fisher.scores.double().mean(0) for fisher in (three[0], three[2])]
    fisher = PatchedFisher(three[0], three[1], core, benign=three[2], safety_mean=means[0], benign_mean=means[1])
    method = Sst(coefficients="relearn", t=2.0, trust=3.0, rho_s=5.0)
    patch = method.patch({}, safety, fisher)
    start = core.coordinates(safety)
    trace_s, trace_u, trace_b = (f.trace() for f in three)
    expected = dense_relearned(
        three[0].dense().numpy(),
        three[2].dense().numpy(),
        three[1].dense().numpy(),
        *(mean.numpy() for mean in means),
        start.numpy(),
        tau=2.0 * trace_s / trace_b,
        trust=3.0 * trace_s / trace_u,
        sigma=5.0 * trace_s / core.dim,
    )
    np.testing.assert_allclose(core.coordinates(patch.pairs).numpy(), expected, rtol=1e-6, atol=1e-9)
    assert patch.findings["objective_after"] < patch.findings["objective_before"]
    assert patch.findings["held_out"] is None
    with pytest.raises(InputError, match="needs mean scores"):
        method.patch({}, safety, FisherPair(three[0], three[1], core))


@pytest.mark.parametrize("radius", [1e9, 0.05])
@pytest.mark.parametrize("kind", [LowRankAccumulator, DiagonalAccumulator])
@pytest.mark.parametrize("control", ["safety_only", "utility_only"])
def test_a_relearned_control_sees_one_data_set_alone(case, control, kind, radius):
    """Dense twin: identities of the same trace and a zero mean in the place of what is left out."""
    safety, core, make = case
    three = [make(kind, rows, seed) for rows, seed in ((9, 1), (8, 2), (7, 3))]
    draw = torch.Generator().manual_seed(4)
    means = [torch.randn(core.dim, generator=draw, dtype=torch.float64) for _ in range(2)]
    fisher = PatchedFisher(three[0], three[1], core, benign=three[2], safety_mean=means[0], benign_mean=means[1])
    method = Sst(coefficients="relearn", control=control, t=2.0, trust=3.0, rho_s=5.0, radius=radius)
    patch = method.patch({}, safety, fisher)
    assert method.name == f"SST relearn ({control})"
    start, found = core.coordinates(safety), core.coordinates(patch.pairs)
    weights = {"tau": 2.0 * three[0].trace() / three[2].trace(), "trust": 3.0 * three[0].trace() / three[1].trace()}
    left_out = [0] if control == "utility_only" else [1, 2]
    dense = [each.dense().numpy() for each in three]
    for i in left_out:
        dense[i] = three[i].trace() / core.dim * np.eye(core.dim)
    kept = [np.zeros(core.dim) if i in left_out else mean.numpy() for i, mean in ((0, means[0]), (2, means[1]))]
    # The manifest's ridge holds the identity that stands in F_s's or in F_u's place at the patched point.
    inside = (1.0 if control == "utility_only" else 2.0) * three[0].trace() / core.dim
    sigma = patch.findings["sigma"] - inside
    if radius > 1:
        assert sigma == pytest.approx(5.0 * three[0].trace() / core.dim)
    else:
        assert 0.99 * radius <= (found - start).norm() / start.norm() <= radius
    expected = dense_relearned(dense[0], dense[2], dense[1], *kept, start.numpy(), **weights, sigma=sigma)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-9)
    assert patch.findings["objective_after"] < patch.findings["objective_before"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"filter": "energy"}, "filter is 'energy', which needs method.share"),
        ({"share": 0.5}, "method.share is 0.5 with filter 'soft', which takes none; energy does"),
        ({"filter": "energy", "share": 1.5}, "method.share is 1.5; expected a number above 0 and at most 1"),
        ({"control": "random"}, "expected topk, energy or threshold"),
        ({"coefficients": "relearn", "rho_s": 0.0}, "rho_s above 0"),
        ({"coefficients": "relearn", "control": "swapped"}, "control none"),
        ({"trust": -1.0}, "method.trust is -1.0"),
        ({"t": float("nan")}, "method.t is nan"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        Sst(**options)


def test_the_energy_filter_needs_rows_to_hold_out(case):
    safety, core, make = case
    fisher = FisherPair(make(LowRankAccumulator, 3, 1), make(LowRankAccumulator, 9, 2), core)
    with pytest.raises(InputError, match="at least 4 rows each"):
        Sst(filter="energy", share=0.5).patch({}, safety, fisher)
    findings = Sst().patch({}, safety, fisher).findings
    assert findings["held_out"] is None
    assert findings["held_out_curve"] is None


def test_an_energy_that_only_the_whole_patch_keeps_is_said_in_one_line(case, caplog):
    safety, core, make = case
    fisher = FisherPair(make(LowRankAccumulator, 20, 1), make(LowRankAccumulator, 20, 2), core)
    for share, said in ((0.05, False), (1.0, True)):
        caplog.clear()
        patch = Sst(filter="energy", share=share).patch({}, safety, fisher)
        lines = [record.getMessage() for record in caplog.records]
        assert len(lines) == said
        assert patch.findings["held_out"]["safety_energy_kept"] >= share - 1e-9
        assert (patch.findings["directions_kept"] == core.dim) == said
    assert lines[0].startswith("method.share is 1.0: nothing short of the whole patch keeps this share")


def test_the_map_has_a_row_per_layer_and_a_column_per_module():
    kept = {"model.layers.0.q": 0.5, "model.layers.2.q": None, "model.layers.2.k": 0.25, "head": 1.0}
    layers, modules, grid = module_grid(kept)
    assert layers == [-1, 0, 2]
    assert modules == ["q", "k", "head"]
    assert grid[1][0] == 0.5
    assert grid[2][1] == 0.25
    assert grid[0][2] == 1.0
    assert np.isnan(grid[2][0])
    assert np.isnan(grid[1][1])


def test_a_relearned_merge_has_its_map_drawn(tmp_path):
    plot_pencil({"kept_by_module": {"model.layers.0.q": 1.2}, "held_out": None}, tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("dim", "title", "scale"),
    [
        (4, "Norm kept over norm of the patch", "norm kept"),
        (None, "Re-learned patch", "norm over that of the safety patch"),
    ],
)
def test_a_map_says_whether_its_patch_is_a_part_of_the_whole(tmp_path, monkeypatch, dim, title, scale):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    plot_pencil({"kept_by_module": {"model.layers.0.q": 1.2}, "held_out": None, "dim": dim}, tmp_path / "p.png")
    axis, bar = drawn[0].axes
    assert axis.get_title() == f"{title}, by module"
    assert bar.get_ylabel() == scale


def test_a_ridge_that_drowns_in_rounding_is_named():
    with pytest.raises(ValueError, match="raise the ridge rho_s"):
        relearn(problem([LowRankAccumulator] * 3, sigma=1e-25), random_patch(DIM))


@pytest.mark.parametrize("kind", [LowRankAccumulator, BlockAccumulator])
@pytest.mark.parametrize(("n_s", "n_u"), [(12, 30), (17, 22), (20, 20), (33, 41), (40, 260), (120, 120)])
def test_a_cut_of_all_rows_and_those_of_their_halves_stand_on_one_side_of_what_no_row_has_seen(kind, n_s, n_u):
    """The largest cut that keeps nothing unseen must not become one that keeps everything unseen, nor the other way."""
    shapes = {"a": (12, 10), "b": (9, 8)}
    fishers = []
    for seed, rows in ((1, n_s), (2, n_u)):
        draw, accumulator = torch.Generator().manual_seed(seed), kind(shapes)
        accumulator.begin(examples(torch.arange(rows), [f"{seed}/{i}" for i in range(rows)]))
        for name, (p, q) in shapes.items():
            accumulator.update(name, torch.randn(rows, 1, p, generator=draw), torch.randn(rows, 1, q, generator=draw))
        fishers.append(accumulator.finish())
    safety, utility = fishers
    whole = solve(pencil(safety, utility))
    folds = split_rows(safety, utility, random_patch(whole.dim), pencil, seed=0)

    def unseen(system, k):
        """Whether a cut keeps directions at or under the eigenvalue of the unseen ones."""
        return bool(system.ordered()[k - 1] <= system.complement_value * (1 + 1e-9))

    cuts = [cut.k for cut in valid_cuts(whole)]
    assert {unseen(whole, k) for k in cuts} == {False, True}
    for k in cuts:
        where = position(whole, k)
        assert cut_at(whole, where).k == k
        for fold in folds:
            system = fold.expansion.system
            assert unseen(system, cut_at(system, where).k) == unseen(whole, k)
