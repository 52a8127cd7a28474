"""Judges are tried before answers are generated, once for all suites that name them, and are let go again."""

import json

import pytest

from src.cli import main
from src.errors import InputError
from src.judges.causal import Causal
from src.judges.classifier import Classifier
from src.models.evaluation import EvaluationModule
from tests.evaluations import answers, evaluate, flags
from tests.test_evaluation_resume import computed  # noqa: F401 - a fixture
from tests.test_judges import Server, make_bert, make_classifier
from tests.tiny import write_rows

SERVED = {"class_path": "src.judges.endpoint.Endpoint"}


def suites(folder, *judges, kind="jailbreak"):
    """One suite for each judge."""
    rows = str(write_rows(folder / "attack.jsonl", 3, what="a", response=False))
    return [
        {"name": f"s{i}", "kind": kind, "rows": rows, "max_new_tokens": 3, "judge": judge}
        for i, judge in enumerate(judges)
    ]


def classifier(name, **settings):
    return {"class_path": "src.judges.classifier.Classifier", "init_args": {"name": str(name)} | settings}


def causal(name, **settings):
    return {"class_path": "src.judges.causal.Causal", "init_args": {"name": str(name)} | settings}


def broken_weights(folder):
    name = make_classifier(folder)
    (folder / "model.safetensors").write_bytes(b"no weights")
    return name


UNLOADABLE = {
    "no such classifier": "cannot be loaded",
    "no such language model": "cannot be loaded",
    "a language model as a classifier": "no weights of score.weight; expected a trained classifier",
    "a classifier as a language model": "expected a trained language model",
    "an encoder as a language model": "expected a trained language model",
    "broken weights": "the classifier cannot be loaded",
    "no such label": "no label 'bad'",
    "words that begin alike": "begin with the same token",
    "no such number format": "dtype is 'float99'; expected auto",
    "nobody listens": "judge http://127.0.0.1:9/v1: not reachable",
}


def unloadable(what, folder, base):
    """A judge that cannot judge."""
    encoder, made = (lambda: make_bert(folder / "b")), (lambda: make_classifier(folder / "c"))
    known = {
        "no such classifier": lambda: classifier(folder / "nowhere"),
        "no such language model": lambda: causal(folder / "nowhere"),
        "a language model as a classifier": lambda: classifier(base),
        "a classifier as a language model": lambda: causal(made()),
        "an encoder as a language model": lambda: causal(encoder(), chat=False),
        "broken weights": lambda: classifier(broken_weights(folder / "c")),
        "no such label": lambda: classifier(made(), positive="bad"),
        "words that begin alike": lambda: causal(base, yes="safer", no="safe"),
        "no such number format": lambda: causal(base, dtype="float99"),
        "nobody listens": lambda: SERVED | {"init_args": {"url": "http://127.0.0.1:9/v1", "model": "m", "retries": 0}},
    }
    return known[what]()


@pytest.mark.parametrize("what", list(UNLOADABLE))
def test_a_judge_that_cannot_judge_is_found_before_generating(base, tmp_path, computed, capsys, what):  # noqa: F811
    given = flags(base, tmp_path, suites(tmp_path, unloadable(what, tmp_path, base)), tmp_path / "out")
    assert main(given) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert UNLOADABLE[what] in line
    assert computed["rows"] == 0


def test_a_judge_that_replies_nonsense_is_found_before_generating(base, tmp_path, computed, capsys):  # noqa: F811
    with Server('{"choices": [{"message": {"content": "maybe"}}]}', failures=99) as server:
        judge = SERVED | {"init_args": {"url": server.url, "model": "m", "retries": 1, "wait": 0.01}}
        assert main(flags(base, tmp_path, suites(tmp_path, judge), tmp_path / "out")) == 2
        assert len(server.seen) == 2
    assert "replied 'maybe'; expected 'yes' or 'no'" in capsys.readouterr().err
    assert computed["rows"] == 0


def test_suites_that_name_one_judge_share_its_copy_and_it_is_away_while_answers_are_generated(
    base, tmp_path, monkeypatch
):
    name = make_classifier(tmp_path / "c")
    opened, open_model, judges = [], Classifier._open, {}
    compute = EvaluationModule._computed

    def counted(self, *arguments, **options):
        opened.append(self.positive)
        return open_model(self, *arguments, **options)

    def looked(self, batch, suite, *, score):
        judges[suite.name] = suite.judge
        assert suite.judge._model is None
        return compute(self, batch, suite, score=score)

    monkeypatch.setattr(Classifier, "_open", counted)
    monkeypatch.setattr(EvaluationModule, "_computed", looked)
    same, other = classifier(name, positive="harmful"), classifier(name, positive="safe")
    evaluate(base, tmp_path, suites(tmp_path, same, same, other))
    assert judges["s0"] is judges["s1"] is not judges["s2"]
    assert opened == ["harmful", "safe", "harmful", "safe"]  # tried, and loaded for the first answer to be judged
    for one, two in zip(answers(tmp_path / "out", "s0"), answers(tmp_path / "out", "s2"), strict=True):
        assert (one["verdict"]["judge_positive"], two["verdict"]["judge_positive"]) == ("harmful", "safe")
        assert one["verdict"]["positive"] is not two["verdict"]["positive"]


def test_a_judge_whose_verdicts_are_all_known_is_not_asked_again(base, tmp_path, computed, capsys):  # noqa: F811
    with Server() as server:
        judge = SERVED | {"init_args": {"url": server.url, "model": "m", "wait": 0.01, "retries": 0}}
        given = suites(tmp_path, judge)
        before = evaluate(base, tmp_path, given)
        asked = len(server.seen)
    assert asked >= 2
    assert evaluate(base, tmp_path, given, "--overwrite", "true") == before  # the endpoint is gone
    assert computed["rows"] == 3
    given[0]["max_new_tokens"] = 5
    assert main(flags(base, tmp_path, given, tmp_path / "out", "--overwrite", "true")) == 2
    assert "not reachable" in capsys.readouterr().err
    assert computed["rows"] == 3


def test_a_judge_is_not_tried_where_nothing_is_judged(base, tmp_path):
    judge = SERVED | {"init_args": {"url": "http://127.0.0.1:9/v1", "model": "m", "retries": 0}}
    given = flags(base, tmp_path, suites(tmp_path, judge), tmp_path / "out")
    assert main(["predict", *given[1:]]) == 0
    assert len(answers(tmp_path / "out", "s0")) == 3


def test_a_model_that_was_not_trained_to_judge_is_refused_when_it_is_loaded(base, tmp_path):
    for judge in (Classifier(str(base)), Causal(make_classifier(tmp_path / "c"))):
        with pytest.raises(InputError, match="its files have no weights of"):
            judge.load("cpu")


def test_what_identifies_a_judge_has_not_changed(tmp_path):
    """Verdicts of earlier runs are found again: settings and key hold what they held."""
    name = make_classifier(tmp_path / "c")
    assert list(Classifier(name).settings) == [
        "judge", "name", "positive", "finds", "text", "threshold", "max_length", "revision",
    ]  # fmt: skip
    # It has judged in any capitals since it takes conversations: what it said before is asked again.
    causal = '{"chat": true, "conversation": false, "dtype": "auto", "finds"'
    assert json.dumps(Causal(name).settings, sort_keys=True).startswith(causal)
