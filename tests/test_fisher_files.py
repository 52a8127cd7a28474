"""Every representation through the file, weighted means over data sets, and the algebra that all share."""

import itertools
import json
from functools import partial

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from src.errors import InputError
from src.fisher.accumulate import MeanAccumulator, examples, row_half
from src.fisher.base import weighted_mean
from src.fisher.block import BlockAccumulator
from src.fisher.diagonal import DiagonalAccumulator
from src.fisher.files import RECORD, FisherFile, load_fisher
from src.fisher.kronecker import KroneckerAccumulator
from src.fisher.lowrank import LowRankFisher
from src.fisher.lowrank_accumulator import LowRankAccumulator
from tests import tiny

SHAPES = {"model.layers.0.a": (2, 3), "model.layers.1.b": (1, 4)}
ACCUMULATORS = [LowRankAccumulator, BlockAccumulator, KroneckerAccumulator, DiagonalAccumulator]
random_fisher = partial(tiny.random_fisher, shapes=SHAPES)


def bases():
    u = {name: torch.eye(5, p).double() for name, (p, _) in SHAPES.items()}
    return u, {name: torch.eye(6, q).double() for name, (_, q) in SHAPES.items()}


@pytest.mark.parametrize("kind", ACCUMULATORS)
def test_every_representation_survives_the_round_trip(kind, tmp_path):
    fisher, mean = random_fisher(kind), torch.arange(10.0).double()
    FisherFile(fisher, *bases(), {"pass": "safety"}, mean).save(tmp_path / "f.safetensors")
    loaded = load_fisher(tmp_path / "f.safetensors")
    assert type(loaded.fisher) is type(fisher)
    assert torch.equal(loaded.fisher.dense(), fisher.dense())
    assert torch.equal(loaded.mean, mean)
    assert loaded.fisher.count == 9
    assert loaded.shapes == SHAPES
    assert loaded.record["representation"] == fisher.representation
    assert loaded.record["coordinates"] == "core"


@pytest.mark.parametrize("kind", [KroneckerAccumulator, DiagonalAccumulator])
def test_weight_coordinates_need_no_bases(kind, tmp_path):
    FisherFile(random_fisher(kind), {}, {}, {"pass": "safety"}).save(tmp_path / "f.safetensors")
    loaded = load_fisher(tmp_path / "f.safetensors")
    assert loaded.shapes == SHAPES
    assert loaded.record["coordinates"] == "weight"
    assert loaded.mean is None
    assert torch.equal(loaded.fisher.dense(), random_fisher(kind).dense())


def test_scores_in_weight_coordinates_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no weight coordinates"):
        FisherFile(random_fisher(LowRankAccumulator), {}, {}, {}).save(tmp_path / "f.safetensors")


@pytest.mark.parametrize("key", ["modules", "shapes", "coordinates", "count", "representation"])
def test_a_record_without_a_key_is_named(tmp_path, key):
    path = tmp_path / "f.safetensors"
    FisherFile(random_fisher(LowRankAccumulator), *bases(), {}).save(path)
    with safe_open(path, "pt") as handle:
        record = json.loads(handle.metadata()[RECORD])
    del record[key]
    save_file(load_file(path), path, metadata={RECORD: json.dumps(record)})
    with pytest.raises(InputError, match=rf"f\.safetensors: has no '{key}'; expected a file written by"):
        load_fisher(path)


