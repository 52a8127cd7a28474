"""Statistics against independent computations: scipy, enumeration and Monte Carlo."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from scipy.stats import bootstrap as scipy_bootstrap

from src.metrics.agreement import Pairs, count_pairs, kappa, mcnemar
from src.metrics.bootstrap import bootstrap, paired_difference, resampled_means
from src.metrics.code import pass_at_k
from src.metrics.intervals import wilson
from src.metrics.tradeoff import (
    UNDEFINED,
    Point,
    _ratio_interval,
    drift,
    front,
    hypervolume,
    safety_at_utility,
    safety_tax,
    utility_at_attack_success,
)


@pytest.mark.parametrize(("total", "passed", "k"), [(5, 2, 1), (5, 2, 3), (6, 0, 2), (6, 6, 2), (7, 3, 7), (4, 1, 4)])
def test_pass_at_k_is_the_chance_over_all_subsets(total, passed, k):
    subsets = list(itertools.combinations(range(total), k))
    expected = sum(any(i < passed for i in subset) for subset in subsets) / len(subsets)
    assert pass_at_k(total, passed, k) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("total", "passed", "k"), [(3, 1, 4), (3, 4, 1), (3, -1, 1), (3, 1, 0)])
def test_pass_at_k_refuses_nonsense(total, passed, k):
    with pytest.raises(ValueError, match="expected"):
        pass_at_k(total, passed, k)


def test_bootstrap_agrees_with_scipy():
    values = np.random.default_rng(3).normal(2.0, 1.5, 80)
    theirs = scipy_bootstrap((values,), np.mean, method="percentile", n_resamples=10_000, rng=5).confidence_interval
    ours = bootstrap(values.tolist())
    assert ours.value == pytest.approx(values.mean())
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.03)
    assert bootstrap(values.tolist()) == ours
    assert bootstrap(values.tolist(), seed=1) != ours
    with pytest.raises(ValueError, match="no values"):
        bootstrap([])


def test_resampled_means_have_the_spread_of_a_mean():
    values = torch.tensor([0.0, 1.0] * 50)
    means = resampled_means(values, draws=4000)
    assert means.mean().item() == pytest.approx(0.5, abs=0.005)
    assert means.std().item() == pytest.approx(0.05, abs=0.003)


def test_pairing_cancels_what_makes_a_row_hard():
    hard = np.random.default_rng(0).normal(0, 5, 60)
    first, second = (hard + 0.4).tolist(), hard.tolist()
    paired = paired_difference(first, second)
    assert (paired.low, paired.value, paired.high) == pytest.approx((0.4, 0.4, 0.4))
    assert not paired.includes_zero
    with pytest.raises(ValueError, match="not of the same rows"):
        paired_difference([1.0], [1.0, 2.0])


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 9), (9, 1), (5, 5), (0, 7), (12, 30)])
def test_mcnemar_equals_an_exact_binomial_test(first, second):
    expected = binomtest(first, first + second, 0.5).pvalue if first + second else 1.0
    assert mcnemar(Pairs(3, first, second, 4)) == pytest.approx(expected, abs=1e-12)


def test_kappa_of_the_textbook_example_and_its_interval():
    # Fleiss, Cohen and Everitt's formula written out with numpy, and a parametric bootstrap of the table.
    pairs = Pairs(20, 5, 10, 15)
    value, low, high = kappa(pairs)
    assert value == pytest.approx(0.4)
    draws = np.random.default_rng(1).multinomial(50, np.array([20, 5, 10, 15]) / 50, size=20_000)
    po = (draws[:, 0] + draws[:, 3]) / 50
    pe = (
        (draws[:, 0] + draws[:, 1]) * (draws[:, 0] + draws[:, 2])
        + (draws[:, 2] + draws[:, 3]) * (draws[:, 1] + draws[:, 3])
    ) / 2500
    spread = ((po - pe) / (1 - pe)).std()
    assert (high - low) / (2 * 1.96) == pytest.approx(spread, rel=0.05)
    assert kappa(Pairs(5, 0, 0, 5)) == (1.0, 1.0, 1.0)
    assert math.isnan(kappa(Pairs(5, 0, 0, 0))[0])
    assert count_pairs([True, True, False], [True, False, False]) == Pairs(1, 1, 0, 1)
    with pytest.raises(ValueError, match="not pairs"):
        count_pairs([True], [])


def shares(ones, total):
    return [1.0] * ones + [0.0] * (total - ones)


def test_safety_tax_is_signed_and_says_where_it_is_undefined():
    given = {"expert_utility": shares(80, 100), "expert_safety": shares(10, 100)}
    tax = safety_tax(model_utility=shares(70, 100), model_safety=shares(90, 100), **given)
    assert tax.ratio.value == pytest.approx(0.1 / 0.8)
    assert tax.ratio.low < tax.ratio.value < tax.ratio.high
    better = safety_tax(model_utility=shares(90, 100), model_safety=shares(90, 100), **given)
    assert better.ratio.value == pytest.approx(-0.1 / 0.8)
    for safety in (shares(10, 100), shares(11, 100)):
        assert safety_tax(model_utility=shares(10, 100), model_safety=safety, **given).ratio == UNDEFINED
    worse = safety_tax(model_utility=shares(70, 100), model_safety=shares(0, 100), **given)
    assert worse.gain.value == pytest.approx(-0.1)
    assert worse.gain.high < 0
    assert worse.ratio == UNDEFINED


@pytest.mark.parametrize("gained", [4, 5])
@pytest.mark.parametrize("utility", [45, 50, 55])
def test_a_draw_without_a_gain_never_makes_the_tax_nothing_or_not_a_number(gained, utility):
    given = {"expert_utility": shares(50, 100), "expert_safety": shares(0, 100)}
    tax = safety_tax(model_utility=shares(utility, 100), model_safety=shares(gained, 100), **given)
    assert tax.gain.low > 0
    assert -math.inf < tax.ratio.low <= tax.ratio.value <= tax.ratio.high < math.inf
    assert (tax.ratio.low < tax.ratio.high) == (utility != 50)


def test_the_interval_of_a_ratio_takes_a_draw_without_a_gain_as_beyond_either_end():
    losses, gains = torch.linspace(-1, 1, 1000, dtype=torch.float64), torch.ones(1000, dtype=torch.float64)
    plain = _ratio_interval(losses, gains)
    gains[500:510] = 0  # 0/0 and ±x/0 alike
    gains[510:520] = -1
    low, high = _ratio_interval(losses, gains)
    assert -1 < low < plain[0] < plain[1] < high < 1
    gains[:30] = 0
    assert not math.isfinite(sum(_ratio_interval(losses, gains)))


@pytest.mark.parametrize("value", [0.0, 1.0, 0.5])
def test_equal_scores_have_wilsons_interval_and_not_none(value):
    found = bootstrap([value] * 6)
    assert (found.value, found.low, found.high) == (value, *wilson(value * 6, 6))
    assert found.high - found.low > 0.3
    assert drift([1.0] * 6, [1.0] * 6).high > 0.3
    assert bootstrap([3.0] * 6).low == bootstrap([3.0] * 6).high == 3.0


def test_scores_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="1 of 2 values are not finite"):
        bootstrap([1.0, math.nan])
    with pytest.raises(ValueError, match="2 of 2 values are not finite"):
        paired_difference([math.inf, math.nan], [1.0, 1.0])


def test_drift_counts_changes_that_cancel():
    assert drift([1, 0, 1, 0], [0, 1, 1, 0]).value == 0.5
    assert paired_difference([1, 0, 1, 0], [0, 1, 1, 0]).value == 0.0


FRONT = [Point(0.2, 0.9), Point(0.5, 0.8), Point(0.5, 0.7), Point(0.9, 0.3), Point(0.4, 0.4)]


def test_fronts_and_what_sums_them_up():
    assert front(FRONT) == [Point(0.2, 0.9), Point(0.5, 0.8), Point(0.9, 0.3)]
    grid = [(x + 0.5) / 400 for x in range(400)]
    covered = sum(any(p.safety > x and p.utility > y for p in FRONT) for x in grid for y in grid) / 160_000
    assert hypervolume(FRONT, reference=Point(0, 0)) == pytest.approx(covered, abs=2e-3)
    assert hypervolume(FRONT, reference=Point(0.5, 0.5)) == 0.0
    assert hypervolume([], reference=Point(0, 0)) == 0.0
    assert safety_at_utility(FRONT, reference=0.84) == 0.5
    assert safety_at_utility(FRONT, reference=2.0) is None
    assert utility_at_attack_success([(0.1, 0.5), (0.3, 0.9), (0.05, 0.2)], at_most=0.1) == 0.5
    assert utility_at_attack_success([(0.5, 1.0)], at_most=0.1) is None
