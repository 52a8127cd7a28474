"""How the rows of an evaluation become batches."""

import random

import pytest

from src.data.schedule import budget_batches, even_batches
from tests.evaluations import choice_rows, write_jsonl
from tests.tiny import make_tokenizer


@pytest.fixture
def lengths():
    draw = random.Random(0)
    return [draw.randint(60, 200) for _ in range(200)]


@pytest.mark.parametrize(("rows", "tokens", "sizes"), [(64, 16384, [50] * 4), (300, 10**6, [200])])
def test_no_small_batch_is_left_over(lengths, rows, tokens, sizes):
    found = even_batches([(i,) for i in range(200)], lengths, beginning=0, max_rows=rows, max_tokens=tokens)
    assert [len(batch) for batch in found] == sizes


@pytest.mark.parametrize("tokens", [900, 5000, 16384, 30000])
def test_batches_hold_every_row_once_within_the_budget(lengths, tokens):
    units = [(2 * i, 2 * i + 1) for i in range(100)]
    budget = {"beginning": 20, "max_rows": 48, "max_tokens": tokens}
    found = even_batches(units, lengths, **budget)
    assert sorted(row for batch in found for row in batch) == list(range(200))
    costs = [20 + len(batch) * (max(lengths[i] for i in batch) - 20) for batch in found]
    assert max(costs) <= tokens
    assert max(map(len, found)) <= 48
    greedy = budget_batches(units, lengths, **budget)
    assert len(greedy) <= len(found) <= len(greedy) + 1
    assert min(costs) >= 20 + min(len(batch) * (max(lengths[i] for i in batch) - 20) for batch in greedy)


def test_a_unit_that_exceeds_the_budget_stands_alone(lengths):
    found = even_batches([(0, 1, 2, 3), (4, 5, 6, 7)], lengths, beginning=0, max_rows=2, max_tokens=8)
    assert sorted(found) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert even_batches([], lengths, beginning=0, max_rows=2, max_tokens=8) == []


@pytest.mark.parametrize("window", [None, 4])
def test_a_beginning_counts_once_only_where_it_is_computed_once(tmp_path, window):
    """A sliding window keeps a model from it: then worked examples count for every row of a batch."""
    from transformers import MistralConfig, MistralForCausalLM

    from src.data.suite import Suite
    from src.data.suites import EvaluationData
    from src.models.computation import Computation

    few, questions = (
        write_jsonl(tmp_path / f"{start}.jsonl", choice_rows(count, start=start))
        for start, count in ((0, 12), (50, 24))
    )
    suite = Suite(name="mmlu", kind="choice", rows=str(questions), few_shot=str(few), shots=5)
    data = EvaluationData([suite], batch_size=100, max_tokens=1500, max_length=2000)
    data.bind(make_tokenizer())
    data.encode_suites(None)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MistralConfig(vocab_size=258, num_key_value_heads=2, sliding_window=window, **sizes)
    shares = Computation(MistralForCausalLM(config), {}, sharded=False).shares_beginnings
    assert shares == (window is None)
    data.plan(1, {}, shares_beginnings=shares)
    rows = [len(step.rows) for step in data.steps]
    lengths = [len(encoded.ids) for encoded in data.encoded["mmlu"]]
    assert sum(rows) == 24
    most = max(sum(lengths[i] for i in step.rows) for step in data.steps)
    assert (most > 1500) if shares else (most <= 1500)
