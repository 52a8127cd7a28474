"""What a study says about scores: splits, means over seeds, paired differences, claims, chosen strengths."""

import json
import random

import numpy as np
import pytest
import scipy.stats
import torch

from src.experiments.comparison import Choice, chosen_point, summary
from src.experiments.document import best_rows, better
from src.experiments.equal_refusal import Gap
from src.experiments.grid import Model
from src.experiments.interference_claims import difference_table, kept_claims
from src.experiments.interference_claims import summary as interference_summary
from src.experiments.interference_tables import alone_table, hardly_learnt, kept_front, performance_table
from src.experiments.kept import Kept, difference, kept_of, mean_kept, slope
from src.experiments.safety_tax import category_table, tax_rows
from src.experiments.scores import (
    DRAWS,
    Scores,
    by_category,
    draws_for,
    gathered,
    in_split,
    joined,
    row_keys,
    row_scores,
    two_sided_p,
)
from src.experiments.statements import Claim, claims, claims_table, holm, tally
from src.metrics.bootstrap import Estimate, bias_corrected, paired_difference
from src.metrics.intervals import tango, wilson

KINDS = {"bad": "harmful", "safe": "borderline", "task": "utility", "free": "utility", "said": "benign"}


def record(refused, *, over=0.1, exact=0.5, seed=0, count=120):
    """An evaluated model's record with shares near those asked for."""
    draw = random.Random(seed)

    def flags(share):
        return [int(draw.random() < share) for _ in range(count)]

    ids = {suite: [f"{suite}{i:04d}" for i in range(count)] for suite in KINDS}
    rows = {suite: {"ids": ids[suite], "categories": ["x" if i % 3 else "y" for i in range(count)]} for suite in KINDS}
    rows["bad"] |= {"refused": flags(refused), "collapsed": [0] * count}
    rows["safe"] |= {"refused": flags(over), "collapsed": [0] * count, "nll": [1.0] * count}
    rows["task"] |= {"exact": flags(exact)}
    rows["free"] |= {"exact": [0] * count, "rouge_l": [0.25] * count}
    rows["said"] |= {"nll": [2.0] * count}
    suites = [{"name": suite, "kind": kind, "rouge": suite == "free"} for suite, kind in KINDS.items()]
    return {"settings": {"data": {"suites": suites}}, "found": {"rows": rows}}


def test_every_measure_takes_the_rows_and_the_column_that_belong_to_it():
    scores = row_scores(record(0.5))
    assert {measure: len(rows) for measure, rows in scores.items()} == {
        "refusal": 120,
        "over_refusal": 120,
        "utility": 240,
        "answer_nll": 240,
        "collapse": 240,
    }
    assert scores["utility"]["free", "free0000", 0] == 0.25


def test_equal_prompts_are_rows_of_their_own():
    assert row_keys("s", ["a", "b", "a"]) == [("s", "a", 0), ("s", "b", 0), ("s", "a", 1)]


def test_validation_and_test_rows_part_all_rows_whatever_their_suite_and_order():
    rows = [("s", f"{i:x}", 0) for i in range(2000)]
    validation = [row for row in rows if in_split(row, "validation", share=0.3, seed=1)]
    test = [row for row in rows if in_split(row, "test", share=0.3, seed=1)]
    assert sorted(validation + test) == sorted(rows)
    assert len(validation) / len(rows) == pytest.approx(0.3, abs=0.04)
    assert in_split(("other", validation[0][1], 5), "validation", share=0.3, seed=1)
    assert validation != [row for row in rows if in_split(row, "validation", share=0.3, seed=2)]


def test_rows_of_suites_that_only_report_are_test_rows_unless_they_were_asked_before():
    def with_further(refused):
        first, further = record(refused), record(refused, seed=9)
        further["settings"] = {"data": {"suites": [{"name": "more", "kind": "harmful"}]}}
        ids = ["bad0000", "bad0001", *(f"more{i:04d}" for i in range(50))]
        columns = {"ids": ids, "categories": ["z"] * 52, "refused": [1] * 52, "collapsed": [0] * 52}
        further["found"] = {"rows": {"more": columns}}
        return joined(first, [further])

    models = {"A": [with_further(0.5)], "B": [with_further(0.4)]}
    whole, validation, test = (gathered(models, part, share=0.4)["refusal"] for part in ("all", "validation", "test"))
    assert len(whole.rows) == 172
    assert sorted(validation.rows + test.rows) == sorted(whole.rows)
    assert not any(row[1].startswith("more") for row in validation.rows)
    for one in ("bad0000", "bad0001"):
        part = validation if in_split(("bad", one, 0), "validation", share=0.4, seed=0) else test
        assert {("bad", one, 0), ("more", one, 0)} <= set(part.rows)
    alone = gathered({"A": [record(0.5)], "B": [record(0.4)]}, "validation", share=0.4)["refusal"]
    assert {row for row in validation.rows if row[0] == "bad"} == set(alone.rows)
    assert by_category(models["A"][0])["z"] == (52, 52, 52)


