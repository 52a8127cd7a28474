"""Which rows a report shows: strengths are chosen on validation rows, and what is claimed is counted on test rows."""

import json

import pytest

from src.errors import InputError
from src.experiments.ablations import Ablations
from src.experiments.comparison import Choice, Comparison
from src.experiments.rows import by_suite
from src.experiments.scores import gathered, in_split
from src.experiments.settings import MethodSpec, Strengths
from src.experiments.study import Plan
from src.merge.combinations.task_arithmetic import TaskArithmetic
from tests.known_answers import COLUMNS, model
from tests.test_experiments_statistics import record

COUNT, CHOICE = 60, Choice(share=0.4, seed=3)
SUITES = {"bad": "harmful", "safe": "borderline", "task": "utility"}
PARTS = {
    (suite, split): [
        one
        for one in (f"{suite}{i:03d}" for i in range(COUNT))
        if in_split((suite, one, 0), split, share=CHOICE.share, seed=CHOICE.seed)
    ]
    for suite in SUITES
    for split in ("validation", "test")
}
MIDDLE, END = "TA @ 0.5", "TA @ 1.0"
# Shares of flags on validation rows and on test rows; the strength that refuses most is another one on each.
SHARES = {
    "bad": {"utility @ None": (0.6, 0.2)} | {f"{m} @ 0.5": (1.0, 0.45) for m in ("TA", "other")},
    "safe": {f"other @ {strength}": (0.0, 1.0) for strength in (0.5, 1.0)},
    "task": {f"{m} @ {strength}": (0.0, 0.5) for m in ("TA", "other") for strength in (0.5, 1.0)},
}
ELSE = {"bad": (0.0, 0.9), "safe": (0.0, 0.0), "task": (0.0, 1.0)}
METHODS = [
    MethodSpec(name, method=TaskArithmetic(), strength=Strengths("alpha", [0.5, 1.0])) for name in ("TA", "other")
]
PLAN = Plan(
    [
        model(name, strength, seed)
        for seed in (0, 1)
        for name, strength in [
            *((one, None) for one in ("base", "utility", "safety")),
            *((one.name, strength) for one in METHODS for strength in one.strength.values),
        ]
    ]
)


def flagged(suite, name, split):
    """The ids of a split that a model has a flag on."""
    share = SHARES[suite].get(name, ELSE[suite])[("validation", "test").index(split)]
    part = PARTS[suite, split]
    return part[: round(share * len(part))]


def shown(suite, name, split):
    """The share of flags on a split's rows."""
    return pytest.approx(len(flagged(suite, name, split)) / len(PARTS[suite, split]))


class Divided:
    """A store of answers that differ between validation and test rows."""

    def has_result(self, cell):
        return True

    def read(self, cell):
        name, rows = cell.label.rpartition(", seed")[0], {}
        for suite, kind in SUITES.items():
            own = {*flagged(suite, name, "validation"), *flagged(suite, name, "test")}
            ids = [f"{suite}{i:03d}" for i in range(COUNT)]
            rows[suite] = {"ids": ids, "categories": ["x"] * COUNT, COLUMNS[kind]: [int(one in own) for one in ids]}
        suites = [{"name": name, "kind": kind} for name, kind in SUITES.items()]
        return {"settings": {"data": {"suites": suites}}, "found": {"rows": rows, "examples": {}}}


def numbers(rows):
    """All measured numbers of a table's rows or a line's points."""
    return [cell for row in rows for cell in row.values() if isinstance(cell, dict)]


def counts(split):
    """Numbers of rows of the suites in a split."""
    return {len(PARTS[suite, split]) for suite in SUITES}


def measured(document):
    """Tables with measured numbers, by title."""
    return {table["title"]: table["rows"] for table in document["tables"] if numbers(table["rows"])}


def points_of(front):
    return {point["model"]: point for line in front["series"] for point in line["points"]}


@pytest.fixture(scope="module")
def compared():
    return Comparison(METHODS, "TA", CHOICE).report(PLAN, Divided())


def test_strengths_are_chosen_on_validation_rows_and_reported_on_test_rows(compared):
    rows = {row["model"]: row for row in compared["tables"][0]["rows"]}
    assert list(rows) == ["base", "utility", "safety", MIDDLE, "other @ 0.5"]
    assert rows[MIDDLE]["refusal"]["value"] == shown("bad", MIDDLE, "test")
    assert rows[MIDDLE]["utility"]["value"] == shown("task", MIDDLE, "test")
    assert rows["other @ 0.5"]["over_refusal"]["value"] == 1.0


