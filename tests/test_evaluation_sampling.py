"""Sampled answers follow their temperature, each from a stream of its own; strange answers are those of the base."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from src.data.batches import Batch
from src.data.chat import Encoded
from src.data.rows import Row
from src.data.suite import Suite
from src.data.suites import EvaluationData
from src.models.computation import Computation, _stream
from src.models.evaluation import EvaluationModule
from src.models.generation import sampler
from src.models.grading import graded_answer


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_samples_follow_the_softmax_of_logits_over_the_temperature(temperature):
    logits, count = torch.tensor([0.0, 1.0, 2.0]), 400
    drawn = sampler([str(i) for i in range(count)], temperature)(logits.expand(count, 3), list(range(count)))
    expected = (logits / temperature).softmax(-1)
    torch.testing.assert_close(torch.bincount(drawn, minlength=3) / count, expected, atol=0.1, rtol=0)


def test_every_seed_row_and_sample_has_a_stream_of_its_own():
    rows = [Row("a", "A?"), Row("a", "A?"), Row("b", "B?"), Row("b", "B?")]
    tokens = SimpleNamespace(encoded=[Encoded(row, [1], 1) for row in rows])
    suites = [Suite("code", "code", "x.jsonl", samples=2, temperature=1.0, seed=seed) for seed in (0, 1)]
    assert len({_stream(suite, tokens, index) for suite in suites for index in range(4)}) == 8


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 0.5},
        {"seed": 1},
        {"samples": 3},
        {"collapse_nll": 4.0},
        {"style": "statement"},
        {"score": False},
    ],
)
def test_what_changes_answers_changes_what_a_suite_asks(change):
    tokens = SimpleNamespace(encoded=[], encoder=SimpleNamespace(stop_ids=[0]))
    data = SimpleNamespace(rows={"s": []}, tokens={"s": tokens})
    suite = Suite("s", "code", "x.jsonl", samples=2, temperature=1.0)
    assert EvaluationData.content(data, replace(suite, **change)) != EvaluationData.content(data, suite)


STRANGE = Suite("bad", "harmful", "x.jsonl", collapse_nll=5.0)


def test_how_strange_answers_are_is_asked_of_the_bare_base():
    attached = [0]  # numbers of the adapters that were attached in turn; None is none

    def answers(*_):
        assert attached[-1] == 0
        return [{"answer": "one"}, {"answer": "two"}]

    def strangeness(tokens, batch, given):
        assert attached[-1] is None
        assert given == ["one", "two"]
        return [1.0, 2.0]

    module = SimpleNamespace(
        _data=SimpleNamespace(tokens={"bad": None}, scored=lambda _: False),
        _computation=SimpleNamespace(strangeness=strangeness),
        _swap=SimpleNamespace(to=attached.append),
        _answers=answers,
    )
    batch = SimpleNamespace(index=torch.tensor([0, 1]))
    found = EvaluationModule._computed(module, batch, STRANGE, score=True)
    assert found == [{"answer": "one", "answer_nll": 1.0}, {"answer": "two", "answer_nll": 2.0}]
    attached[:] = [0]
    assert EvaluationModule._computed(module, batch, STRANGE, score=False) == [{"answer": "one"}, {"answer": "two"}]


class Letters:
    """A tokenizer of four letters."""

    pad_token_id = 0

    def __call__(self, text, *, add_special_tokens):
        return SimpleNamespace(input_ids=[4 + "abcd".index(letter) for letter in text])


def test_how_strange_an_answer_is_is_its_mean_over_tokens_behind_its_prompt():
    batches = []

    def likelihoods(batch):
        batches.append(batch)
        return [{"nll": 6.0, "tokens": 4}]

    computation = Computation(None, {}, sharded=False)
    computation.likelihoods = likelihoods
    encoder = SimpleNamespace(tokenizer=Letters(), end_id=9)
    tokens = SimpleNamespace(encoder=encoder, encoded=[Encoded(Row("a", "A?"), [1, 2, 3, 8, 9], 3)])
    one = torch.tensor([0])
    assert computation.strangeness(tokens, Batch(one, one, one, one), ["dcba"]) == [1.5]
    assert batches[0].ids.tolist() == [[1, 2, 3, 7, 6, 5, 4]]
    assert (batches[0].answer_starts.tolist(), batches[0].lengths.tolist()) == ([3], [7])


@pytest.mark.parametrize(("nll", "how"), [(6.0, "perplexity"), (4.0, "")])
def test_an_answer_that_the_base_finds_strange_has_collapsed(nll, how):
    record = {"answer": "A plain answer.", "answer_nll": nll}
    found = graded_answer(STRANGE, Row("a", "What is it?"), record, None)
    assert (found["collapse"], found["collapsed"]) == (how, bool(how))