def test_scores_are_means_over_seeds_and_differences_are_paired():
    one, two = [record(0.6, seed=s) for s in (1, 2)], [record(0.5, seed=s) for s in (3, 4)]
    scores = gathered({"A": one, "B": two})["refusal"]
    flags = [r["found"]["rows"]["bad"]["refused"] for r in one]
    means = [(a + b) / 2 for a, b in zip(*flags, strict=True)]
    assert scores.values[:, 0].tolist() == means
    assert scores.estimate("A").value == pytest.approx(sum(means) / 120)
    expected = paired_difference(means, scores.values[:, 1].tolist())
    found = scores.difference("A", "B")
    assert found.value == pytest.approx(expected.value)
    assert found.low == pytest.approx(expected.low, abs=0.01)
    assert found.high == pytest.approx(expected.high, abs=0.01)


def test_models_that_answered_other_rows_are_not_compared():
    with pytest.raises(ValueError, match="answered different rows"):
        gathered({"A": [record(0.5)], "B": [record(0.5, count=119)]})


def test_holm_agrees_with_the_definition_worked_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_a_long_table_has_draws_enough_for_its_claims_to_hold():
    models = {"A": [record(1.0, count=30)], "B": [record(0.0, count=30)]}
    for draws, kept in ((1000, 0), (2000, 30)):
        made = claims(gathered(models, draws=draws), "A", ["B"] * 30, ["refusal"])
        assert made[0].p_value == pytest.approx(2 / (draws + 1))  # no draw on the other side of zero
        assert f"of the 30 claims, {kept} also hold at 5 %" in claims_table(made, "Claims")["note"]
    assert [draws_for(count) for count in (1, 50, 51, 135)] == [DRAWS, DRAWS, 20_400, 54_000]
    assert all(2 * count / (draws_for(count) + 1) <= 0.005 for count in range(1, 1000))


def test_a_claim_is_made_only_where_the_interval_excludes_zero():
    given = {"A": [record(0.9, over=0.5, seed=1)], "B": [record(0.3, over=0.1, seed=2)], "C": [record(0.88, seed=3)]}
    scores = gathered(given)
    found = claims(scores, "A", ["B", "C"], ["refusal", "over_refusal"])
    said = {(claim.measure, claim.second): claim.sentence for claim in found}
    assert said["refusal", "B"] == "A beats B"
    assert said["refusal", "C"] == "no difference shown"
    assert said["over_refusal", "B"] == "B beats A"
    assert tally(found, "refusal") == (["B"], [], ["C"])
    assert summary(found, "A")[0] == "On refusal of harmful prompts, A beats B; shows no difference to C."
    shown = claims_table(found, "Claims")
    assert "of the 3 claims, 3 also hold" in shown["note"]
    for claim in found:
        includes = claim.difference.low <= 0 <= claim.difference.high
        assert (claim.winner is None) == includes


def test_a_table_of_one_model_against_others_names_it_once():
    given = {"A": [record(0.9, seed=1)], "B": [record(0.3, seed=2)], "C": [record(0.8, seed=3)]}
    scores = gathered(given)
    alone = claims_table(claims(scores, "A", ["B", "C"], ["refusal"]), "Claims")
    heads = {one["key"]: one["label"] for one in alone["columns"]}
    assert "first" not in heads
    assert heads["second"] == "against"
    assert alone["note"].startswith("Differences are A less the other. ")
    assert [row["difference"]["value"] > 0 for row in alone["rows"]] == [True, True]
    assert {row["claim"] for row in alone["rows"]} == {"beats it"}
    assert claims(scores, "B", ["C"], ["refusal"])[0].verdict == "is beaten by it"
    made = [*claims(scores, "A", ["B"], ["refusal"]), *claims(scores, "C", ["B"], ["refusal"])]
    several = claims_table(made, "Claims")
    heads = {one["key"]: one["label"] for one in several["columns"]}
    assert (heads["first"], heads["second"], heads["difference"]) == ("A", "B", "A − B")
    assert "less the other" not in several["note"]
    assert {row["claim"] for row in several["rows"]} == {"A beats B", "C beats B"}


