"""Judges in a study: what reaches the commands, and what is part of a key."""

import inspect

import pytest

from src.data.suite import Suite
from src.experiments.cell import Cell
from src.experiments.content import RUNNING, _suite_content
from src.experiments.plain_settings import plain
from src.judges import registry  # noqa: F401 - the subclasses of Judge are the registry
from src.metrics.judging import Judge
from tests.registries import concrete
from tests.tiny import write_rows

NEEDED = {"name": "org/judge", "url": "http://localhost:8000/v1", "model": "judge"}
JUDGES = concrete(Judge)


def parameters(kind):
    return {name: one for name, one in inspect.signature(kind.__init__).parameters.items() if name != "self"}


def made(kind, **changes):
    needed = {name: NEEDED[name] for name, one in parameters(kind).items() if one.default is one.empty}
    return kind(**needed | changes), needed | changes


def numbers(kind):
    """Numbers other than the defaults, for all options that are numbers."""
    return {
        name: one.default + 1
        for name, one in parameters(kind).items()
        if isinstance(one.default, int | float) and not isinstance(one.default, bool)
    }


def test_there_are_judges_of_every_make():
    assert {"Classifier", "Causal", "Endpoint", "Refusal"} <= {kind.__name__ for kind in JUDGES}


@pytest.mark.parametrize("kind", JUDGES)
def test_every_judge_reaches_the_command_as_it_was_given(kind):
    for changes in ({}, numbers(kind)):
        judge, given = made(kind, **changes)
        found = plain(Suite("s", "harmful", "rows.jsonl", judge=judge))["judge"]
        assert found["class_path"] == f"{kind.__module__}.{kind.__name__}"
        assert found.get("init_args", {}) == given
        assert kind(**found.get("init_args", {})).settings == judge.settings


@pytest.mark.parametrize("kind", JUDGES)
def test_only_what_changes_verdicts_is_part_of_a_key(kind, tmp_path):
    rows = str(write_rows(tmp_path / "rows.jsonl", 3, what="task"))

    def key(**changes):
        suite = plain(Suite("s", "harmful", rows, judge=made(kind, **changes)[0]))
        return Cell("test", "x", {"data": {"suites": [suite, plain(Suite("t", "harmful", rows))]}}).key

    judge, _ = made(kind)
    apart = {name for name in parameters(kind) if name not in vars(judge)}
    assert apart == {name for name in parameters(kind) if name in RUNNING}
    for name, value in numbers(kind).items():
        assert (key(**{name: value}) == key()) == (name in apart)
    if "key_variable" in apart:
        assert key(key_variable="OTHER") == key()


def test_cells_of_before_a_judge_of_refusal_counted_are_others():
    """A judge of harm changes nothing of what is called a refusal: its cells stay."""
    suite = {"name": "a", "kind": "harmful"}
    for judge, marked in (
        ({"class_path": "src.judges.refusal.Refusal"}, True),
        ({"class_path": "src.judges.endpoint.Endpoint", "init_args": {"finds": "refusal"}}, True),
        ({"class_path": "src.judges.endpoint.Endpoint", "init_args": {"finds": "harmful"}}, False),
        ({"class_path": "src.judges.endpoint.Endpoint"}, False),
    ):
        assert ("counts" in _suite_content(suite | {"judge": judge})["judge"]) is marked
    assert _suite_content(suite) == suite
