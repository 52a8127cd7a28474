"""Methods at equal refusal on each seed's own paths, against curves that are known."""

import pytest

from src.experiments.equal_refusal import gaps
from src.experiments.equal_refusal_seeds import MEAN, seed_gaps, seed_gaps_table
from src.experiments.scores import gathered

ROWS = 400


def answered(refusal, over):
    """A record that refuses these shares of harmful and of borderline prompts, in an order that is always the same."""
    rows = {
        name: {"ids": [f"{name}{i:04d}" for i in range(ROWS)], "categories": [""] * ROWS}
        for name in ("harmful", "borderline")
    }
    for name, share in (("harmful", refusal), ("borderline", over)):
        rows[name]["refused"] = [int(i < round(share * ROWS)) for i in range(ROWS)]
    suites = [{"name": name, "kind": name} for name in rows]
    return {"settings": {"data": {"suites": suites}}, "found": {"rows": rows}}


def on(curve, *refusals):
    """Records of one model on several seeds, each on the curve."""
    return [answered(refusal, curve(refusal)) for refusal in refusals]


PLAIN = {
    # Equal strengths lie at one refusal for our method, far apart for the other one.
    "ours @ 1": (0.5, 0.5),
    "ours @ 2": (0.9, 0.9),
    "other @ 1": (0.5, 0.1),
    "other @ 2": (0.7, 0.3),
    "other @ 3": (0.9, 0.5),
    "other @ 4": (1.0, 0.9),
}
CURVES = {name: [one for one in PLAIN if one.startswith(name)] for name in ("ours", "other")}


def straight(refusal):
    return 0.8 * refusal


def bent(refusal):
    return 0.2 * refusal if refusal <= 0.5 else 0.1 + 1.6 * (refusal - 0.5)


def test_on_one_straight_line_methods_do_not_differ_seed_by_seed_nor_pooled():
    known = {name: on(straight, *refusals) for name, refusals in PLAIN.items()}
    found = seed_gaps(known, [3, 4], CURVES, "ours")
    assert [(other, seed) for other, seed, *_ in found] == [("other", "3"), ("other", "4"), ("other", MEAN)]
    for *_, differences in found:
        assert differences["over_refusal"].value == pytest.approx(0.0, abs=1e-9)
    (pooled,) = gaps(gathered(known), CURVES, "ours")
    assert pooled.differences["over_refusal"].value == pytest.approx(0.0, abs=1e-9)


def test_methods_on_one_bent_curve_do_not_differ_seed_by_seed_though_pooled_paths_do():
    """The very case: both methods lie on one curve, and means over seeds of scattered points lie above it."""
    known = {name: on(bent, *refusals) for name, refusals in PLAIN.items()}
    found = seed_gaps(known, [3, 4], CURVES, "ours")
    levels = {seed: (reached[0], reached[-1]) for _, seed, reached, _ in found if reached}
    assert levels == {"3": (0.5, pytest.approx(0.9)), "4": (0.5, pytest.approx(0.9))}
    assert all(abs(differences["over_refusal"].value) < 1e-9 for *_, differences in found)
    (pooled,) = gaps(gathered(known), CURVES, "ours")
    assert pooled.differences["over_refusal"].value < -0.02


def test_the_mean_of_the_seeds_is_that_of_their_differences_and_of_those_alone_that_meet():
    below = {name: on(straight, *refusals) for name, refusals in PLAIN.items()}
    # On seed 5 both methods lie apart by .1, on seed 6 by .2; on seed 7 the other one never refuses.
    for name in CURVES["ours"]:
        first, _ = PLAIN[name]
        below[name] = [answered(first, straight(first) - less) for less in (0.1, 0.2, 0.0)]
    for name in CURVES["other"]:
        first, _ = PLAIN[name]
        below[name] = [answered(first, straight(first))] * 2 + [answered(0.0, 0.0)]
    found = {
        seed: (reached, differences) for _, seed, reached, differences in seed_gaps(below, [5, 6, 7], CURVES, "ours")
    }
    assert found["5"][1]["over_refusal"].value == pytest.approx(-0.1, abs=2e-3)
    assert found["6"][1]["over_refusal"].value == pytest.approx(-0.2, abs=2e-3)
    assert found["7"] == ((), {})
    mean = found[MEAN][1]["over_refusal"]
    assert mean.value == pytest.approx((found["5"][1]["over_refusal"].value + found["6"][1]["over_refusal"].value) / 2)
    assert mean.low < mean.value < mean.high < 0
    (table,) = seed_gaps_table(seed_gaps(below, [5, 6, 7], CURVES, "ours"), "ours", "all rows")
    assert [row["range"] for row in table["rows"]] == ["0.50 – 0.90", "0.50 – 0.90", "no common range", ""]
    assert table["rows"][2]["over_refusal"] == ""


def test_one_seed_or_an_unknown_method_has_no_such_table():
    known = {name: on(straight, *refusals)[:1] for name, refusals in PLAIN.items()}
    assert seed_gaps(known, [3], CURVES, "ours") == []
    assert seed_gaps({name: on(straight, *refusals) for name, refusals in PLAIN.items()}, [3, 4], CURVES, "x") == []
    assert seed_gaps_table([], "ours", "all rows") == []


def test_a_seed_without_a_measure_that_meets_nobody_ends_nothing():
    """Its likelihoods were infinite, so they are left out of it; the other seeds have them."""

    def with_nll(found, value):
        for rows in found["found"]["rows"].values():
            rows["nll"] = [value] * ROWS
        return found

    known = {}
    for name in CURVES["ours"] + CURVES["other"]:
        first = PLAIN[name][0]
        lost = answered(0.0 if name.startswith("other") else first, straight(first))
        known[name] = [with_nll(lost, float("inf")), *(with_nll(answered(first, straight(first)), 2.0) for _ in "ab")]
    found = seed_gaps(known, [1, 2, 3], CURVES, "ours")
    (mean,) = (differences for _, seed, _, differences in found if seed == MEAN)
    assert mean["answer_nll"].value == 0.0
    assert found[0][1:3] == ("1", ())