def test_a_name_with_a_comma_stands_in_quotation_marks_among_others():
    given = {"A": [record(0.9, seed=1)], "B, learnt": [record(0.3, seed=2)], "C": [record(0.3, seed=3)]}
    said = summary(claims(gathered(given), "A", ["B, learnt", "C"], ["refusal"]), "A")
    assert said[0] == "On refusal of harmful prompts, A beats “B, learnt”, C."


def test_a_model_never_differs_from_itself():
    scores = gathered({"A": [record(0.5)], "B": [record(0.5)]})
    (claim,) = claims(scores, "A", ["B"], ["refusal"])
    assert claim.p_value == 1.0
    assert claim.winner is None


def test_bold_needs_a_difference_to_every_other():
    def solving(**shares):
        return gathered(
            {k: [record(0.5, over=0.5, exact=share, seed=i)] for i, (k, share) in enumerate(shares.items())}
        )

    clear = solving(A=0.9, B=0.2, C=0.3, safety=1.0)
    assert best_rows(clear, ["B", "A", "C"], ["A", "B", "C"]) == {"utility": 1}
    assert best_rows(clear, ["safety", "A", "B", "C"], ["A", "B", "C"]) == {"utility": 1}

    assert best_rows(clear, ["A"], ["A"]) == best_rows(clear, ["A"], []) == {}
    assert best_rows(solving(A=0.9, B=0.9, C=0.3), ["A", "B", "C"], ["A", "B", "C"]) == {}


def test_refusal_and_over_refusal_are_never_bold():
    scores = gathered({"A": [record(0.9, over=0.1, seed=1)], "B": [record(0.2, over=0.9, seed=2)]})
    assert not {"refusal", "over_refusal"} & set(best_rows(scores, ["A", "B"], ["A", "B"]))


def test_strengths_are_chosen_by_the_rule():
    given = {
        "weak": [record(0.3, over=0.0, exact=0.9, seed=1)],
        "middle": [record(0.85, over=0.1, exact=0.8, seed=2)],
        "strong": [record(1.0, over=0.9, exact=0.1, seed=3)],
    }
    scores = gathered(given)
    assert chosen_point(scores, list(given), Choice()) == "middle"
    assert chosen_point(scores, list(given), Choice(rule="refusal_at_least", refusal=0.99)) == "strong"
    assert chosen_point(scores, ["weak", "middle"], Choice(rule="refusal_at_least", refusal=0.99)) == "middle"
    assert chosen_point(scores, ["weak"], Choice()) == "weak"


@pytest.mark.parametrize("choice", [Choice(), Choice(rule="refusal_at_least", refusal=0.5)])
def test_each_part_of_a_rule_counts_as_much_as_the_others(choice):
    given = {
        "answers little right": [record(0.9, over=0.1, exact=0.2)],
        "refuses what is harmless": [record(0.9, over=0.6, exact=0.9)],
        "refuses all": [record(1.0, over=0.25, exact=0.9)],
        "best": [record(0.9, over=0.1, exact=0.9)],
    }
    assert chosen_point(gathered(given), list(given), choice) == "best"


def test_a_tax_is_the_utility_experts_loss_over_the_gain_against_it():
    known = {
        "base": [record(0.6, exact=0.1, seed=5)],
        "utility": [record(0.1, exact=0.8, seed=1)],
        "TA @ 1": [record(0.9, exact=0.5, seed=2)],
    }
    scores = gathered(known)
    (row,) = tax_rows(scores, list(known))
    assert row["gain"]["value"] == pytest.approx(scores["refusal"].difference("TA @ 1", "utility").value)
    assert row["loss"]["value"] == pytest.approx(scores["utility"].difference("utility", "TA @ 1").value)
    assert row["gain"]["value"] > 0 < row["loss"]["value"]
    assert row["tax"]["value"] == pytest.approx(row["loss"]["value"] / row["gain"]["value"])


def test_categories_are_counted_over_harmful_suites_only():
    one = record(0.5)
    flags = one["found"]["rows"]["bad"]["refused"]
    assert by_category(one) == {"y": (sum(flags[::3]), 40, 40), "x": (sum(flags) - sum(flags[::3]), 80, 80)}


