"""Statistics against independent computations: scipy, enumeration and Monte Carlo."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest, norm
from scipy.stats import bootstrap as scipy_bootstrap

from src.data.rows import Row
from src.data.suite import Suite
from src.metrics.agreement import Pairs, count_pairs, kappa, mcnemar
from src.metrics.bootstrap import bias_corrected, bootstrap, paired_difference, resampled_means
from src.metrics.code import pass_at_k
from src.metrics.counters import FlagRate
from src.metrics.fronts import summed_up, volumes
from src.metrics.intervals import tango, wilson
from src.metrics.perplexity import AnswerPerplexity
from src.metrics.tradeoff import (
    UNDEFINED,
    Point,
    _ratio_interval,
    drift,
    safety_at_utility,
    safety_tax,
    utility_at_attack_success,
)
from src.models.grading import suite_summary


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


def test_bias_corrected_percentiles_are_efrons():
    """scipy has them with Efron's acceleration, which is 0 of a mean of symmetric values; so a mean is moved aside."""
    half = np.random.default_rng(4).normal(0.0, 1.0, 40)
    values = np.concatenate([1 + half, 1 - half])
    theirs = scipy_bootstrap((values,), np.mean, method="BCa", n_resamples=20_000, rng=5)
    drawn = torch.tensor(theirs.bootstrap_distribution)
    low, high, p = bias_corrected(values.mean(), drawn)
    assert (low, high) == pytest.approx(tuple(theirs.confidence_interval), abs=1e-3)
    assert p == pytest.approx(2 / 20_001)
    # Draws that lie to one side of the number: the definition, and an end at 0 has a p-value of 5 %.
    place = norm.ppf((drawn.numpy() < 1.1).mean())
    ends = np.quantile(drawn, norm.cdf(2 * place + norm.ppf([0.025, 0.975])))
    low, high, _ = bias_corrected(1.1, drawn)
    assert (low, high) == pytest.approx(tuple(ends), abs=1e-3)
    assert bias_corrected(1.1 - low, drawn - low)[2] == pytest.approx(0.05, abs=1e-3)
    assert bias_corrected(0.5, torch.full((100,), 0.5, dtype=torch.float64))[:2] == (0.5, 0.5)
    assert bias_corrected(0.0, torch.zeros(100, dtype=torch.float64)) == (0.0, 0.0, 1.0)


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
    assert not paired.low <= 0 <= paired.high
    with pytest.raises(ValueError, match="not of the same rows"):
        paired_difference([1.0], [1.0, 2.0])


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 9), (9, 1), (5, 5), (0, 7), (12, 30)])
def test_mcnemar_equals_an_exact_binomial_test(first, second):
    expected = binomtest(first, first + second, 0.5).pvalue if first + second else 1.0
    assert mcnemar(Pairs(3, first, second, 4)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("counts", [(12, 2, 50), (1, 0, 1), (5, 0, 5), (0, 0, 20), (0, 3, 7), (4, 0, 4), (30, 25, 60)])
def test_tangos_limits_are_where_a_score_test_by_numerical_likelihood_turns(counts):
    b, c, n = counts
    concordant = n - b - c

    def rejects(difference):
        def loss(q):
            cells = ((b, q + difference), (c, q), (concordant, 1 - 2 * q - difference))
            return -sum(k * math.log(max(p, 1e-300)) for k, p in cells if k)

        lowest, highest = max(0.0, -difference), (1 - difference) / 2
        q = minimize_scalar(loss, bounds=(lowest, highest), method="bounded", options={"xatol": 1e-12}).x
        variance = n * (2 * q + difference - difference**2)
        return variance > 1e-9 and (b - c - n * difference) ** 2 / variance > 1.959964**2

    low, high = tango(b, c, n)
    assert -1 <= low <= (b - c) / n <= high <= 1
    for end, out in ((low, -1), (high, 1)):
        if abs(end) < 1:
            assert rejects(end + out * 1e-4)
            assert not rejects(end - out * 1e-4)
    assert tango(c, b, n) == pytest.approx((-high, -low), abs=1e-12)


def test_tangos_interval_covers_the_difference_it_should():
    draw = np.random.default_rng(2)
    for b, c in ((0.3, 0.1), (0.05, 0.02), (0.9, 0.0)):
        samples = draw.multinomial(20, [b, c, 1 - b - c], size=3000)
        ends = [tango(int(x), int(y), 20) for x, y, _ in samples]
        assert np.mean([low <= b - c <= high for low, high in ends]) > 0.93


def test_a_difference_is_never_surer_than_its_rows_allow():
    for n in (1, 3, 5, 40):
        up = paired_difference([1.0] * n, [0.0] * n)
        square = 1.959963984540054**2
        assert (up.value, up.low, up.high) == (1.0, pytest.approx((n - square) / (n + square)), 1.0)
        none = paired_difference([1.0] * n, [1.0] * n)
        assert (none.low, none.high) == pytest.approx((-square / (n + square), square / (n + square)))
        half = paired_difference([0.75] * n, [0.25] * n)
        assert half.low < 0.5 < half.high <= 1
        # A share of rows not seen, Wilson's upper end of 0 in n at most, may differ by −1 or by 1 instead.
        unseen = square / (n + square)
        for first, second in ((0.75, 0.25), (0.2, 0.9), (0.3, 0.3)):
            value = first - second
            equal = paired_difference([first] * n, [second] * n)
            ends = (1 - unseen) * value - unseen, (1 - unseen) * value + unseen
            assert (equal.low, equal.value, equal.high) == pytest.approx((ends[0], value, ends[1]), abs=1e-12)
        assert (up.low, up.high) == pytest.approx(tango(n, 0, n), abs=1e-12)
        down = paired_difference([0.0] * n, [1.0] * n)
        assert (down.low, down.high) == pytest.approx(tango(0, n, n), abs=1e-12)
        assert (none.low, none.high) == pytest.approx(tango(0, 0, n), abs=1e-12)
    few = paired_difference([1.0] * 3 + [0.0], [0.0] * 4)
    assert few.low <= 0 <= few.high  # McNemar's p is 0.25
    many, few = shares(60, 100), shares(45, 100)
    drawn = resampled_means(torch.tensor(many) - torch.tensor(few))
    found = paired_difference(many, few)
    assert (found.low, found.high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.02)


def test_a_tax_of_one_row_is_undefined_and_one_of_few_is_not_sure():
    one = {"expert_utility": [1.0], "model_utility": [0.0], "expert_safety": [0.0], "model_safety": [1.0]}
    assert safety_tax(**one).ratio == UNDEFINED
    few = safety_tax(**{key: value * 5 for key, value in one.items()})
    assert few.ratio.low < 0.2
    assert few.ratio.high > 5


@pytest.mark.parametrize("pairs", [Pairs(1, 0, 0, 1), Pairs(5, 0, 0, 5), Pairs(5, 0, 5, 0), Pairs(0, 5, 5, 0)])
def test_kappa_without_a_variance_has_an_interval_all_the_same(pairs):
    agree, n = pairs.both + pairs.neither, pairs.total
    value, low, high = kappa(pairs)
    chance = 0.5  # of all four tables
    expected = binomtest(agree, n).proportion_ci(0.95, "wilson")
    ends = (expected.low - chance) / (1 - chance), (expected.high - chance) / (1 - chance)
    assert (low, high) == pytest.approx(ends, abs=1e-12)
    assert low <= value <= high
    assert high - low > 0.5


def test_kappa_of_full_agreement_is_as_sure_as_a_test_of_fit_allows():
    # Donner and Eliasziw (1992): the kappa at which the chi-squared of the common-correlation model is 1.96².
    _, low, _ = kappa(Pairs(5, 0, 0, 5))
    expected = [10 * (0.25 + 0.25 * low), 10 * 0.5 * (1 - low), 10 * (0.25 + 0.25 * low)]
    assert sum((o - e) ** 2 / e for o, e in zip((5, 0, 5), expected, strict=True)) == pytest.approx(1.959964**2)


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
    assert tax.ratio.low < tax.ratio.high  # also where no row of this draw lost anything


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


def front(points):
    """The points that no other point beats in one coordinate without losing in the other, by rising safety."""
    kept = []
    for point in sorted(set(points), key=lambda p: (-p.safety, -p.utility)):
        if not kept or point.utility > kept[-1].utility:
            kept.append(point)
    return kept[::-1]


def hypervolume(points, *, reference):
    """Area that a front dominates above a reference point, step by step."""
    above = [p for p in points if p.safety > reference.safety and p.utility > reference.utility]
    area, left = 0.0, reference.safety
    for point in front(above):
        area += (point.safety - left) * (point.utility - reference.utility)
        left = point.safety
    return area


FRONT = [Point(0.2, 0.9), Point(0.5, 0.8), Point(0.5, 0.7), Point(0.9, 0.3), Point(0.4, 0.4)]


def test_fronts_and_what_sums_them_up():
    assert front(FRONT) == [Point(0.2, 0.9), Point(0.5, 0.8), Point(0.9, 0.3)]
    grid = [(x + 0.5) / 400 for x in range(400)]
    covered = sum(any(p.safety > x and p.utility > y for p in FRONT) for x in grid for y in grid) / 160_000
    assert hypervolume(FRONT, reference=Point(0, 0)) == pytest.approx(covered, abs=2e-3)
    sides = (torch.tensor([[getattr(p, side) for p in FRONT]]).double() for side in ("safety", "utility"))
    assert volumes(*sides).item() == pytest.approx(covered, abs=2e-3)
    assert hypervolume(FRONT, reference=Point(0.5, 0.5)) == 0.0
    assert hypervolume([], reference=Point(0, 0)) == 0.0
    assert safety_at_utility(FRONT, reference=0.84, keep=0.95) == 0.5
    assert safety_at_utility(FRONT, reference=2.0, keep=0.95) is None
    assert safety_at_utility(FRONT, reference=0.0, keep=0.95) is None
    assert utility_at_attack_success([(0.1, 0.5), (0.3, 0.9), (0.05, 0.2)], at_most=0.1) == 0.5
    assert utility_at_attack_success([(0.5, 1.0)], at_most=0.1) is None


def test_volumes_of_draws_are_those_of_each_front():
    safety, utility = torch.rand(50, 6, dtype=torch.float64), torch.rand(50, 6, dtype=torch.float64)
    utility[:, 2] = utility[:, 1]
    each = [
        hypervolume([Point(*p) for p in zip(x, y, strict=True)], reference=Point(0, 0))
        for x, y in zip(safety.tolist(), utility.tolist(), strict=True)
    ]
    assert volumes(safety, utility).tolist() == pytest.approx(each, abs=1e-12)


def test_a_front_has_the_intervals_of_a_bootstrap_over_rows():
    draw = np.random.default_rng(4)
    safety = (draw.random((3, 80)) < np.array([[0.2], [0.5], [0.9]])).astype(float)
    utility = (draw.random((3, 60)) < np.array([[0.8], [0.75], [0.3]])).astype(float)
    attacks, expert = 1 - safety, (draw.random(60) < 0.8).astype(float)
    found = summed_up(
        safety=safety.tolist(), utility=utility.tolist(), attacks=attacks.tolist(), expert_utility=expert.tolist(),
        keep=0.8, at_most=0.6,
    )  # fmt: skip
    chosen = np.where(utility.mean(1) >= 0.8 * expert.mean(), safety.mean(1), -1)
    assert found.safety_at_utility.value == pytest.approx(chosen.max())
    assert found.utility_at_attack.value == pytest.approx(utility.mean(1)[attacks.mean(1) <= 0.6].max())
    drawn = [[], [], []]
    for _ in range(4000):
        one, two = draw.integers(80, size=80), draw.integers(60, size=60)
        s, u, a, e = safety[:, one].mean(1), utility[:, two].mean(1), attacks[:, one].mean(1), expert[two].mean()
        drawn[0].append(max(s[u >= 0.8 * e], default=0.0))
        drawn[1].append(max(u[a <= 0.6], default=0.0))
        drawn[2].append(hypervolume([Point(*p) for p in zip(s, u, strict=True)], reference=Point(0, 0)))
    numbers = (found.safety_at_utility, found.utility_at_attack, found.hypervolume)
    for estimate, each in zip(numbers, drawn, strict=True):
        assert (estimate.low, estimate.high) == pytest.approx(np.quantile(each, [0.025, 0.975]), abs=0.04)
        assert estimate.low <= estimate.value <= estimate.high
    assert [estimate.n for estimate in numbers] == [80, 60, 60]


def test_a_front_of_equal_rows_is_not_sure_and_one_that_qualifies_by_chance_may_be_anything():
    given = {"attacks": [], "expert_utility": [1.0] * 5, "at_most": 0.1}
    sure = summed_up(safety=[[1.0] * 5], utility=[[1.0] * 5], keep=0.95, **given)
    assert sure.safety_at_utility.low == pytest.approx(wilson(5, 5)[0])
    assert sure.hypervolume.low == pytest.approx(wilson(5, 5)[0])
    assert sure.utility_at_attack is None
    chance = summed_up(safety=[[1.0] * 5], utility=[[1.0, 1.0, 1.0, 1.0, 0.0]], keep=0.8, **given)
    assert (chance.safety_at_utility.low, chance.safety_at_utility.high) == (0.0, 1.0)
    assert summed_up(safety=[[1.0] * 5], utility=[[0.0] * 5], keep=0.8, **given).safety_at_utility is None


def test_a_suites_counts_lie_where_they_can_be_gathered(monkeypatch):
    """NCCL gathers from GPUs alone; the meta device stands for one."""
    monkeypatch.setattr(FlagRate, "summary", lambda self: self.hits.device.type)
    monkeypatch.setattr(AnswerPerplexity, "summary", lambda self: self.rows[0].device.type)
    rows = [Row(str(i), f"prompt {i}", "yes", category="x") for i in range(3)]
    records = [{"refused": True, "collapsed": False, "nll": 1.0, "tokens": 2, "answer": "No."}] * 3
    suite = Suite(name="s", kind="benign", rows="a.jsonl")
    found = suite_summary(suite, rows, records, rank=0, world_size=2, device=torch.device("meta"))
    assert [found[name] for name in ("refusal", "collapse", "perplexity")] == ["meta"] * 3
