"""Methods at equal refusal on each seed's own paths, against curves that are known."""

import pytest

from src.experiments.equal_refusal import gaps
from src.experiments.equal_refusal_tables import equal_refusal_tables, sentences
from src.experiments.scores import gathered, seed_by_seed

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


def compared(known, seeds):
    """Ours against the other method, seed by seed."""
    (gap,) = gaps(seed_by_seed(known, seeds), CURVES, "ours")
    return gap


def test_on_one_straight_line_methods_do_not_differ_seed_by_seed_nor_pooled():
    known = {name: on(straight, *refusals) for name, refusals in PLAIN.items()}
    found = compared(known, 2)
    for differences in (found.differences, *found.each):
        assert differences["over_refusal"].value == pytest.approx(0.0, abs=1e-9)
    (pooled,) = gaps([gathered(known)], CURVES, "ours")
    assert pooled.differences["over_refusal"].value == pytest.approx(0.0, abs=1e-9)


def test_methods_on_one_bent_curve_do_not_differ_though_pooled_paths_do():
    """The very case: both methods lie on one curve, and means over seeds of scattered points lie above it."""
    known = {name: on(bent, *refusals) for name, refusals in PLAIN.items()}
    found = compared(known, 2)
    assert [(levels[0], levels[-1]) for levels in found.levels] == [(0.5, pytest.approx(0.9))] * 2
    assert all(abs(one["over_refusal"].value) < 1e-9 for one in (found.differences, *found.each))
    assert all(share.value == pytest.approx(1.0) for share in found.shares.values())
    (pooled,) = gaps([gathered(known)], CURVES, "ours")
    assert pooled.differences["over_refusal"].high < 0
    assert "better than that of other" in sentences([pooled], "ours")[0]
    (said,) = sentences([found], "ours")
    assert said.startswith("At equal refusal, the over-refusal of ours is not shown to differ from that of other (+0.0")
    main, shares, each, last = equal_refusal_tables([found], [pooled], "ours", [3, 4], "all rows")
    assert main["rows"][0]["over_refusal"]["value"] == pytest.approx(0.0, abs=1e-9)
    assert shares["rows"][0]["0.50"]["value"] == pytest.approx(1.0)
    assert [row["seed"] for row in each["rows"]] == ["3", "4"]
    assert last["rows"][0]["over_refusal"]["high"] < 0
    assert "over_refusal_holm" not in last["rows"][0]


def test_the_mean_of_the_seeds_is_that_of_their_differences_and_of_those_alone_that_meet():
    below = {name: on(straight, *refusals) for name, refusals in PLAIN.items()}
    # On the first seed both methods lie apart by .1, on the second by .2; on the third the other one never refuses.
    for name in CURVES["ours"]:
        first, _ = PLAIN[name]
        below[name] = [answered(first, straight(first) - less) for less in (0.1, 0.2, 0.0)]
    for name in CURVES["other"]:
        first, _ = PLAIN[name]
        below[name] = [answered(first, straight(first))] * 2 + [answered(0.0, 0.0)]
    found = compared(below, 3)
    one, two, three = found.each
    assert one["over_refusal"].value == pytest.approx(-0.1, abs=2e-3)
    assert two["over_refusal"].value == pytest.approx(-0.2, abs=2e-3)
    assert (found.levels[2], three, found.met) == ((), {}, 2)
    mean = found.differences["over_refusal"]
    assert mean.value == pytest.approx((one["over_refusal"].value + two["over_refusal"].value) / 2)
    assert mean.low < mean.value < mean.high < 0
    main, _, each, _ = equal_refusal_tables([found], [], "ours", [5, 6, 7], "all rows")
    assert (main["rows"][0]["range"], main["rows"][0]["seeds"]) == ("0.50 – 0.90", 2)
    assert [row["range"] for row in each["rows"]] == ["0.50 – 0.90", "0.50 – 0.90", "no common range"]
    assert each["rows"][2]["over_refusal"] == ""
    assert "2 of 3 seeds" in sentences([found], "ours")[0]


def test_one_seed_has_no_tables_of_several():
    known = {name: on(straight, *refusals)[:1] for name, refusals in PLAIN.items()}
    main, shares = equal_refusal_tables([compared(known, 1)], [], "ours", [3], "all rows")
    assert "seed" not in main["note"]
    assert "seeds" not in [column["key"] for column in main["columns"]]
    assert "level by level" in shares["title"]


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
    found = compared(known, 3)
    assert found.differences["answer_nll"].value == 0.0
    assert (found.levels[0], found.each[0]) == ((), {})