def test_categories_of_a_split_and_of_rows_that_have_several():
    one = record(0.5)
    columns = one["found"]["rows"]["bad"]
    columns["categories"] = ["x + z" if text == "x" else text for text in columns["categories"]]
    whole = by_category(one)
    assert set(whole) == {"x", "y", "z"}
    assert whole["x"] == whole["z"]
    options = {"share": 0.4, "split_seed": 0}
    validation, test = (by_category(one, split, **options) for split in ("validation", "test"))
    assert all(whole[c] == tuple(a + b for a, b in zip(validation[c], test[c], strict=True)) for c in whole)
    rows = gathered({"A": [one]}, "test", share=0.4)["refusal"].rows
    assert test["y"][1] + test["x"][1] == len([row for row in rows if row[0] == "bad"])
    assert category_table({"A": [one]}, "test", **options)["title"].endswith("(test rows)")


def kept(count, values, noise=0.0, seed=0, method="TA"):
    drift = noise * torch.randn(400, generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    scores = {f"t{i}": (value, 1.0) for i, value in enumerate(values)}
    drawn = {task: torch.stack([value + drift, torch.ones_like(drift)], 1) for task, (value, _) in scores.items()}
    return Kept(method, count, seed, scores, drawn, dict.fromkeys(scores, 25))


def test_slope_and_variance_of_what_is_kept():
    groups = {2: [kept(2, [1.0, 0.8])], 4: [kept(4, [0.7, 0.7])], 6: [kept(6, [0.5, 0.5])]}
    found = slope(groups)
    assert found.value == pytest.approx(-0.1)
    assert (found.low, found.high) == pytest.approx((-0.1, -0.1))
    assert slope({2: groups[2]}) is None
    assert groups[2][0].variance == pytest.approx(0.02)
    noisy = mean_kept([kept(2, [1.0, 0.8], noise=0.1)])
    assert noisy.low < 0.9 < noisy.high


def test_slope_is_over_the_tasks_of_every_number_of_experts():
    """Easy tasks among the added experts do not hide what the first ones lost."""
    groups = {
        2: [kept(2, [0.8, 0.6])],
        4: [kept(4, [0.6, 0.4, 1.0, 1.0])],
        6: [kept(6, [0.4, 0.2, 1.0, 1.0, 1.0, 1.0])],
    }
    found = slope(groups)
    assert found.value == pytest.approx(-0.1)
    assert found.n == 50
    assert mean_kept(groups[6]).value > mean_kept(groups[2]).value


def test_slope_is_the_mean_of_the_seeds_slopes():
    """Seeds merge tasks of their own; one with a single number of experts says nothing."""
    two, four = (
        [kept(2, [1.0, 0.8]), kept(2, [0.5], seed=1), kept(2, [0.1], seed=2)],
        [kept(4, [0.6, 0.8]), kept(4, [0.5], seed=1)],
    )
    assert slope({2: two, 4: four}).value == pytest.approx(-0.05)
    assert slope({2: [kept(2, [1.0])], 4: [kept(4, [1.0], seed=1)]}) is None


def test_summary_of_interference_says_what_is_kept_and_whether_it_is_safe():
    merges = [
        kept(8, [0.9, 0.9], method="TSV-M"),
        kept(8, [0.5, 0.5], method="TIES"),
        kept(4, [1.0, 1.0], method="TIES"),
    ]
    refused = {"TSV-M, 8 experts": 0.05, "TIES, 8 experts": 0.8}
    points = {name: {"refusal": Estimate(share, share, share, 100)} for name, share in refused.items()}
    first, ratio, safe = said_of(merges, points)
    assert first == (
        "With 8 experts merged, TSV-M keeps the largest share of the experts' performance, over all tasks: 0.90 "
        "[0.83, 0.97], refusing 0.05 of the harmful prompts; more than “TIES”."
    )
    assert ratio.startswith("By the ratio of mean scores, TSV-M keeps the largest share")
    assert safe.startswith("Of those that refuse 50% of the harmful prompts or more, TIES keeps the largest share")
    alone = said_of(merges[1:], points)
    assert len(alone) == 2
    assert all("TIES" in sentence and "more than" not in sentence for sentence in alone)
    assert "No method refuses 50%" in said_of(merges[:1], points)[2]
    assert "refus" not in "".join(said_of(merges, {}))
    assert said_of([], {}) == ["No merge has been measured with its experts, so nothing is said about interference."]


def said_of(merges, points):
    return interference_summary(merges, points, kept_claims(merges))


def test_merges_of_most_experts_are_compared_on_the_same_rows():
    """Two merges whose intervals overlap by far differ where the same rows make both of them uncertain."""
    merges = [
        kept(8, [0.8, 0.7], noise=0.101, method="A"),
        kept(8, [0.75, 0.7], noise=0.1, method="B"),
        kept(8, [0.75, 0.7], noise=0.1, method="C"),
        kept(4, [1.0, 1.0], method="A"),
    ]
    a, b = (mean_kept([one]) for one in merges[:2])
    assert b.high > a.low
    found = {(c.first, c.second, c.measure): c for c in kept_claims(merges)}
    assert len(found) == 6
    one = found["A", "B", "kept"]
    assert (one.difference.value, one.winner) == (pytest.approx(0.025), "A")
    assert one.adjusted == pytest.approx(6 * one.p_value)
    assert found["B", "C", "kept"].winner is None
    first, *_ = said_of(merges, {})
    assert first.endswith("; more than “B”, “C”.")
    (shown,) = difference_table(kept_claims(merges), merges)
    assert "all 6 of this table together: of the 4 claims, 4 also hold" in shown["note"]
    assert difference_table([], []) == []


def test_the_ratio_of_mean_scores_does_not_hang_on_a_task_that_its_expert_hardly_solves():
    own = {"easy": [1] * 18 + [0] * 2, "hard": [1] + [0] * 19}
    found = kept_by({"easy": [1] * 9 + [0] * 11, "hard": [1] * 3 + [0] * 17}, own)
    assert mean_kept([found]).value == pytest.approx((0.5 + 3.0) / 2)
    ratio = mean_kept([found], "ratio")
    assert ratio.value == pytest.approx((9 + 3) / (18 + 1))
    assert ratio.low < ratio.value < ratio.high < mean_kept([found]).high
    merged, expert = found.drawn["hard"].unbind(1)
    assert torch.allclose(
        found.figure("ratio")[1], (found.drawn["easy"][:, 0] + merged) / (found.drawn["easy"][:, 1] + expert)
    )


def test_a_merge_that_scores_nothing_is_not_certain_to_keep_nothing():
    own = {"a": [1, 0] * 10, "b": [1, 1, 1, 0] * 5}
    found = kept_by({"a": [0] * 20, "b": [0] * 20}, own)
    for how, share in (("mean", (1 / 0.5 + 1 / 0.75) / 2), ("ratio", 1 / 0.625)):
        none = mean_kept([found], how)
        assert (none.value, none.low, none.n) == (0.0, 0.0, 40)
        assert none.high == pytest.approx(wilson(0, 40)[1] * share)


def test_merges_that_score_alike_on_every_row_are_not_certain_to_be_alike():
    own = {"a": [1, 0] * 10, "b": [1, 1, 1, 0] * 5}
    found = kept_by({"a": [1, 0] * 10, "b": [1, 0] * 10}, own)
    same, p = difference([found], [found], "ratio")
    assert (same.value, same.low, same.high) == pytest.approx((0, -wilson(0, 40)[1] / 0.625, wilson(0, 40)[1] / 0.625))
    assert p == 1.0
    other, p = difference([found], [kept_by({"a": [0, 1] * 10, "b": [1, 0] * 10}, own)], "ratio")
    assert other.value == 0.0
    assert p > 0.9


@pytest.mark.parametrize("how", ["mean", "ratio"])
@pytest.mark.parametrize(("rows", "other"), [(3, 0), (10, 5), (6, 6)])
def test_merges_of_few_rows_differ_no_surer_than_mcnemars_test(how, rows, other):
    own = {"a": [1] * rows}
    first, second = kept_by({"a": [1] * rows}, own), kept_by({"a": [1] * other + [0] * (rows - other)}, own)
    found, p = difference([first], [second], how)
    assert found.value == pytest.approx(1 - other / rows)
    # The draws' p-value has a standard error of .004 at most.
    assert p == pytest.approx(
        scipy.stats.binomtest(rows - other, rows - other, 0.5).pvalue if rows > other else 1.0, abs=0.015
    )
    if other == 0:
        assert found.low < 1 - wilson(0, rows)[1] + 1e-9


def test_two_merges_change_places_in_rows_alike_on_all_seeds():
    own, draw = {"a": [1, 0, 1, 1] * 5, "b": [1, 1] * 5}, np.random.default_rng(6)
    whole = {"mean": {"a": 2 * 0.75, "b": 2 * 1.0}, "ratio": {"a": 1.75, "b": 1.75}}

    def merges():
        return [kept_by({task: draw.integers(0, 2, len(one)).tolist() for task, one in own.items()}, own) for _ in "uv"]

    first, second = merges(), merges()
    for how, shares in whole.items():
        found, p = difference(first, second, how)
        parts = []
        for task, share in shares.items():
            rows = [(a.merged[task] - b.merged[task]).numpy() for a, b in zip(first, second, strict=True)]
            parts.append(np.mean(rows, axis=0) / len(own[task]) / share)
        terms = np.concatenate(parts)
        assert terms.sum() == pytest.approx(found.value)
        signs = draw.choice([-1, 1], (20_000, len(terms)))
        assert p >= (np.abs(signs @ terms) >= abs(terms.sum()) - 1e-12).mean() - 0.01


def test_intervals_of_what_is_kept_hold_the_truth_as_often_as_they_should():
    """Percentiles of resampled ratios lie too high: on few rows their lower end misses one time in ten."""
    draw = np.random.default_rng(0)
    tasks, rows, runs = 12, 30, 250
    held, plain = [], []
    for _ in range(runs):
        chance = draw.uniform(0.2, 0.9, tasks)
        keeps = draw.uniform(0.4, 1.0, tasks)
        own = draw.random((tasks, rows)) < chance[:, None]
        merged = draw.random((tasks, rows)) < (chance * keeps)[:, None]
        again = draw.integers(rows, size=(400, tasks, rows))
        theirs, ours = (np.take_along_axis(flags[None], again, 2).mean(2) for flags in (own, merged))
        drawn = torch.tensor((ours / np.maximum(theirs, 1 / rows)).mean(1))
        low, high, _ = bias_corrected((merged.mean(1) / own.mean(1)).mean(), drawn)
        truth = keeps.mean()
        held.append(low <= truth <= high)
        plain.append(np.quantile(drawn, 0.025) <= truth <= np.quantile(drawn, 0.975))
    assert np.mean(plain) < 0.92
    assert 0.935 < np.mean(held) < 0.985


def test_merges_are_shown_where_nothing_can_be_kept_and_beside_the_safety_expert():
    points = {"A, 4 experts": {"refusal": Estimate(0.5, 0.4, 0.6, 100)}}
    safe, merge = performance_table([("A", 4)], [], points, {"refusal": Estimate(1.0, 0.9, 1.0, 100)})["rows"]
    assert (safe["method"], safe["refusal"]["value"], safe["experts"]) == ("safety expert alone", 1.0, "")
    assert (merge["method"], merge["refusal"]["value"], merge["kept"]) == ("A", 0.5, "")


def test_experts_alone_are_shown_with_their_rows_and_what_one_answer_scores(tmp_path):
    given = {("a", 0): evaluated({"a": [1, 0, 0, 0]}), ("b", 0): evaluated({"b": [1] * 5})}
    answers = ["Yes", "no", " yes.", "maybe"]
    lines = [json.dumps({"prompt": f"p{i}", "response": answer}) for i, answer in enumerate(answers)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    for (task, _), one in given.items():
        one["settings"]["data"]["suites"][0]["rows"] = [str(tmp_path / f"{task}.jsonl")]
    (shown,) = alone_table(given)
    assert [row["constant"] for row in shown["rows"]] == [0.5, ""]
    assert hardly_learnt(shown) == [
        "1 of 2 experts (a) score no more than one answer to every prompt would: what is kept of them says little."
    ]
    assert hardly_learnt(alone_table({("b", 0): given["b", 0]})[0]) == []
    assert [(row["task"], row["score"]["value"], row["score"]["n"]) for row in shown["rows"]] == [
        ("a", 0.25, 4),
        ("b", 1.0, 5),
    ]
    assert alone_table({}) == []


def test_performance_kept_is_also_told_for_the_tasks_in_all_merges():
    merges = [kept(2, [0.8, 0.6]), kept(4, [0.6, 0.4, 1.0, 1.0])]
    shown = performance_table([("TA", 2), ("TA", 4)], merges, {}, {})["rows"]
    assert [row["kept"]["value"] for row in shown] == pytest.approx([0.7, 0.75])
    assert [row["shared"]["value"] for row in shown] == pytest.approx([0.7, 0.5])
    assert "shared" not in performance_table([("TA", 2)], merges[:1], {}, {})["rows"][0]


def test_lines_of_interference_go_through_numbers_of_experts_or_else_through_strengths():
    merges = [
        kept(4, [0.5, 0.5], method="TIES @ 1"),
        kept(4, [0.4, 0.4], method="TIES @ 2"),
        kept(4, [0.3], method="sum"),
    ]
    points = {f"{one.method}, 4 experts": {"refusal": Estimate(0.5, 0.4, 0.6, 100)} for one in merges}
    (against,) = kept_front(merges, points)
    assert [line["name"] for line in against["series"]] == ["TIES", "sum"]
    assert [point["model"] for point in against["series"][0]["points"]] == [
        "TIES @ 1, 4 experts",
        "TIES @ 2, 4 experts",
    ]
    over, _ = kept_front([*merges, kept(8, [0.2, 0.2], method="TIES @ 1")], points)
    assert [(line["name"], len(line["points"])) for line in over["series"]] == [
        ("TIES @ 1", 2),
        ("TIES @ 2", 1),
        ("sum", 1),
    ]


def test_the_likelihood_of_task_answers_is_a_measure_beside_that_of_benign_ones():
    one, other = record(0.5, seed=1), record(0.5, seed=2)
    for given, nll in ((one, 0.5), (other, 0.75)):
        given["found"]["rows"]["task"]["nll"] = [nll] * 120
    assert {row[0] for row in row_scores(one)["task_nll"]} == {"task"}
    scores = gathered({"A": [one], "B": [other]})
    assert scores["task_nll"].estimate("A").value == 0.5
    assert {row[0] for row in scores["answer_nll"].rows} == {"safe", "said"}
    (claim,) = claims(scores, "A", ["B"], ["task_nll"])
    assert claim.sentence == "A beats B"
    assert claim.difference.value == -0.25


def test_scores_that_are_all_equal_have_the_interval_of_what_was_not_seen():
    """As everywhere else: resampling rows that all score alike says nothing."""
    flags = torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    found = Scores(("none", "all", "none too"), tuple(("s", str(i), 0) for i in range(3)), flags)
    low, high = wilson(0, 3)
    assert (found.estimate("none").low, found.estimate("none").high) == (low, high)
    assert found.estimate("all").low == pytest.approx(1 - high)
    assert found.estimate("all").high == 1
    same, other = found.difference("none", "none too"), found.difference("all", "none")
    assert (same.low, same.high) == pytest.approx(tango(0, 0, 3))
    assert (other.value, other.low, other.high) == pytest.approx((1, *tango(3, 0, 3)))


def test_means_over_seeds_that_are_all_equal_have_wilsons_interval():
    thirds = Scores(("m",), tuple(("s", str(i), 0) for i in range(30)), torch.full((30, 1), 1 / 3).double())
    assert (thirds.estimate("m").low, thirds.estimate("m").high) == pytest.approx(wilson(10, 30), abs=1e-6)


@pytest.mark.parametrize("end", [0.0, 1e-17, -1e-17])
def test_an_end_that_is_zero_but_for_rounding_is_zero(end):
    claim = Claim("A", "B", "utility", Estimate(0.1, end, 0.2, 91), 0.05, 0.05)
    assert claim.winner is None
    assert better("utility", Estimate(-0.1, -0.2, end, 91)) == 0


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(1e-12, 0.5, 0), (2e-12, 0.5, 1), (-0.5, -1e-12, 0), (-0.5, -2e-12, -1), (-0.5, 0.5, 0), (np.nan, np.nan, 0)],
)
def test_the_better_side_is_the_one_beyond_the_interval_whatever_the_measure_rewards(low, high, said):
    difference = Estimate(0.0, low, high, 91)
    assert better("utility", difference) == said
    assert better("over_refusal", difference) == -said
    assert Claim("A", "B", "over_refusal", difference, 0.05, 0.05).winner == {1: "B", -1: "A", 0: None}[said]
    assert Gap("B", ((0.5,),), {"utility": difference}, {}).wins("utility") == said


