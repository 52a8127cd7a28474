"""How the rows of an evaluation become batches."""

import random

import pytest
import torch

from src.data.batches import EncodedRows
from src.data.schedule import Step, budget_batches, deal, even_batches
from src.data.suite import Suite
from src.data.suites import EvaluationData
from src.models.computation import Computation
from tests.evaluations import PASSES, choice_rows, write_jsonl
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


@pytest.fixture
def worked_examples(tmp_path):
    """24 questions of two subjects behind five worked examples each, laid out for 1500 tokens."""
    few = write_jsonl(tmp_path / "few.jsonl", choice_rows(12))
    questions = write_jsonl(tmp_path / "questions.jsonl", choice_rows(24, start=50))
    suite = Suite(name="mmlu", kind="choice", rows=str(questions), few_shot=str(few), shots=5)
    data = EvaluationData([suite], batch_size=100, max_tokens=1500, max_length=2000)
    data.bind(make_tokenizer())
    data.encode_suites(None)
    return data


@pytest.mark.parametrize("sharded", [False, True])
def test_a_beginning_counts_once_only_where_it_is_computed_once(worked_examples, sharded):
    worked_examples.plan(1, {}, sharded=sharded)
    steps = worked_examples.steps
    lengths = [len(encoded.ids) for encoded in worked_examples.tokens["mmlu"].encoded]
    assert sorted(row for step in steps for row in step.rows) == list(range(24))
    most = max(sum(lengths[i] for i in step.rows) for step in steps)
    assert (most <= 1500) if sharded else (most > 1500)


def test_a_model_that_cannot_share_a_beginning_stays_within_the_budget(worked_examples):
    """A sliding window keeps a model from packing, even one that is wider than any row."""
    from transformers import MistralConfig, MistralForCausalLM

    worked_examples.plan(1, {})
    rows = worked_examples.steps[0].rows
    batch = EncodedRows(worked_examples.tokens["mmlu"].encoded, 256)[(list(rows), 1.0)]
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    scores, passes = [], []
    for window in (None, 4096):
        torch.manual_seed(0)
        config = MistralConfig(vocab_size=258, num_key_value_heads=2, sliding_window=window, **sizes)
        model = MistralForCausalLM(config).double().eval().requires_grad_(False)
        seen = []
        model.get_input_embeddings().register_forward_hook(
            lambda _, given, __, seen=seen: seen.append(given[0].numel())
        )
        modes = {"choose": "highest", "settle": "highest"}
        computation = Computation(model, modes, sharded=False, max_tokens=1500)
        scores.append(computation._choice_scores(worked_examples.tokens["mmlu"], batch, "highest"))
        passes.append(seen)
    assert len(passes[1]) > len(passes[0])
    assert max(passes[1]) <= 1500 < batch.ids.numel()
    assert torch.tensor(scores[0]).allclose(torch.tensor(scores[1]), rtol=1e-9)


def test_blocks_that_are_dealt_as_one_keep_no_process_waiting():
    blocks = [[Step(0, number, (row,)) for row in range(count)] for number, count in enumerate((1, 3, 1, 2, 1))]
    apart = [deal(blocks, rank, 4) for rank in range(4)]
    as_one = [deal(blocks, rank, 4, in_step=False) for rank in range(4)]
    for shares in (apart, as_one):
        assert len({len(share) for share in shares}) == 1
        done = [step for share in shares for step in share if step.weight]
        assert sorted((s.suite, s.rows) for s in done) == sorted((s.suite, s.rows) for block in blocks for s in block)
    assert [sum(step.weight for step in share) for share in apart] == [5, 2, 1, 0]
    assert [sum(step.weight for step in share) for share in as_one] == [2, 2, 2, 2]
    assert all([step.suite for step in share] == sorted(step.suite for step in share) for share in as_one)


def test_samples_of_a_program_need_not_share_a_batch(tmp_path):
    rows = write_jsonl(tmp_path / "code.jsonl", [PASSES, PASSES | {"task_id": "T/1"}])
    suite = Suite(name="code", kind="code", rows=str(rows), samples=20, temperature=0.8, max_new_tokens=5)
    data = EvaluationData([suite], batch_size=8)
    data.bind(make_tokenizer())
    data.encode_suites(None)
    data.plan(1, {})
    assert max(len(step.rows) for step in data.steps) <= 8
    assert sorted(row for step in data.steps for row in step.rows) == list(range(40))