@pytest.mark.parametrize("kind", ACCUMULATORS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_values_are_named_with_file_and_module(kind, bad, tmp_path):
    fisher = random_fisher(kind)
    tensor = fisher.tensors()["scores"][:, -1:] if kind is LowRankAccumulator else list(fisher.tensors().values())[-1]
    tensor.view(-1)[:1] = bad
    FisherFile(fisher, *bases(), {}).save(tmp_path / "f.safetensors")
    with pytest.raises(InputError, match=r"f\.safetensors: .* of model\.layers\.1\.b hold NaN or infinite"):
        load_fisher(tmp_path / "f.safetensors")


def test_a_bad_mean_is_named(tmp_path):
    mean = torch.zeros(10).double()
    mean[7] = float("nan")
    FisherFile(random_fisher(BlockAccumulator), *bases(), {}, mean).save(tmp_path / "f.safetensors")
    with pytest.raises(InputError, match=r"the mean of model\.layers\.1\.b hold NaN"):
        load_fisher(tmp_path / "f.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block.model.layers.1.b": None}, r"has no 'block\.model\.layers\.1\.b'"),
        ({"counts": torch.tensor([1.0, 1.0]).double()}, "sums are of 2 examples, the record says 9"),
    ],
)
def test_files_that_are_not_whole_are_refused(change, message, tmp_path):
    path = tmp_path / "f.safetensors"
    FisherFile(random_fisher(BlockAccumulator), *bases(), {}).save(path)
    with safe_open(path, "pt") as handle:
        metadata = handle.metadata()
    tensors = {name: tensor for name, tensor in (load_file(path) | change).items() if tensor is not None}
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(InputError, match=message):
        load_fisher(path)


