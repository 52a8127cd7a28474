"""The exact inverse of a ridged Fisher matrix against numpy, on random, badly scaled and rank-deficient matrices."""

import numpy as np
import pytest
import torch

from src.fisher.accumulate import examples
from src.fisher.block import BlockAccumulator
from src.fisher.diagonal import DiagonalAccumulator
from src.fisher.kronecker import KroneckerAccumulator
from src.fisher.lowrank_accumulator import LowRankAccumulator
from src.fisher.magnitude import MagnitudeAccumulator
from src.gevp.inverse import ridged

SHAPES = {"a": (2, 3), "b": (1, 4), "c": (3, 3)}
DIM = 19
KINDS = [LowRankAccumulator, BlockAccumulator, KroneckerAccumulator, DiagonalAccumulator]


def random_fisher(kind, rows=9, *, spread=0.0, zero=(), tokens=3):
    """A Fisher matrix whose coordinates' squared scores range over 10^spread."""
    draw, accumulator = torch.Generator().manual_seed(1), kind(SHAPES)
    accumulator.begin(examples(torch.arange(rows), [str(i) for i in range(rows)]))
    for name, (p, q) in SHAPES.items():
        delta = torch.randn(rows, tokens, p, generator=draw, dtype=torch.float64) * (name not in zero)
        x = torch.randn(rows, tokens, q, generator=draw, dtype=torch.float64)
        accumulator.update(name, delta * 10 ** -(spread / 2 * torch.rand(p, generator=draw).double()), x)
    return accumulator.finish()


def patch():
    return torch.randn(DIM, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "zero"), [(9, ()), (1, ()), (40, ()), (9, ("b",)), (2, ("a", "c"))])
@pytest.mark.parametrize("spread", [0.0, 12.0])
@pytest.mark.parametrize("rho", [0.1, 1e-6])
def test_the_inverse_and_the_extreme_eigenvalues_equal_numpy(kind, rows, zero, spread, rho):
    fisher, vector = random_fisher(kind, rows, spread=spread, zero=zero), patch()
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
    torch.testing.assert_close(side.inverse(patch()), 2 * patch())
    assert (side.low, side.high) == (0.5, 0.5)


def test_what_is_no_matrix_is_refused():
    with pytest.raises(ValueError, match="representation magnitude: expected lowrank, block"):
        ridged(random_fisher(MagnitudeAccumulator), 0.5)
