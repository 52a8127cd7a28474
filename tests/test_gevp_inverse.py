"""The exact inverse of a ridged Fisher matrix against numpy, on random, badly scaled and rank-deficient matrices."""

from functools import partial

import numpy as np
import pytest
import torch

from src.fisher.block import BlockAccumulator
from src.fisher.diagonal import DiagonalAccumulator
from src.fisher.kronecker import KroneckerAccumulator
from src.fisher.lowrank_accumulator import LowRankAccumulator
from src.fisher.magnitude import MagnitudeAccumulator
from src.gevp.inverse import ridged
from tests import tiny
from tests.tiny import random_patch

SHAPES = {"a": (2, 3), "b": (1, 4), "c": (3, 3)}
DIM = 19
KINDS = [LowRankAccumulator, BlockAccumulator, KroneckerAccumulator, DiagonalAccumulator]
random_fisher = partial(tiny.random_fisher, seed=1, spread=0.0, shapes=SHAPES)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "zero"), [(9, ()), (1, ()), (40, ()), (9, ("b",)), (2, ("a", "c"))])
@pytest.mark.parametrize("spread", [0.0, 12.0])
@pytest.mark.parametrize("rho", [0.1, 1e-6])
def test_the_inverse_and_the_extreme_eigenvalues_equal_numpy(kind, rows, zero, spread, rho):
    fisher, vector = random_fisher(kind, rows, spread=spread, zero=zero), random_patch(DIM)
    epsilon = rho * fisher.trace() / DIM
    dense = fisher.dense().numpy() + epsilon * np.eye(DIM)
    side, (low, *_, high) = ridged(fisher, epsilon), np.linalg.eigvalsh(dense)
    expected = np.linalg.solve(dense, vector.numpy())
    found = side.inverse(vector)
    # As exact as the condition allows, and no residual but rounding.
    assert np.linalg.norm(found.numpy() - expected) < 1e-14 * high / low * np.linalg.norm(expected)
    assert (side.product(found) - vector).norm() < 1e-14 * (vector.norm() + high * found.norm())
    np.testing.assert_allclose([side.low, side.high], [low, high], rtol=1e-14 * high / low)


def test_a_matrix_of_zeros_is_its_ridge():
    side = ridged(None, 0.5)
    torch.testing.assert_close(side.inverse(random_patch(DIM)), 2 * random_patch(DIM))
    assert (side.low, side.high) == (0.5, 0.5)


def test_what_is_no_matrix_is_refused():
    with pytest.raises(ValueError, match="representation magnitude: expected lowrank, block"):
        ridged(random_fisher(MagnitudeAccumulator), 0.5)