def test_a_front_shows_the_first_of_its_measures_across_and_test_rows(compared):
    front = compared["fronts"][0]
    assert front["title"] == "Safety against utility (test rows)"
    assert front["x"] == {"measure": "refusal", "label": "refusal of harmful prompts", "better": "higher"}
    assert front["y"] == {"measure": "utility", "label": "utility", "better": "higher"}
    points = points_of(front)
    for shown_as, name in ((MIDDLE, MIDDLE), ("TA @ 1", END)):
        assert points[shown_as]["x"]["value"] == shown("bad", name, "test")
        assert points[shown_as]["y"]["value"] == shown("task", name, "test")
    for one in compared["fronts"]:
        assert {cell["n"] for cell in numbers(points_of(one).values())} <= counts("test")


def test_every_table_of_a_comparison_counts_test_rows_alone(compared):
    assert counts("test").isdisjoint(counts("validation") | {COUNT})
    tables = measured(compared)
    assert set(tables) == {
        "Chosen on validation rows, measured on test rows",
        f"{MIDDLE} against the others (test rows)",
        "TA at equal refusal (test rows)",
        "TA at equal refusal, over-refusal level by level (test rows)",
        "TA at equal refusal, seed by seed (test rows)",
        "TA at equal refusal, paths of means over seeds (test rows)",
        "Safety tax",
        "Seed by seed (test rows)",
        "Refusal by category of harm (test rows)",
    }
    for title, rows in tables.items():
        assert {cell["n"] for cell in numbers(rows)} <= counts("test"), title
    titles = (
        "TA at equal refusal",
        "TA at equal refusal, seed by seed",
        "TA at equal refusal, paths of means over seeds",
    )
    equal, apart, pooled = (tables[f"{title} (test rows)"] for title in titles)
    assert [row["seed"] for row in apart] == ["0", "1"]
    assert [row["over_refusal"]["value"] for row in (*equal, *apart, *pooled)] == pytest.approx([-1.0] * 4)
    (shares,) = tables["TA at equal refusal, over-refusal level by level (test rows)"]
    assert {cell["value"] for cell in numbers([shares])} == {0.0}
    for title in ("Seed by seed (test rows)", "Refusal by category of harm (test rows)"):
        found = [row.get("refusal", row.get("category x")) for row in tables[title] if row["model"] == MIDDLE]
        assert found
        assert all(one["value"] == shown("bad", MIDDLE, "test") for one in found)


def test_ablations_show_validation_rows_alone():
    found = Ablations(METHODS[0], [], CHOICE, METHODS[1:]).report(PLAN, Divided())
    tables = measured(found)
    assert set(tables) == {
        "Variants (validation rows)",
        "The reference against its variants (validation rows)",
        *(
            f"{ours} at equal refusal{what} (validation rows)"
            for ours in ("TA", "other")
            for what in ("", ", seed by seed", ", paths of means over seeds")
        ),
    }
    assert found["summary"][0].startswith("These are validation rows")
    (refusal,) = (row["refusal"]["value"] for row in tables["Variants (validation rows)"] if row["model"] == MIDDLE)
    assert refusal == 1.0
    points = points_of(found["fronts"][0])
    assert (points[MIDDLE]["x"]["value"], points["TA @ 1"]["x"]["value"]) == (1.0, 0.0)
    for rows in (*tables.values(), *(points_of(front).values() for front in found["fronts"])):
        assert {cell["n"] for cell in numbers(rows)} <= counts("validation")


def test_bold_marks_the_row_of_the_better_method_among_references():
    refused = {"base": 0.1, "utility": 0.1, "safety": 1.0, "TA": 0.9, "other": 0.2}
    scores = gathered({name: [record(share, exact=share, seed=i)] for i, (name, share) in enumerate(refused.items())})
    table = Comparison(METHODS, "TA")._chosen_table(scores, {name: name for name in refused})
    assert [row["model"] for row in table["rows"]] == list(refused)
    assert table["best"] == {"utility": 3}


def test_a_cell_keeps_whole_flags_short_hashes_and_likelihoods_per_token(tmp_path):
    row = {"prompt_hash": "0123456789abcdef", "category": "x", "refused": True, "nll": 6.0, "tokens": 4}
    other = {"prompt_hash": "f" * 16, "category": "", "refused": False, "nll": 1.0, "tokens": 3}
    (tmp_path / "bad.jsonl").write_text(f"{json.dumps(row)}\n{json.dumps(other)}\n")
    found = by_suite(tmp_path, ["bad"])["rows"]["bad"]
    kept = {"ids": ["0123456789ab", "f" * 12], "categories": ["x", ""], "refused": [1, 0], "nll": [1.5, 0.333333]}
    assert json.dumps(found) == json.dumps(kept)  # true is not 1 there


def test_an_evaluation_that_left_no_answers_is_one_line(tmp_path):
    (tmp_path / "bad.jsonl").write_text("")
    with pytest.raises(InputError, match=r"bad\.jsonl: no rows"):
        by_suite(tmp_path, ["bad"])
