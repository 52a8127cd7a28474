"""How the rows of an evaluation become batches."""

import random

import pytest

from src.data.schedule import budget_batches, even_batches


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