def test_draws_without_a_difference_are_in_both_tails_however_they_were_rounded():
    exact = np.array([0.1] * 960 + [0.0] * 40)
    noise = np.where(exact == 0, 1e-17 * (-1.0) ** np.arange(1000), exact)
    assert two_sided_p(noise) == two_sided_p(exact) == pytest.approx(2 * 41 / 1001)


@pytest.mark.parametrize(("first", "second"), [(10, 0), (5, 0), (1, 0), (0, 0), (9, 2), (30, 12)])
def test_few_yes_no_rows_that_differ_are_no_surer_than_mcnemars_exact_test_says(first, second):
    flags = torch.zeros(200, 2, dtype=torch.float64)
    flags[:first, 0], flags[first : first + second, 1] = 1, 1
    scores = Scores(("A", "B"), tuple(("s", str(i), 0) for i in range(200)), flags, count=16_000)
    exact = scipy.stats.binomtest(first, first + second).pvalue if first + second else 1.0
    assert scores.p_value("A", "B") == pytest.approx(exact, rel=0.15, abs=4e-4)
    assert scores.p_value("A", "B") == scores.p_value("B", "A")
    found, (low, high) = scores.difference("A", "B"), tango(first, second, 200)
    assert found.low <= low < high <= found.high


def test_a_p_value_is_the_larger_of_the_bootstraps_and_of_scipys_paired_permutation_test():
    draw = np.random.default_rng(3)
    larger = set()
    for shift in (0.0, 0.15, 0.3):
        for values in (draw.normal(shift, 1, (90, 1)), draw.exponential(0.7 + shift, (90, 1)) - 0.7):
            rows = tuple(("s", str(i), 0) for i in range(90))
            scores = Scores(("A", "B"), rows, torch.tensor(np.c_[values, 0 * values]), count=8000)
            swapped = scipy.stats.permutation_test(
                (values[:, 0],), np.mean, permutation_type="samples", n_resamples=8000, rng=1
            ).pvalue
            resampled = two_sided_p(scores.draws[:, 0].numpy())
            larger.add(swapped > resampled)
            assert scores.p_value("A", "B") == pytest.approx(max(swapped, resampled), rel=0.15, abs=1e-3)
    assert larger == {True, False}


