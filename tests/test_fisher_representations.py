"""Every representation against per-example autograd on a tiny Llama with all its linear layers, in float64."""

import pytest
import torch

from src.adapters.basis import core_basis
from src.data.chat import Encoded
from src.data.rows import Row
from src.fisher.accumulate import MeanAccumulator, examples, mapped
from src.fisher.block import BlockAccumulator
from src.fisher.diagonal import DiagonalAccumulator
from src.fisher.kronecker import KroneckerAccumulator
from src.fisher.lowrank_accumulator import LowRankAccumulator
from src.fisher.magnitude import MagnitudeAccumulator
from tests.fisher_pass import batches, make_batch, no_bases, run_pass
from tests.oracles import (
    autograd_scores,
    autograd_token_activations,
    autograd_token_scores,
    autograd_weight_scores,
    block_diagonal,
)
from tests.tiny import random_pairs

ACCUMULATORS = [LowRankAccumulator, BlockAccumulator, KroneckerAccumulator, DiagonalAccumulator]


@pytest.fixture
def core(model):
    return core_basis([random_pairs(model, 2, 1)])


def error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def linear_layers(model):
    return list(random_pairs(model, 1, 0))


def weight_shapes(model):
    return {name: tuple(model.get_submodule(name).weight.shape) for name in linear_layers(model)}


def finish(model, encoded, accumulator, u, v, size=3, **options):
    return run_pass(model, batches(encoded, size), [accumulator], u, v, **options)[0].finish()


def test_lowrank_block_and_diagonal_equal_autograd(model, encoded, core):
    scores = autograd_scores(model, make_batch(encoded, range(7)), core.u, core.v)
    exact = scores.T @ scores / 7
    made = [kind(core.shapes) for kind in (LowRankAccumulator, BlockAccumulator, DiagonalAccumulator)]
    run_pass(model, batches(encoded, 3), made, core.u, core.v)
    lowrank, block, diagonal = (accumulator.finish() for accumulator in made)
    assert error(lowrank.dense(), exact) < 1e-9
    assert error(lowrank.scores, scores) < 1e-9
    assert error(block.dense(), block_diagonal(exact, [p * q for p, q in core.shapes.values()])) < 1e-9
    assert error(diagonal.dense(), exact.diag().diag()) < 1e-9


def test_kronecker_equals_the_factors_of_every_tokens_activations(model, encoded, core):
    fisher = finish(model, encoded, KroneckerAccumulator(core.shapes), core.u, core.v)
    activations = autograd_token_activations(model, make_batch(encoded, range(7)), core.modules)
    for name in core.modules:
        d = torch.cat([delta @ core.u[name] for delta, _ in activations[name]])
        x = torch.cat([inputs @ core.v[name] for _, inputs in activations[name]])
        largest = [(delta @ core.u[name]).abs().amax(1) for delta, _ in activations[name]]
        relevant = torch.cat([each > 1e-5 * each.max() for each in largest])
        a, b = fisher.factors(name)
        assert error(a, d.T @ d / 7) < 1e-9
        assert error(b, x[relevant].T @ x[relevant] / relevant.sum()) < 1e-9


def test_kronecker_equals_the_exact_block_with_one_token_per_example(model, core):
    one = [Encoded(Row("r0", "A", "B"), [65, 66], 1)]
    block = finish(model, one, BlockAccumulator(core.shapes), core.u, core.v)
    kronecker = finish(model, one, KroneckerAccumulator(core.shapes), core.u, core.v)
    assert error(kronecker.dense(), block.dense()) < 1e-9


def test_kronecker_equals_the_exact_block_where_gradients_are_independent_of_inputs():
    draw = torch.Generator().manual_seed(0)
    deltas = torch.randn(3, 4, generator=draw, dtype=torch.float64)
    inputs = torch.randn(5, 2, generator=draw, dtype=torch.float64)
    made = [KroneckerAccumulator({"m": (4, 2)}), BlockAccumulator({"m": (4, 2)})]
    for accumulator in made:
        accumulator.begin(examples(torch.arange(15), [f"r{i}" for i in range(15)]))
        accumulator.update("m", deltas.repeat_interleave(5, 0)[:, None], inputs.repeat(3, 1)[:, None])
    assert error(made[0].finish().dense(), made[1].finish().dense()) < 1e-12


