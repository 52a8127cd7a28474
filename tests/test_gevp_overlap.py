"""Overlap of two Fisher matrices against dense eigenvectors, scipy's principal angles and scipy's Spearman."""

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles
from scipy.stats import spearmanr

from src.fisher.accumulate import examples
from src.fisher.block import BlockAccumulator
from src.fisher.diagonal import DiagonalAccumulator
from src.fisher.kronecker import KroneckerAccumulator
from src.fisher.lowrank import LowRankFisher
from src.fisher.lowrank_accumulator import LowRankAccumulator
from src.gevp.overlap import overlap, spearman

SHAPES = {"model.layers.0.a": (2, 3), "model.layers.1.b": (3, 2), "model.layers.1.c": (2, 2)}
KINDS = [LowRankAccumulator, BlockAccumulator, KroneckerAccumulator, DiagonalAccumulator]


def made(kind, rows=9, seed=0):
    draw, accumulator = torch.Generator().manual_seed(seed), kind(SHAPES)
    accumulator.begin(examples(torch.arange(rows), [f"{seed}/{i}" for i in range(rows)]))
    for name, (p, q) in SHAPES.items():
        accumulator.update(name, *(torch.randn(rows, 3, side, generator=draw, dtype=torch.float64) for side in (p, q)))
    return accumulator.finish()


def dense_leading(fisher, count):
    """The definition: eigenvectors of the dense matrix."""
    return np.linalg.eigh(fisher.dense().numpy())[1][:, ::-1][:, :count]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("directions", [1, 4])
def test_angles_equal_those_of_dense_eigenvectors(kind, directions):
    safety, utility = made(kind, seed=1), made(kind, 8, seed=2)
    found = overlap(safety, utility, directions)
    angles = subspace_angles(dense_leading(safety, directions), dense_leading(utility, directions))[::-1]
    np.testing.assert_allclose(found["angles"], np.degrees(angles), atol=1e-5)
    assert found["directions"] == directions
    assert found["shared"] == pytest.approx(np.mean(np.cos(angles) ** 2), abs=1e-9)
    assert found["chance"] == pytest.approx(directions / safety.dim)


@pytest.mark.parametrize("kind", KINDS)
def test_diagonals_and_their_rank_correlation_equal_the_dense_ones(kind):
    safety, utility = made(kind, seed=1), made(kind, seed=2)
    dense = [fisher.dense().diagonal() for fisher in (safety, utility)]
    torch.testing.assert_close(safety.diagonal(), dense[0])
    expected = spearmanr(dense[0].numpy(), dense[1].numpy()).statistic
    assert overlap(safety, utility)["spearman"] == pytest.approx(expected, abs=1e-12)


def test_a_matrix_overlaps_with_itself_and_not_with_its_complement():
    scores = torch.eye(6, dtype=torch.float64)
    one, two = LowRankFisher(scores[:3] * 2, 3), LowRankFisher(scores[3:], 3)
    same, other = overlap(one, one), overlap(one, two)
    assert same["directions"] == 3  # the rank, under the number asked for
    assert same["shared"] == pytest.approx(1.0)
    assert same["spearman"] == pytest.approx(1.0)
    assert other["angles"] == pytest.approx([90.0] * 3)
    assert other["shared"] == pytest.approx(0.0, abs=1e-12)


def test_random_spaces_share_what_chance_says():
    draw = torch.Generator().manual_seed(0)
    scores = [torch.randn(8, 400, generator=draw, dtype=torch.float64) for _ in range(40)]
    pairs = zip(scores[::2], scores[1::2], strict=True)
    found = [overlap(LowRankFisher(a, 8), LowRankFisher(b, 8)) for a, b in pairs]
    assert np.mean([one["shared"] for one in found]) == pytest.approx(found[0]["chance"], rel=0.2)


def test_the_smaller_of_two_spaces_is_compared_with_the_whole_of_the_larger():
    draw = torch.Generator().manual_seed(0)
    few, many = (torch.randn(rows, 400, generator=draw, dtype=torch.float64) for rows in (3, 8))
    many[0] += 3 * few[0]
    angles = np.degrees(subspace_angles(few.numpy().T, many.numpy().T))[::-1]
    for pair in ((few, many), (many, few)):
        found = overlap(*(LowRankFisher(scores, len(scores)) for scores in pair))
        assert found["directions"] == 3
        assert found["chance"] == pytest.approx(8 / 400)
        np.testing.assert_allclose(found["angles"], angles, atol=1e-6)
        assert found["shared"] == pytest.approx(np.mean(np.cos(np.radians(angles)) ** 2))


def test_spearman_takes_mean_ranks_and_is_undefined_for_a_constant():
    one, two = torch.tensor([1.0, 2.0, 2.0, 5.0, 0.0]), torch.tensor([3.0, 1.0, 4.0, 4.0, 4.0])
    assert spearman(one, two) == pytest.approx(spearmanr(one.numpy(), two.numpy()).statistic)
    assert spearman(one, torch.ones(5)) is None


def test_a_zero_matrix_has_no_directions_and_unlike_ones_are_refused():
    zero = LowRankFisher(torch.zeros(2, 16, dtype=torch.float64), 2)
    assert overlap(made(LowRankAccumulator), zero) is None
    with pytest.raises(ValueError, match="expected one representation"):
        overlap(made(LowRankAccumulator), made(BlockAccumulator))
