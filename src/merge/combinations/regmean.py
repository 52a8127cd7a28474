"""RegMean (2212.09849): the update whose outputs are closest to each expert's on that expert's own inputs.

    ΔWᵀ = (Σ w_i G_i)⁻¹ Σ w_i G_i ΔW_iᵀ,   G_i = X_iᵀX_i with off-diagonals times a

Stated for weights, it holds for updates alike, as the base's weights cancel. With ΔW_i = B_i A_i the result is
``Σ B_i (w_i A_i G_i (Σ w_j G_j)⁻¹)``: low-rank in, low-rank out, exactly. In the space V of all experts' inputs
(A_i to A_i V, G_i to Vᵀ G_i V) it is the least-squares routing of 2606.10617.

Legend of shapes: O output features, I input features, R rank.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch

from src.adapters.deltas import Deltas, LazyDelta
from src.adapters.geometry import orthonormal, spaces
from src.adapters.pairs import LowRankPair
from src.errors import InputError
from src.fisher.kronecker import KroneckerFisher
from src.merge.combination import Combination, Combined, Expert, common_shape
from src.merge.ranges import above_zero, share
from src.merge.weight_fishers import Latest, changed_modules, fishers_of, module_fisher

ROUNDING = 4 * torch.finfo(torch.float32).eps
"""Times √I, what float32 products of a pass leave of an eigenvalue that is 0, of a matrix whose diagonal is 1."""


class RegMean(Combination):
    """RegMean (2212.09849): the update whose outputs are closest to each expert's on that expert's own inputs.

    Low-rank for low-rank experts, exactly (rank Σ r_i). Needs Fisher files, ``--fisher [DIR, …]``, one directory per
    utility adapter, each measured with that adapter alone (``--model.utility``) by ``--model.coordinates weight
    --model.representation kronecker``: the input factor of such a file is XᵀX per token, over the tokens that the
    answers' loss depends on (the paper takes all tokens). Where an input was zero on all of them (a neuron that never
    fired; in ``core``, a direction), updates of it are averaged. As a method, the safety adapter is one more expert,
    with the inputs of F_s measured at itself: ``--model.reference_safety {safety: 1.0}``.

    Args:
        off_diagonal: Factor of off-diagonal elements of XᵀX, 0 to 1 (the paper's .9; its code has 1 where not told).
        space: ``weight`` takes inputs as they are; ``core`` takes them within the span of the experts' own inputs.
        weight_safety: w of the safety expert where it is one more expert of the method.
    """

    needs_fisher = True
    AS_METHOD = ("weight_safety",)
    coordinates = "weight"
    representations = ("kronecker",)
    measured: ClassVar[Mapping[str, str]] = {"granularity": "sequence"}

    def __init__(
        self,
        off_diagonal: float = 0.9,
        space: Literal["weight", "core"] = "weight",
        weight_safety: float = 1.0,
    ) -> None:
        self.off_diagonal, self.space = share(off_diagonal, "RegMean off_diagonal", zero=True), space
        self.weight_safety = above_zero(weight_safety, "RegMean weight_safety")

    def combine(self, experts: Sequence[Expert]) -> Combined:
        """The least-squares update of every module.

        Raises:
            InputError: a Fisher matrix is missing, or a summed Gram matrix is singular.
        """
        fishers = fishers_of(experts, self.name)
        if min(expert.weight for expert in experts) <= 0:
            raise InputError("RegMean expects utility_weights above 0")
        latest = Latest()
        deltas: Deltas = {}
        for name in changed_modules(experts):
            shape = common_shape(name, experts)
            own = []
            for fisher, expert in zip(fishers, experts, strict=True):
                found = module_fisher(fisher, name, shape, expert.called)
                if not isinstance(found, KroneckerFisher):
                    raise InputError(
                        f"RegMean needs Fisher files of the representation kronecker, not {found.representation}"
                    )
                own.append(found)
            try:
                deltas[name] = self._merged(name, shape, experts, own, latest)
            except ValueError as error:
                raise InputError(f"RegMean: {name}: {error}") from None
        return Combined(deltas)

    def _merged(
        self,
        name: str,
        shape: tuple[int, int],
        experts: Sequence[Expert],
        fishers: Sequence[KroneckerFisher],
        latest: Latest,
    ) -> LowRankPair | LazyDelta:
        weights = [expert.weight for expert in experts]
        pairs = [expert.deltas.get(name, LowRankPair.zero(shape)) for expert in experts]
        low = [pair for pair in pairs if isinstance(pair, LowRankPair)]
        if len(low) == len(pairs):
            v = _input_space(low) if self.space == "core" else None
            return regmean_pairs(low, _grams(fishers, name), weights, off_diagonal=self.off_diagonal, v=v)
        if self.space == "core":
            raise ValueError("the core space is that of low-rank updates, and one is full-rank")

        def compute() -> torch.Tensor:
            # Gram matrices are made here and not kept: they are as large as the weights, or larger.
            return regmean([d.dense() for d in pairs], _grams(fishers, name), weights, off_diagonal=self.off_diagonal)

        return LazyDelta(shape, lambda rows: latest.rows(name, compute, rows))


def _grams(fishers: Sequence[KroneckerFisher], name: str) -> list[torch.Tensor]:
    """XᵀX of each expert's inputs of a module, (I, I), per token."""
    return [fisher.factors(name)[1] for fisher in fishers]


def _input_space(pairs: Sequence[LowRankPair]) -> torch.Tensor:
    """(I, q) basis of all input spaces; from balanced factors, so that it does not depend on how an update is factored.

    What is off the diagonal depends on the basis.
    """
    balanced = [(sigma.sqrt(), v) for pair in pairs if pair.rank for _, sigma, v in (spaces(pair),)]
    return orthonormal([v * root for root, v in balanced])[0]


def regmean_pairs(
    pairs: Sequence[LowRankPair],
    grams: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    off_diagonal: float,
    v: torch.Tensor | None = None,
) -> LowRankPair:
    """The merged update of low-rank ones, as factors of rank Σ R_i in float64.

    Args:
        pairs: ΔW_i.
        grams: XᵀX of each expert's inputs, (I, I), on one scale (per token).
        weights: One per expert.
        off_diagonal: Factor of off-diagonal elements, 0 to 1.
        v: (I, q) orthonormal basis of the space in which inputs are taken; unset means all of it.

    Raises:
        ValueError: the summed Gram matrix is singular.
    """
    inside = list(grams) if v is None else [v.T @ gram.double() @ v for gram in grams]
    scaled = _scaled(inside, weights, off_diagonal)
    rows = [pair.a.double() if v is None else pair.a.double() @ v for pair in pairs]
    moved = torch.cat([a @ gram for a, gram in zip(rows, scaled, strict=True)])
    a = torch.cholesky_solve(moved.T, _factor(scaled)).T
    return LowRankPair((a if v is None else a @ v.T).contiguous(), torch.cat([p.b.double() for p in pairs], dim=1))


def shrunk(gram: torch.Tensor, off_diagonal: float) -> torch.Tensor:
    """(I, I) Gram matrix with its off-diagonal elements times ``off_diagonal`` (the paper's .9)."""
    return off_diagonal * gram + (1 - off_diagonal) * torch.diag(gram.diagonal())


def regmean(
    updates: Sequence[torch.Tensor],
    grams: Sequence[torch.Tensor],
    weights: Sequence[float] | None = None,
    *,
    off_diagonal: float = 0.9,
) -> torch.Tensor:
    """(O, I) merged update, float64.

    Args:
        updates: ΔW_i, (O, I) each.
        grams: XᵀX of the inputs that expert i sees, (I, I) each, on one scale (per token).
        weights: One per expert; unset means 1 for each.
        off_diagonal: Factor of off-diagonal elements, 0 to 1.

    Raises:
        ValueError: the summed Gram matrix is singular: fewer tokens than features, and off-diagonals not shrunk.
    """
    given = weights or [1.0] * len(updates)
    scaled = _scaled(grams, given, off_diagonal)
    right = torch.stack([g @ d.double().T for g, d in zip(scaled, updates, strict=True)]).sum(0)
    return torch.cholesky_solve(right, _factor(scaled)).T


def _scaled(grams: Sequence[torch.Tensor], weights: Sequence[float], off_diagonal: float) -> list[torch.Tensor]:
    """The shrunk Gram matrices times their weights.

    Inputs that were zero for every expert tell nothing: as if all had seen them alike, updates of them are averaged.
    """
    dead = torch.stack([bool(w) * gram.diagonal() for w, gram in zip(weights, grams, strict=True)]).sum(0) == 0
    alike = torch.diag(dead.double())
    return [w * (shrunk(g.double(), off_diagonal) + alike) for w, g in zip(weights, grams, strict=True)]


def _factor(scaled: Sequence[torch.Tensor]) -> torch.Tensor:
    """Cholesky factor of the sum; singular also where nothing but rounding makes it regular."""
    total = torch.stack(list(scaled)).sum(0)
    factor, failed = torch.linalg.cholesky_ex(total)
    if failed or smallest_eigenvalue(factor, total.diagonal()) < ROUNDING * len(total) ** 0.5:
        raise ValueError("the summed Gram matrix is singular; more tokens or a smaller off_diagonal make it regular")
    return factor


def smallest_eigenvalue(factor: torch.Tensor, diagonal: torch.Tensor, *, steps: int = 8) -> float:
    """The smallest eigenvalue of a matrix scaled to a diagonal of ones, about (from above), by inverse iteration.

    Args:
        factor: (I, I) its Cholesky factor.
        diagonal: (I,) its diagonal.
        steps: Number of iterations, each a solve.
    """
    root = diagonal.sqrt()
    x = torch.randn(len(root), dtype=factor.dtype, generator=torch.Generator().manual_seed(0))
    for _ in range(steps):
        x = root * torch.cholesky_solve((root * x / x.norm())[:, None], factor).squeeze(1)
    return 1 / x.norm().item()
