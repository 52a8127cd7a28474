"""The mean magnitude of every weight's gradient, ``m_j = (1/n) Σ_i |g_{i,j}|``, for LED-Merging (2502.16770).

No Fisher matrix, though measured, stored and added up like its diagonal; the diagonal does not hold it, as the root of
a mean of squares is no mean of magnitudes. In weight coordinates only: entries of a core depend on the basis chosen.

Legend of shapes: N examples, p and q sides of a weight.
"""

from dataclasses import dataclass

import torch

from src.fisher.diagonal import CoordinateAccumulator, PerCoordinate


@dataclass(frozen=True)
class Magnitude(PerCoordinate):
    """Per-weight mean magnitudes; the trace is their sum. It has no products with vectors and solves no pencil."""

    representation = "magnitude"

    def module_product(self, name: str, vectors: torch.Tensor) -> torch.Tensor:
        """Refused.

        Raises:
            ValueError: always.
        """
        raise ValueError("mean magnitudes of gradients are no Fisher matrix: they have no products with vectors")


class MagnitudeAccumulator(CoordinateAccumulator[Magnitude]):
    """Accumulates :class:`Magnitude`."""

    kind = Magnitude

    def measure_(self, scores: torch.Tensor) -> torch.Tensor:
        """``|g|``."""
        return scores.abs_()