@pytest.mark.parametrize("kind", ACCUMULATORS)
def test_products_and_energies_equal_the_dense_matrix(kind):
    fisher = random_fisher(kind)
    vectors = torch.randn(4, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    dense = fisher.dense()
    torch.testing.assert_close(fisher.matvec(vectors[0]), dense @ vectors[0])
    torch.testing.assert_close(fisher.energies(vectors), torch.einsum("pi,ij,pj->p", vectors, dense, vectors))
    torch.testing.assert_close(fisher.energy(vectors[1]), (vectors[1] @ dense @ vectors[1]).item())
    torch.testing.assert_close(fisher.trace(), dense.trace().item())
    assert torch.equal(dense, dense.T) or (dense - dense.T).abs().max() < 1e-12


@pytest.mark.parametrize("kind", [LowRankAccumulator, BlockAccumulator, DiagonalAccumulator])
def test_the_weighted_mean_over_data_sets_equals_the_dense_one(kind):
    parts = [random_fisher(kind, rows, seed) for rows, seed in ((5, 1), (9, 2), (4, 3))]
    mean = weighted_mean(parts, [1.0, 2.0, 0.5])
    expected = sum(w * part.dense() for w, part in zip([1.0, 2.0, 0.5], parts, strict=True)) / 3.5
    torch.testing.assert_close(mean.dense(), expected)
    assert mean.count == 18


def test_the_kronecker_mean_averages_factors():
    parts = [random_fisher(KroneckerAccumulator, rows, seed) for rows, seed in ((5, 1), (9, 2))]
    mean = weighted_mean(parts, [1.0, 3.0])
    for name in SHAPES:
        (a, b), (a1, b1), (a2, b2) = (fisher.factors(name) for fisher in (mean, *parts))
        torch.testing.assert_close(a, (a1 + 3 * a2) / 4)
        torch.testing.assert_close(b, (b1 + 3 * b2) / 4)


@pytest.mark.parametrize("kind", ACCUMULATORS)
def test_weights_that_make_no_mean_are_refused(kind):
    one, two = random_fisher(kind, seed=1), random_fisher(kind, seed=2)
    for weights in ([0.0, 0.0], [-1.0, 2.0], [1.0], [float("inf"), 1.0]):
        with pytest.raises(ValueError, match="weights"):
            weighted_mean([one, two], weights)
    assert weighted_mean([one], [2.0]) is one


def test_unlike_fisher_matrices_have_no_mean():
    with pytest.raises(ValueError, match="representations"):
        weighted_mean([random_fisher(BlockAccumulator), random_fisher(DiagonalAccumulator)], [1.0, 1.0])
    draws = LowRankFisher(torch.ones(4, 3), 2), LowRankFisher(torch.ones(4, 3), 4)
    with pytest.raises(ValueError, match="draws"):
        weighted_mean(draws, [1.0, 1.0])


def test_halves_that_cannot_be_told_apart_are_none():
    assert LowRankFisher(torch.ones(1, 3), 1).halves(0) is None
    assert random_fisher(BlockAccumulator).half(0).halves(0) is None
    empty = BlockAccumulator({"m": (1, 1)})
    empty.begin(examples(torch.arange(2), ["same", "same"]))
    empty.update("m", torch.ones(2, 1, 1), torch.ones(2, 1, 1))
    assert empty.finish().halves(0) is None


def test_a_row_of_two_data_sets_is_in_one_half():
    one, two = random_fisher(LowRankAccumulator, 8, 1), random_fisher(LowRankAccumulator, 6, 2)
    names = [f"r{i}" for i in range(8)]
    assert one.named(names).halves(3)[0].rows == tuple(names[i] for i in chosen(one.halves(3)[0], one))
    for other in (one.named(names), two.named([*names[4:], "s0", "s1"])):
        pooled = weighted_mean([one.named(names), other], [1.0, 1.0])
        first, second = pooled.halves(0)
        assert not set(first.rows) & set(second.rows)
        assert first.count + second.count == pooled.count
    # Rows that are not known are told apart by position.
    assert weighted_mean([one.named(names), two], [1.0, 1.0]).rows is None


def chosen(half, whole):
    """Positions of a half's scores."""
    return [int((whole.scores == row).all(1).nonzero()) for row in half.scores]


def test_tokens_of_a_row_keep_its_name():
    fisher = LowRankFisher(torch.ones(4, 3), 4, torch.tensor([0, 0, 2, 2]))
    assert fisher.named(["a", "b", "c"]).rows == ("a", "a", "c", "c")
    assert fisher.named(["a", "b"]).rows is None
    assert LowRankFisher(torch.ones(2, 3), 2).named(["a", "b", "c"]).rows is None


def test_a_file_names_the_rows_of_its_scores(tmp_path):
    names = [f"r{i}" for i in range(9)]
    FisherFile(random_fisher(LowRankAccumulator), *bases(), {"rows": names}).save(tmp_path / "f.safetensors")
    assert load_fisher(tmp_path / "f.safetensors").fisher.rows == tuple(names)


def rewritten(path, tensors, metadata):
    with safe_open(path, "pt") as handle:
        kept = handle.metadata()
    save_file(load_file(path) | tensors, path, metadata=kept | metadata)


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"u.model.layers.0.a": torch.full((5, 2), float("nan"))}, {}, "vectors u of model.layers.0.a hold NaN"),
        ({"v.model.layers.1.b": torch.full((6, 4), float("inf"))}, {}, "vectors v of model.layers.1.b hold NaN"),
        ({"v.model.layers.1.b": torch.zeros(0)}, {}, r"v of model.layers.1.b has the shape \(0,\); expected \(·, 4\)"),
        ({"u.model.layers.0.a": torch.zeros(5, 3)}, {}, r"u of model.layers.0.a has the shape \(5, 3\)"),
        ({"scores": torch.zeros(90)}, {}, r"scores of shape \(90,\); expected \(rows, 10\)"),
        ({"scores": torch.tensor(1.0)}, {}, r"scores of shape \(\); expected \(rows, 10\)"),
        ({}, {RECORD: "{oops"}, "record is no JSON"),
        ({}, {RECORD: "[]"}, "record is a list; expected a mapping"),
    ],
)
def test_bases_scores_and_records_of_other_shapes_are_refused(tensors, metadata, message, tmp_path):
    path = tmp_path / "f.safetensors"
    FisherFile(random_fisher(LowRankAccumulator), *bases(), {}).save(path)
    rewritten(path, tensors, metadata)
    with pytest.raises(InputError, match=rf"f\.safetensors: .*{message}"):
        load_fisher(path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("count", "7", "'count' of its record is '7'; expected a whole number"),
        ("count", 5.5, "'count' of its record is 5.5; expected a whole number"),
        ("shapes", 5, "'shapes' of its record is 5; expected a list"),
        ("shapes", [[2], [1, 4]], "expected two sides a module"),
        ("rows", 5, "'rows' of its record is 5; expected a list"),
        ("rows", [5], "'rows' of its record holds what is no text"),
        ("base", [], "'base' of its record is .*; expected a mapping"),
        ("seen", 3, "'seen' of its record is 3; expected a list"),
    ],
)
def test_entries_of_another_kind_in_a_record_are_refused(key, value, message, tmp_path):
    path = tmp_path / "f.safetensors"
    FisherFile(random_fisher(LowRankAccumulator), *bases(), {}).save(path)
    with safe_open(path, "pt") as handle:
        record = json.loads(handle.metadata()[RECORD])
    rewritten(path, {}, {RECORD: json.dumps(record | {key: value})})
    with pytest.raises(InputError, match=rf"f\.safetensors: .*{message}"):
        load_fisher(path)


