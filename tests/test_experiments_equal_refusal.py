"""Methods at equal refusal: interpolation and bootstrap against a slow twin, planted differences, missing ranges."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from src.experiments.equal_refusal import Gap, common_levels, cost_at, covered, gaps, meets
from src.experiments.equal_refusal_tables import equal_refusal_table, sentences, shares_table
from src.experiments.scores import DRAWS, Scores
from src.metrics.bootstrap import Estimate, resampled_means
from src.metrics.intervals import wilson


def scores(means, seed, count=200):
    """Flags of some models on rows that share their difficulty, with these shares."""
    difficulty = torch.rand(count, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    flags = (difficulty < torch.tensor(list(means.values()), dtype=torch.float64)).double()
    return Scores(tuple(means), tuple(("s", str(i), 0) for i in range(count)), flags)


REFUSAL = scores({"u": 0.05, "a1": 0.4, "a2": 0.7, "a3": 0.97, "b1": 0.6, "b2": 0.9, "c1": 0.2, "c2": 0.3}, 1)
OVER = scores({"u": 0.02, "a1": 0.1, "a2": 0.3, "a3": 0.6, "b1": 0.5, "b2": 0.9, "c1": 0.1, "c2": 0.2}, 2)
CURVES = {"A": ["u", "a1", "a2", "a3"], "B": ["u", "b1", "b2"], "C": ["u", "c1", "c2"]}
CURVES["A again"] = ["a3", "u", "a1", "a2"]  # the order of a path says nothing
FOUND = {"refusal": REFUSAL, "over_refusal": OVER}
WHERE = "test rows"


def line_at(level, points):
    """The slow twin of one interpolation: look for the two neighbours."""
    points = sorted(points)
    if level <= points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 <= level <= x1 and x1 > x0:
            return y0 + (y1 - y0) * (level - x0) / (x1 - x0)
    return points[-1][1]


def test_costs_are_interpolated_between_neighbours_whatever_the_order():
    draw = np.random.default_rng(0)
    refusals, costs, levels = draw.random((20, 5)), draw.random((20, 5)), np.linspace(0, 1, 7)
    expected = [
        [line_at(level, list(zip(x, y, strict=True))) for level in levels] for x, y in zip(refusals, costs, strict=True)
    ]
    np.testing.assert_allclose(cost_at(levels, refusals, costs), expected, atol=1e-12)


def test_levels_are_those_that_both_paths_reach():
    assert common_levels([np.array([0.0, 0.72]), np.array([0.58, 1.0])]).tolist() == pytest.approx([0.6, 0.65, 0.7])
    assert len(common_levels([np.array([0.0, 0.4]), np.array([0.6, 1.0])])) == 0
    assert common_levels([np.array([0.0, 1.0])]).tolist() == pytest.approx([0.5 + 0.05 * i for i in range(10)])


def test_a_wide_gap_between_neighbours_is_no_path():
    levels = np.array([0.5, 0.85, 0.9, 0.95])
    assert covered(levels, np.array([0.97, 0.06, 0.0, 0.89])).tolist() == [False, False, True, True]
    assert covered(levels, np.array([0.4, 0.9])).tolist() == [True, True, True, False]
    assert covered(levels, np.array([0.9])).tolist() == [False] * 4
    sparse = scores({"u": 0.02, "a1": 0.4, "a2": 0.7, "a3": 0.97, "d1": 0.9, "d2": 0.96}, 3)
    over = scores({"u": 0.02, "a1": 0.1, "a2": 0.3, "a3": 0.6, "d1": 0.6, "d2": 0.7}, 4)
    curves = {"A": ["u", "a1", "a2", "a3"], "D": ["u", "d1", "d2"]}
    (gap,) = gaps([{"refusal": sparse, "over_refusal": over}], curves, "A")
    reached = sparse.values.mean(0)[sparse.models.index("d1")].item()
    assert gap.met == 1
    assert min(gap.levels[0]) >= reached - 1e-9


def test_the_difference_and_its_interval_are_those_of_a_loop_over_draws():
    (gap,) = gaps([FOUND], {"A": CURVES["A"], "B": CURVES["B"]}, "A")
    drawn = {name: resampled_means(one.values, seed=0, draws=DRAWS) for name, one in FOUND.items()}
    column = {name: i for i, name in enumerate(REFUSAL.models)}

    def mean_cost(path, x, y):
        found = [line_at(level, [(x[column[m]].item(), y[column[m]].item()) for m in path]) for level in gap.levels[0]]
        return sum(found) / len(found)

    pairs = [(REFUSAL.values.mean(0), OVER.values.mean(0))]
    pairs += [(drawn["refusal"][i], drawn["over_refusal"][i]) for i in range(0, 4000, 8)]
    differences = [mean_cost(CURVES["A"], x, y) - mean_cost(CURVES["B"], x, y) for x, y in pairs]
    found = gap.differences["over_refusal"]
    assert found.value == pytest.approx(differences[0], abs=1e-12)
    assert (found.low, found.high) == pytest.approx(np.quantile(differences[1:], (0.025, 0.975)), abs=0.02)
    assert found.n == 200
    assert gap.levels[0][0] >= 0.5
    assert gap.levels[0][-1] <= REFUSAL.values.mean(0)[column["b2"]].item()


def test_a_planted_difference_is_said_and_nothing_else():
    found = gaps([FOUND], CURVES, "A")
    assert [gap.other for gap in found] == ["B", "C", "A again"]
    assert [gap.wins("over_refusal") for gap in found if gap.differences] == [1, 0]
    assert found[2].differences["over_refusal"].value == pytest.approx(0.0, abs=1e-12)
    said, apart = sentences(found, "A")
    assert said.startswith("At equal refusal, the over-refusal of A is better than that of B (−0.")
    low, high = found[2].differences["over_refusal"].low, found[2].differences["over_refusal"].high
    assert said.endswith(f"not shown to differ from that of A again (+0.000 [−{-low:.3f}, +{high:.3f}]).")
    assert apart == "At no common level of refusal, so not compared with A: C."
    (back,) = sentences(gaps([FOUND], {"A": CURVES["A"], "B": CURVES["B"]}, "B"), "B")
    assert "worse than that of A (+0." in back
    rows = equal_refusal_table(found, "A", WHERE)["rows"]
    assert [row["range"] == "no common range" for row in rows] == [False, True, False]
    assert meets(found)
    assert rows[1]["over_refusal"] == ""


def test_the_range_the_widest_step_and_what_does_not_hold_after_adjustment_are_said():
    (gap,) = gaps([FOUND], {"A": CURVES["A"], "B": CURVES["B"]}, "A")
    means = dict(zip(REFUSAL.models, REFUSAL.values.mean(0).tolist(), strict=True))
    assert means["b1"] - means["u"] > 0.5  # a gap, no step
    assert gap.steps == pytest.approx((means["a2"] - means["a1"], means["b2"] - means["b1"]))
    (said,) = sentences([gap], "A")
    assert " B (−0." in said
    assert said.endswith("]).")
    better, worse = gap.differences["over_refusal"], Estimate(0.2, 0.1, 0.3, 9)
    for difference, steps in ((better, (0.1, 0.4)), (worse, (0.4, 0.1))):
        own = {"over_refusal": difference}, {"over_refusal": 0.0}
        wide, why = sentences([Gap("B", ((0.5,),), *own, steps=steps)], "A")
        assert " B† (" in wide
        assert wide.endswith("; at 0.50).")
        assert why.startswith("† two points of the worse method are more than 0.25 of refusal")
        (fine,) = sentences([Gap("B", ((0.5,),), *own, steps=steps[::-1])], "A")
        assert "†" not in fine
    weak = Gap("B", ((0.5,), ()), gap.differences, {"over_refusal": 0.06})
    doubtful, why = sentences([weak], "A")
    assert " B° (" in doubtful
    assert "]; at 0.50; 1 of 2 seeds)" in doubtful
    assert why == "° at equal refusal: does not hold at 5 % after Holm's adjustment for 1 comparisons."


def test_shares_are_ratios_of_over_refusal_level_by_level():
    (gap,) = gaps([FOUND], {"A": CURVES["A"], "B": CURVES["B"]}, "A")
    means = {name: dict(zip(one.models, one.values.mean(0).tolist(), strict=True)) for name, one in FOUND.items()}
    over = {
        path: lambda level, path=path: line_at(level, [(means["refusal"][m], means["over_refusal"][m]) for m in path])
        for path in (tuple(CURVES["A"]), tuple(CURVES["B"]))
    }
    ours, other = over.values()
    assert list(gap.shares) == list(gap.levels[0])
    for level, share in gap.shares.items():
        assert share.value == pytest.approx(ours(level) / other(level))
        assert share.low < share.value < share.high
    (row,) = shares_table([gap], "A", WHERE)["rows"]
    assert row[f"{gap.levels[0][0]:.2f}"]["value"] == gap.shares[gap.levels[0][0]].value


def test_a_share_of_nothing_is_no_share():
    never = scores(dict.fromkeys(OVER.models, 0.0) | {"a3": 0.2}, 2)
    (gap,) = gaps([{"refusal": REFUSAL, "over_refusal": never}], {"A": CURVES["A"], "B": CURVES["B"]}, "A")
    assert gap.differences
    assert gap.shares == {}
    assert shares_table([gap], "A", WHERE) is None


def test_without_refusals_or_ours_nothing_is_compared():
    assert gaps([{"over_refusal": OVER}], CURVES, "A") == []
    assert gaps([{"refusal": REFUSAL}], CURVES, "A") == []
    assert gaps([], CURVES, "A") == []
    assert gaps([FOUND], CURVES, "nobody") == []
    assert equal_refusal_table([], "A", WHERE)["rows"] == []
    assert sentences([], "A") == []
    assert not meets([])
    assert not meets([Gap("B", ((),), {}, {})])


def test_p_values_are_adjusted_for_every_comparison_of_the_table():
    answers = scores({name: 0.5 for name in OVER.models}, 5)  # no model differs from another
    found = gaps([FOUND | {"answer_nll": answers}], CURVES, "A")
    drawn = {name: resampled_means(one.values, seed=0, draws=DRAWS).numpy() for name, one in FOUND.items()}
    paths = {name: [REFUSAL.models.index(model) for model in CURVES[name]] for name in "AB"}
    one, two = (
        cost_at(np.array(found[0].levels[0]), drawn["refusal"][:, path], drawn["over_refusal"][:, path]).mean(1)
        for path in (paths["A"], paths["B"])
    )
    p = 2 * (1 + min((one <= two).sum(), (one >= two).sum())) / (DRAWS + 1)
    # Two methods share a range with A, on two measures each; the other three comparisons differ by nothing.
    assert found[0].p_values == {"over_refusal": pytest.approx(4 * p), "answer_nll": 1.0}
    assert found[1].p_values == {}
    assert found[2].p_values == {"over_refusal": 1.0, "answer_nll": 1.0}
    written = equal_refusal_table(found, "A", WHERE)
    assert written["rows"][0]["over_refusal_holm"] == pytest.approx(4 * p)
    assert written["rows"][1]["over_refusal_holm"] == ""
    assert "for all 4 of this table together: of the 1 differences whose interval excludes 0, 1 also" in written["note"]


@pytest.mark.parametrize(("count", "differ"), [(3, 3), (10, 5), (40, 5)])
def test_paths_that_differ_in_few_rows_differ_no_surer_than_mcnemars_test(count, differ):
    """Two paths of the same refusals: the other's end refuses a few borderline prompts, ours none."""
    names = ("start", "ours", "other")
    refused = torch.tensor([[0.0] * 3] * 10 + [[1.0] * 3] * 50 + [[0.0, 1.0, 1.0]] * 40, dtype=torch.float64)
    over = torch.zeros(count, 3, dtype=torch.float64)
    over[:differ, 2] = 1.0
    given = {"refusal": refused, "over_refusal": over}
    found = {m: Scores(names, tuple((m, str(i), 0) for i in range(len(one))), one) for m, one in given.items()}
    (gap,) = gaps([found], {"ours": ["start", "ours"], "other": ["start", "other"]}, "ours")
    shares = [(level - 0.5) / 0.4 for level in gap.levels[0]]
    over_refusal = gap.differences["over_refusal"]
    assert over_refusal.value == pytest.approx(-sum(shares) / len(shares) * differ / count)
    # The draws' p-value has a standard error of .004 at most.
    assert gap.p_values["over_refusal"] == pytest.approx(binomtest(differ, differ, 0.5).pvalue, abs=0.015)
    if differ == count:  # no row differs from another: at least Wilson's end of 0 in all rows is open
        assert over_refusal.high >= over_refusal.value + wilson(0, count)[1] * (1 - abs(over_refusal.value)) - 1e-9


def test_disguises_of_a_goal_are_drawn_together_along_paths():
    wide = {m: replace(one, groups=[i // 5 for i in range(200)]) for m, one in FOUND.items()}
    (rows,), (goals,) = (gaps([each], {n: CURVES[n] for n in "AB"}, "A") for each in (FOUND, wide))
    assert goals.differences["over_refusal"].value == rows.differences["over_refusal"].value
    narrow, wide = (one.differences["over_refusal"] for one in (rows, goals))
    # Five rows a goal by their place, which says nothing of how hard they are: about as wide, and drawn otherwise.
    assert 0.7 < (wide.high - wide.low) / (narrow.high - narrow.low) < 1.4
    assert (wide.low, wide.high) != (narrow.low, narrow.high)