def test_weight_coordinates_equal_autograd_in_every_weight(model, encoded, tmp_path):
    shapes, names = weight_shapes(model), linear_layers(model)
    made = [
        DiagonalAccumulator(shapes, halves=False, allocate=mapped(tmp_path)),
        KroneckerAccumulator(shapes, halves=False, allocate=mapped(tmp_path)),
        MeanAccumulator(shapes),
    ]
    run_pass(model, batches(encoded, 3), made, no_bases(names), no_bases(names))
    diagonal, kronecker, mean = (accumulator.finish() for accumulator in made)
    exact = autograd_weight_scores(model, make_batch(encoded, range(7)), names)
    activations = autograd_token_activations(model, make_batch(encoded, range(7)), names)
    means = dict(zip(names, mean.mean.split([p * q for p, q in shapes.values()]), strict=True))
    for name in names:
        assert error(diagonal.module_diagonal(name), exact[name].square().mean(0).flatten()) < 1e-9
        assert error(means[name], exact[name].mean(0).flatten()) < 1e-9
        d = torch.cat([delta for delta, _ in activations[name]])
        assert error(kronecker.factors(name)[0], d.T @ d / 7) < 1e-9
    assert {path.name for path in tmp_path.iterdir()} >= {f"diagonal.{name}.sum" for name in names}


def test_the_diagonal_of_a_large_module_is_taken_a_few_rows_at_a_time(model, encoded, core, monkeypatch):
    whole = finish(model, encoded, DiagonalAccumulator(core.shapes), core.u, core.v)
    monkeypatch.setattr("src.fisher.diagonal.ENTRIES", 1)
    torch.testing.assert_close(
        finish(model, encoded, DiagonalAccumulator(core.shapes), core.u, core.v).dense(), whole.dense()
    )


@pytest.mark.parametrize("kind", ACCUMULATORS)
def test_batch_sizes_give_the_same_result(model, encoded, core, kind):
    one, two, seven = (finish(model, encoded, kind(core.shapes), core.u, core.v, size=n).tensors() for n in (1, 2, 7))
    for name in one:
        torch.testing.assert_close(two[name], one[name])
        torch.testing.assert_close(seven[name], one[name])


@pytest.mark.parametrize("kind", ACCUMULATORS)
def test_several_draws_are_averaged(model, encoded, core, kind):
    three = finish(model, encoded, kind(core.shapes), core.u, core.v, labels="model", draws=3)
    assert three.count == 7
    if kind is LowRankAccumulator:
        assert three.scores.shape == (21, core.dim)
    other = finish(model, encoded, kind(core.shapes), core.u, core.v, labels="model", draws=3, size=7)
    assert error(three.dense(), other.dense()) < 1e-12
    single = finish(model, encoded, kind(core.shapes), core.u, core.v, labels="model", draws=1)
    assert error(three.dense(), single.dense()) > 1e-3


@pytest.mark.parametrize("size", [1, 3, 7])
def test_token_scores_equal_autograd_of_each_tokens_log_probability(model, encoded, core, size):
    fisher = finish(model, encoded, LowRankAccumulator(core.shapes), core.u, core.v, granularity="token", size=size)
    expected = autograd_token_scores(model, make_batch(encoded, range(7)), core.u, core.v)
    assert fisher.count == len(expected)
    assert error(fisher.scores, expected) < 1e-9
    answers = [len(row.ids) - row.answer_start for row in encoded]
    assert torch.equal(fisher.groups, torch.arange(7).repeat_interleave(torch.tensor(answers)))
    sums = torch.zeros(7, core.dim, dtype=torch.float64).index_add_(0, fisher.groups, fisher.scores)
    # The model's norms round to float32, so a sum of gradients is the gradient of the sum to about 1e-8.
    assert error(sums, autograd_scores(model, make_batch(encoded, range(7)), core.u, core.v)) < 1e-6


