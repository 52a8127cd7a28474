"""Differences between models: to the first, to a named one, of all pairs."""

import json

import pytest

from src.adapters.peft_files import write_adapter
from src.cli import main
from src.metrics.agreement import Pairs, mcnemar
from tests.evaluations import answers, choice_rows, evaluate, flags, metrics, write_jsonl
from tests.tiny import make_model, random_pairs


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