@pytest.mark.parametrize(
    ("kind", "tensors", "message"),
    [
        (BlockAccumulator, {"block.model.layers.1.b": torch.zeros(2, 4)}, r"expected floats of \(2, 4, 4\)"),
        (BlockAccumulator, {"counts": torch.tensor(9.0)}, "expected one or two halves"),
        (DiagonalAccumulator, {"diagonal.model.layers.0.a": torch.zeros(1, 6)}, r"expected floats of \(2, 6\)"),
        (KroneckerAccumulator, {"left.model.layers.0.a": torch.zeros(2, 3, 3)}, r"expected floats of \(2, 2, 2\)"),
        (KroneckerAccumulator, {"tokens.model.layers.0.a": torch.zeros(())}, r"expected floats of \(2,\)"),
        (
            LowRankAccumulator,
            {"scores": torch.zeros(9, 10, dtype=torch.int32)},
            "scores are torch.int32; expected floats",
        ),
        (LowRankAccumulator, {"groups": torch.zeros(3, dtype=torch.int64)}, r"groups is .*; expected \(9,\)"),
        (LowRankAccumulator, {"groups": torch.zeros(9)}, r"groups is torch.float32"),
        (LowRankAccumulator, {"weights": torch.zeros(9)}, "weights of examples that are not above 0"),
        (LowRankAccumulator, {"mean.halves": torch.zeros(1, 10)}, r"mean.halves is .*; expected floats of \(2, 10\)"),
    ],
)
def test_tensors_of_another_shape_are_refused(kind, tensors, message, tmp_path):
    path = tmp_path / "f.safetensors"
    FisherFile(random_fisher(kind), *bases(), {}).save(path)
    rewritten(path, tensors, {})
    with pytest.raises(InputError, match=rf"f\.safetensors: .*{message}"):
        load_fisher(path)


def weighted(kind, weights, ids):
    """A Fisher matrix of one module, whose rows have weights, two draws of labels each."""
    draw = torch.Generator().manual_seed(0)
    accumulator = kind({"m": (2, 3)})
    for _ in range(2):
        accumulator.begin(examples(torch.arange(len(ids)), ids, draws=2, row_weights=weights))
        shape = (len(ids), 4)
        accumulator.update(
            "m",
            torch.randn(*shape, 2, generator=draw, dtype=torch.float64),
            torch.randn(*shape, 3, generator=draw, dtype=torch.float64),
        )
    return accumulator.finish()


def dense_twin(kind, w, d, x):
    """What a kind makes of passes (n) of weights w, output gradients d (n, T, p) and inputs x (n, T, q)."""
    if kind is KroneckerAccumulator:
        relevant = d.any(2).double()
        left = torch.einsum("n,ntp,ntq->pq", w, d, d) / w.sum()
        return torch.kron(left, torch.einsum("n,nt,ntp,ntq->pq", w, relevant, x, x) / (w @ relevant.sum(1)))
    scores = torch.einsum("ntp,ntq->npq", d, x).flatten(1)
    if kind is MeanAccumulator:
        return w @ scores / w.sum()
    exact = torch.einsum("n,np,nq->pq", w, scores, scores) / w.sum()
    return exact.diag().diag() if kind is DiagonalAccumulator else exact


