"""Low-rank pairs: ``delta = B A`` per module, scaling folded in, and exact sums of them.

Legend of shapes: O output features, I input features, R rank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from src.errors import InputError

Pairs = dict[str, "LowRankPair"]


@dataclass(frozen=True)
class LowRankPair:
    """One module's update ``delta = b @ a``: ``a`` is (R, I), ``b`` is (O, R) and holds the adapter's scaling."""

    a: torch.Tensor
    b: torch.Tensor

    def __post_init__(self) -> None:
        if self.a.ndim != 2 or self.b.ndim != 2 or self.a.shape[0] != self.b.shape[1]:
            raise ValueError(f"a {tuple(self.a.shape)} and b {tuple(self.b.shape)} do not form a low-rank pair")

    @classmethod
    def zero(cls, shape: tuple[int, int]) -> "LowRankPair":
        """An update (O, I) of rank 0, which changes nothing."""
        return cls(torch.zeros(0, shape[1]), torch.zeros(shape[0], 0))

    @property
    def rank(self) -> int:
        """Inner dimension R (an upper bound of the rank of the product)."""
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I) of the dense update."""
        return self.b.shape[0], self.a.shape[1]

    def dense(self) -> torch.Tensor:
        """The update as a (O, I) matrix, in float64."""
        return self.b.double() @ self.a.double()

    def block(self, rows: slice) -> torch.Tensor:
        """Some rows of the update, in the factors' number format."""
        return self.b[rows] @ self.a.to(self.b.dtype)

    def scaled(self, factor: float) -> "LowRankPair":
        """The pair of ``factor * delta``."""
        return LowRankPair(self.a, self.b * factor)

    def squared_norm(self) -> float:
        """Squared Frobenius norm of the update, without forming it: tr((BᵀB)(AAᵀ))."""
        a, b = self.a.double(), self.b.double()
        return ((b.T @ b) * (a @ a.T)).sum().item()


NOT_FINITE = "holds NaN or infinite values after the merge; expected weights and strengths that keep it finite"


def finite_values(name: str, values: torch.Tensor) -> torch.Tensor:
    """The values that are to be written under this name.

    Raises:
        InputError: they are not all finite numbers.
    """
    if not torch.isfinite(values).all():
        raise InputError(f"{name}: {NOT_FINITE}")
    return values


def weighted_sum(adapters: Sequence[Mapping[str, LowRankPair]], weights: Sequence[float]) -> Pairs:
    """``sum_i w_i delta_i`` per module, exactly, by stacking factors; a module that an adapter lacks adds nothing.

    An adapter of weight 0 adds no rank.

    Raises:
        ValueError: the numbers of adapters and weights differ, or two updates of a module differ in shape.
    """
    if len(adapters) != len(weights):
        raise ValueError(f"{len(adapters)} adapters but {len(weights)} weights")
    total: Pairs = {}
    for pairs, weight in zip(adapters, weights, strict=True):
        for name, pair in pairs.items():
            if weight != 0.0:
                total[name] = _stacked(name, total[name], pair.scaled(weight)) if name in total else pair.scaled(weight)
    return total


def _stacked(name: str, first: LowRankPair, second: LowRankPair) -> LowRankPair:
    if first.shape != second.shape:
        raise ValueError(f"{name}: updates of shapes {first.shape} and {second.shape} cannot be added")
    dtype = torch.promote_types(first.a.dtype, second.a.dtype)
    return LowRankPair(
        torch.cat([first.a.to(dtype), second.a.to(dtype)], dim=0),
        torch.cat([first.b.to(dtype), second.b.to(dtype)], dim=1),
    )
