"""Differences between models: to the first, to a named one, of all pairs."""

import json
import math

import numpy as np
import pytest

from src.adapters.peft_files import write_adapter
from src.cli import main
from src.metrics.agreement import Pairs, mcnemar
from src.models.grading import compared
from tests.evaluations import answers, choice_rows, evaluate, flags, metrics, write_jsonl
from tests.tiny import make_model, random_pairs, write_rows


@pytest.fixture
def adapters(base, tmp_path):
    """Two adapters that are strong enough to change choices."""
    model, found = make_model(), {}
    for seed, name in enumerate(("utility", "safety")):
        found[name] = tmp_path / name
        pairs = random_pairs(model, 4, seed + 5, scale=1.0)
        write_adapter(found[name], pairs, base=str(base), manifest={}, seen=frozenset(), card="card\n")
    return found


@pytest.fixture
def three(base, adapters, tmp_path):
    """A choice suite, and the option that names two adapters beside the base."""
    suite = {
        "name": "mc",
        "kind": "choice",
        "rows": str(write_jsonl(tmp_path / "mc.jsonl", choice_rows(12))),
        "style": "question",
    }
    return [suite], ["--model.adapters", json.dumps([str(adapters["utility"]), str(adapters["safety"])])]


def differences(folder):
    """Model to those that it is compared with, and to the difference of accuracy."""
    found = metrics(folder)
    return [{other: suites["mc"]["accuracy"]["value"] for other, suites in model["against"].items()} for model in found]


def test_differences_are_to_the_first_to_a_named_one_or_of_all_pairs(base, adapters, tmp_path, three, capsys):
    suites, models = three
    utility, safety = (str(adapters[name]) for name in ("utility", "safety"))
    evaluate(base, tmp_path, suites, *models)
    value = {one["name"]: one["suites"]["mc"]["accuracy"]["value"] for one in metrics(tmp_path / "out")}
    assert len(set(value.values())) > 1
    gap = {(a, b): pytest.approx(value[a] - value[b]) for a in value for b in value}
    assert differences(tmp_path / "out") == [{}, {"base": gap[utility, "base"]}, {"base": gap[safety, "base"]}]
    again = [*models, "--overwrite", "true"]
    evaluate(base, tmp_path, suites, *again, "--model.baseline", utility)
    expected = [{utility: gap["base", utility]}, {}, {utility: gap[safety, utility]}]
    assert differences(tmp_path / "out") == expected
    one = metrics(tmp_path / "out")[2]["against"][utility]["mc"]["accuracy"]
    hits = {m: [row["correct"] for row in answers(tmp_path / "out", "mc", m.lstrip("/"))] for m in (utility, safety)}
    cells = [(a, b) for a, b in zip(hits[safety], hits[utility], strict=True)]
    counts = Pairs(*(cells.count(cell) for cell in ((True, True), (True, False), (False, True), (False, False))))
    assert one["mcnemar_p"] == mcnemar(counts)
    assert one["n"] == 12
    assert one["interval"][0] <= one["value"] <= one["interval"][1]
    evaluate(base, tmp_path, suites, *again, "--model.all_pairs", "true")
    expected = [{}, {"base": gap[utility, "base"]}, {"base": gap[safety, "base"], utility: gap[safety, utility]}]
    assert differences(tmp_path / "out") == expected
    capsys.readouterr()
    assert main(flags(base, tmp_path, suites, tmp_path / "x", *models, "--model.baseline", "nobody")) == 2
    assert f"model.baseline: nobody is not evaluated; expected one of base, {utility}" in capsys.readouterr().err


def test_programs_have_differences_for_every_k_and_a_test_where_one_sample_is_yes_or_no():
    ours, theirs = [{"pass@1": 1.0}, {"pass@1": 0.0}, {"pass@1": 1.0}], [{"pass@1": 0.0}] * 3
    found = compared(ours, theirs)["pass@1"]
    assert (found["value"], found["n"], found["mcnemar_p"]) == (pytest.approx(2 / 3), 3, mcnemar(Pairs(0, 2, 0, 1)))
    found = compared([{"pass@5": 1.0, "pass@1": 0.2}] * 2, [{"pass@5": 0.5, "pass@1": 0.1}] * 2)
    assert set(found) == {"pass@5", "pass@1"}
    assert found["pass@5"]["value"] == 0.5
    assert "mcnemar_p" not in found["pass@5"]
    assert "mcnemar_p" not in compared([{"rouge_l": 1.0}], [{"rouge_l": 0.0}])["rouge_l"]


def test_perplexities_differ_by_a_paired_bootstrap_over_rows():
    draw = np.random.default_rng(0)
    tokens = draw.integers(1, 9, 50)
    second = tokens * draw.uniform(0.5, 3.0, 50)
    first = second + 0.1 * tokens  # every token costs 0.1 nats more
    rows = [
        [{"nll": x, "tokens": t} for x, t in zip(nll.tolist(), tokens.tolist(), strict=True)] for nll in (first, second)
    ]
    found = compared(*rows)["perplexity"]
    whole = [math.exp(nll.sum() / tokens.sum()) for nll in (first, second)]
    assert found["value"] == pytest.approx(whole[0] - whole[1])
    picks = draw.integers(50, size=(4000, 50))
    means = [np.exp(nll[picks].sum(1) / tokens[picks].sum(1)) for nll in (first, second)]
    assert found["interval"] == pytest.approx(np.quantile(means[0] - means[1], [0.025, 0.975]), rel=0.05)
    assert found["n"] == 50
    assert compared([{"nll": math.inf, "tokens": 2}], [{"nll": 1.0, "tokens": 2}]) == {
        "perplexity": {"value": None, "n": 1}
    }
    assert compared([{"nll": 2.0, "tokens": 2}], [{"nll": 2.0, "tokens": 2}]) == {"perplexity": {"value": 0.0, "n": 1}}


def test_perplexity_has_a_table_by_category(base, tmp_path):
    suite = {
        "name": "s",
        "kind": "utility",
        "rows": str(write_rows(tmp_path / "s.jsonl", 7, what="s")),
        "generate": False,
    }
    found = evaluate(base, tmp_path, [suite])["s"]["perplexity"]
    each, rows = found["categories"], answers(tmp_path / "out", "s")
    assert {name: one["rows"] for name, one in each.items()} == {"even": 4, "odd": 3}
    assert sum(one["n"] for one in each.values()) == found["n"]
    even = [row for row in rows if row["category"] == "even"]
    mean = sum(row["nll"] for row in even) / sum(row["tokens"] for row in even)
    assert each["even"]["value"] == pytest.approx(math.exp(mean))
    assert len(each["even"]["interval"]) == 2