@pytest.mark.parametrize("kind", [*ACCUMULATORS, MeanAccumulator])
@pytest.mark.parametrize("granularity", ["sequence", "token"])
@pytest.mark.parametrize("draws", [1, 3])
def test_weighted_rows_and_several_draws_are_the_mean_over_all_passes(kind, granularity, draws):
    """Every row, or each of its answer tokens, counts with w/draws in each draw; padding has no gradient."""
    draw, ids, accumulator = torch.Generator().manual_seed(0), [f"r{i}" for i in range(7)], kind({"m": (2, 3)})
    weights = torch.tensor([3.0, 0.5, 1.0, 2.0, 0.25, 1.5, 4.0], dtype=torch.float64)
    lengths = torch.tensor([4, 1, 2, 3, 4, 2, 1])
    weights /= (weights @ lengths.double() / lengths.sum()) if granularity == "token" else weights.mean()
    passes = []
    for _, token in itertools.product(range(draws), range(4 if granularity == "token" else 1)):
        present = lengths > token if granularity == "token" else None
        d, x = (torch.randn(7, 4, side, generator=draw, dtype=torch.float64) for side in (2, 3))
        d[torch.arange(4) >= lengths[:, None]] = 0.0
        accumulator.begin(
            examples(torch.arange(7), ids, draws=draws, present=present, token=token, row_weights=weights)
        )
        accumulator.update("m", d, x)
        passes.append((weights / draws * (1.0 if present is None else present), d, x))
    w, d, x = (torch.cat(each) for each in zip(*passes, strict=True))
    in_half = torch.tensor([row_half(row) for row in ids]).repeat(len(passes))
    expected = [dense_twin(kind, w * chosen, d, x) for chosen in (1.0, in_half == 0, in_half == 1)]
    if kind is MeanAccumulator:
        scores = accumulator.finish()
        found = [scores.mean, *scores.halves]
    else:
        fisher = accumulator.finish()
        halves = fisher.named(ids).row_halves() if kind is LowRankAccumulator else fisher.row_halves()
        found = [one.dense() for one in (fisher, *halves)]
        assert fisher.count == (lengths.sum() if granularity == "token" else 7)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_halves_of_weighted_rows_are_those_of_a_block(tmp_path):
    weights = torch.tensor([3.0] * 5 + [0.5] * 8, dtype=torch.float64)
    weights, ids = weights / weights.mean(), [f"r{i}" for i in range(13)]
    block, lowrank = (weighted(kind, weights, ids) for kind in (BlockAccumulator, LowRankAccumulator))
    u, v = {"m": torch.eye(5, 2).double()}, {"m": torch.eye(6, 3).double()}
    FisherFile(lowrank, u, v, {"rows": ids}).save(tmp_path / "f.safetensors")
    read = load_fisher(tmp_path / "f.safetensors").fisher
    torch.testing.assert_close(read.dense(), block.dense())
    for one, two in zip(read.row_halves(), block.row_halves(), strict=True):
        torch.testing.assert_close(one.dense(), two.dense())
        assert one.trace() == pytest.approx(two.trace())


def test_halves_of_a_mean_are_those_of_a_block():
    ids = [[f"{set_}/{i}" for i in range(n)] for set_, n in (("a", 13), ("b", 5))]
    parts = {kind: [weighted(kind, None, own) for own in ids] for kind in (BlockAccumulator, LowRankAccumulator)}
    block = weighted_mean(parts[BlockAccumulator], [1.0, 3.0])
    named = [fisher.named(own) for fisher, own in zip(parts[LowRankAccumulator], ids, strict=True)]
    lowrank = weighted_mean(named, [1.0, 3.0])
    torch.testing.assert_close(lowrank.dense(), block.dense())
    for one, two in zip(lowrank.row_halves(), block.row_halves(), strict=True):
        torch.testing.assert_close(one.dense(), two.dense())