@pytest.mark.parametrize("kind", [BlockAccumulator, DiagonalAccumulator])
def test_token_granularity_accumulates_the_same_scores(model, encoded, core, kind):
    scores = autograd_token_scores(model, make_batch(encoded, range(7)), core.u, core.v)
    fisher = finish(model, encoded, kind(core.shapes), core.u, core.v, granularity="token")
    exact = block_diagonal(scores.T @ scores / len(scores), [p * q for p, q in core.shapes.values()])
    assert fisher.count == len(scores)
    assert error(fisher.dense(), exact if kind is BlockAccumulator else exact.diag().diag()) < 1e-9


def test_halves_of_token_scores_never_part_a_row(model, encoded, core):
    fisher = finish(model, encoded, LowRankAccumulator(core.shapes), core.u, core.v, granularity="token")
    one, two = fisher.halves(seed=0)
    assert not set(one.groups.tolist()) & set(two.groups.tolist())
    assert one.count + two.count == fisher.count


@pytest.mark.parametrize("kind", ACCUMULATORS)
def test_halves_are_the_fisher_matrices_of_disjoint_rows(model, encoded, core, kind):
    fisher = finish(model, encoded, kind(core.shapes), core.u, core.v)
    one, two = fisher.halves(seed=0)
    assert one.count + two.count == fisher.count == 7
    if kind is not KroneckerAccumulator:
        whole = (one.count * one.dense() + two.count * two.dense()) / 7
        torch.testing.assert_close(whole, fisher.dense())
    assert error(one.dense(), two.dense()) > 1e-3


def test_the_mean_score_is_the_gradient_of_the_mean_log_likelihood(model, encoded, core):
    mean = finish(model, encoded, MeanAccumulator(core.shapes), core.u, core.v)
    scores = autograd_scores(model, make_batch(encoded, range(7)), core.u, core.v)
    assert error(mean.mean, scores.mean(0)) < 1e-9


@pytest.mark.parametrize("kind", [*ACCUMULATORS, MeanAccumulator])
def test_a_pass_without_any_row_is_refused(kind):
    with pytest.raises(ValueError, match="at least one example"):
        kind({"m": (2, 2)}).finish()


def accumulate_many(accumulator):
    """20 000 one-token examples in float32, 40 a pass: their output gradients (N, 1, 3) and inputs (N, 1, 5)."""
    draw = torch.Generator().manual_seed(0)
    sides = [torch.rand(20_000, 1, side, generator=draw) + 0.5 for side in (3, 5)]
    for part in torch.arange(20_000).split(40):
        accumulator.begin(examples(part, [str(i) for i in part.tolist()]))
        accumulator.update("m", *(side[part] for side in sides))
    return sides


@pytest.mark.parametrize("kind", [DiagonalAccumulator, MagnitudeAccumulator])
def test_sums_of_float32_scores_are_kept_in_float64(kind):
    """A running sum in float32 is off by 2e-6 after these 20 000 scores."""
    accumulator = kind({"m": (3, 5)}, halves=False)
    sides = accumulate_many(accumulator)
    scores = torch.einsum("ntp,ntq->npq", *(side.double() for side in sides)).flatten(1)
    expected = (scores.square() if kind is DiagonalAccumulator else scores.abs()).mean(0)
    running = torch.zeros(15)
    for row in scores.float():
        running += row.square() if kind is DiagonalAccumulator else row.abs()
    assert error(running.double() / 20_000, expected) > 1e-6
    assert error(accumulator.finish().mean("m"), expected) < 2e-7


def test_kronecker_factors_of_float32_activations_are_summed_in_float64():
    """As above: a running sum in float32 is off by more than 1e-6."""
    accumulator = KroneckerAccumulator({"m": (3, 5)}, halves=False)
    sides = accumulate_many(accumulator)
    for found, side in zip(accumulator.finish().factors("m"), sides, strict=True):
        expected = side[:, 0].double().T @ side[:, 0].double() / 20_000
        running = torch.zeros_like(expected, dtype=torch.float32)
        for row in side[:, 0]:
            running += row[:, None] * row
        assert error(running.double() / 20_000, expected) > 1e-6
        assert error(found, expected) < 2e-7