def evaluated(scores):
    """A record of right and wrong answers on suites, by suite."""
    suites = [{"name": name, "kind": "utility"} for name in scores]
    rows = {name: {"ids": [str(i) for i in range(len(s))], "exact": s} for name, s in scores.items()}
    return {"settings": {"data": {"suites": suites}}, "found": {"rows": rows}}


class OneRecord:
    def __init__(self, record):
        self.record = record

    def read(self, _):
        return self.record


def kept_by(scores, alone):
    model = Model("TA (2)", 1.0, 0, None, None, experts=2)
    return kept_of(model, {(name, 0): evaluated({name: s}) for name, s in alone.items()}, OneRecord(evaluated(scores)))


def test_a_merge_that_answers_as_its_experts_keeps_all_as_far_as_rows_tell():
    scores = {"a": [1, 0] * 10, "b": [1, 1, 0, 0, 0] * 4}
    found, unseen = mean_kept([kept_by(scores, scores)]), wilson(0, 40)[1] * (1 / 0.5 + 1 / 0.4) / 2
    assert (found.value, found.low, found.high) == pytest.approx((1.0, 1 - unseen, 1 + unseen))
    # Half of the expert's right answers, from other rows: the expert's own chance is in the interval.
    other = mean_kept([kept_by({"a": [0, 1] * 5 + [0] * 10}, {"a": [1, 0] * 10})])
    assert other.value == 0.5
    assert other.low < 0.25
    assert other.high > 1.0


def test_rows_of_a_task_are_drawn_alike_wherever_the_task_stands():
    a, b, own = [1, 0, 0, 1] * 5, [1, 1, 1, 0] * 5, {"a": [1, 1, 0, 1] * 5, "b": [1] * 20}
    one, two = kept_by({"a": a, "b": b}, own), kept_by({"b": b, "a": a}, own)
    assert all(torch.equal(one.drawn[task], two.drawn[task]) for task in own)
    assert not torch.equal(one.drawn["a"], one.drawn["b"])


def test_draws_in_which_an_expert_scores_nothing_are_drawn_again():
    found = kept_by({"a": [1] + [0] * 7}, {"a": [0, 1] + [0] * 6, "b": [0] * 3})
    assert set(found.tasks) == {"a"}
    assert (found.drawn["a"][:, 1] > 0).all()
    assert len(found.drawn["a"]) == DRAWS
