"""Fisher-weighted averaging (2111.09832), diagonal or Kronecker-factored.

    diagonal    ΔW = Σ λ_i F_i ⊙ ΔW_i / Σ λ_i F_i
    Kronecker   Σ λ_i L_i ΔW R_i = Σ λ_i L_i ΔW_i R_i,   F_i = L_i ⊗ R_i

with λ_i ← λ_i / ‖F_i‖₂ where normalised. The base's weights cancel, so updates are averaged directly. ‖F_i‖₂ is the
norm of the diagonal of expert i over all modules that any expert changes. As in the authors' code the first expert's
F_1 is at least the floor (1e-6), in its own units and after its norm was taken: a weight that no data has seen keeps
the first expert's value.

The Kronecker system is solved by conjugate gradients, in coordinates Y of ``ΔW = V Y Wᵀ`` in which the factors of the
first expert and the sums of all are diagonal (generalised eigenvectors: ``Vᵀ L_1 V = diag``, ``Vᵀ (Σ λ_i L_i) V = I``,
the same with R and W), preconditioned by its diagonal. For two experts the diagonal is the whole: one step solves it.

Legend of shapes: O output features, I input features.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Literal

import scipy.linalg
import torch

from src.adapters.deltas import Delta, Deltas, LazyDelta
from src.adapters.pairs import LowRankPair
from src.errors import InputError
from src.fisher.base import Fisher
from src.fisher.diagonal import DiagonalFisher
from src.fisher.kronecker import KroneckerFisher
from src.merge.combination import Combination, Combined, Expert, common_shape
from src.merge.ranges import above_zero
from src.merge.weight_fishers import Latest, changed_modules, diagonal_norm, fishers_of, module_fisher, per_weight

log = logging.getLogger(__name__)

FLOOR, RIDGE = 1e-6, 1e-3
MOST_STEPS = 1000
TOLERANCE = 1e-9
"""Smallest residual in units of the first, in the norm of the preconditioner."""
TINY = 1e-300


class FisherAverage(Combination):
    """Fisher-weighted average (2111.09832): every weight from the experts whose data care about it. Full rank.

    Needs ``--fisher [DIR, …]``, one per utility adapter, each measured with that adapter alone (``--model.utility``) in
    weight coordinates: ``--model.coordinates weight --model.representation diagonal`` (the paper's) or ``kronecker``.
    As a method, the safety adapter is one more expert, weighed by F_s of one directory; for the paper's F_s measure it
    at the safety expert itself, ``--model.reference_safety {safety: 1.0}``. The paper's strength is λ of the safety
    expert: keep alpha 1 and sweep ``weight_safety``.

    Args:
        normalise: Divide each weight by the norm of its expert's Fisher matrix (``diagonal`` only).
        floor: ``diagonal``: smallest Fisher information of a weight (unset means 1e-6); ``kronecker``: ridge of each
            factor, relative to its mean eigenvalue (unset means 1e-3), so that what no data has seen is averaged.
        floored: ``diagonal``: what the floor is for: ``first`` as in the authors' code, F of the first expert before
            it is normalised; ``normalised`` F of every expert afterwards, which takes plain means of the many weights
            that matter less than most.
        weight_safety: λ of the safety expert where it is one more expert of the method.
    """

    full_rank = True
    needs_fisher = True
    AS_METHOD = ("weight_safety",)
    coordinates = "weight"
    representations = ("diagonal", "kronecker")

    def __init__(
        self,
        normalise: bool = True,
        floor: float | None = None,
        floored: Literal["first", "normalised"] = "first",
        weight_safety: float = 1.0,
    ) -> None:
        if floor is not None:
            above_zero(floor, "FisherAverage floor")
        self.normalise, self.floor, self.floored = normalise, floor, floored
        self.weight_safety = above_zero(weight_safety, "FisherAverage weight_safety")

    def combine(self, experts: Sequence[Expert]) -> Combined:
        """The weighted average, evaluated module by module."""
        fishers = fishers_of(experts, self.name)
        weights = [expert.weight for expert in experts]
        if min(weights) <= 0:
            raise InputError(f"utility_weights are {weights}; FisherAverage expects numbers above 0")
        self._tell_unread(fishers)
        names = changed_modules(experts)
        norms = [diagonal_norm(f, names) if self.normalise and isinstance(f, DiagonalFisher) else 1.0 for f in fishers]
        latest = Latest()
        deltas: Deltas = {}
        for name in names:
            shape = common_shape(name, experts)
            updates = [expert.deltas.get(name, LowRankPair.zero(shape)) for expert in experts]
            own = [module_fisher(f, name, shape, e.called) for f, e in zip(fishers, experts, strict=True)]
            diagonal = [f for f in own if isinstance(f, DiagonalFisher)]
            factored = [f for f in own if isinstance(f, KroneckerFisher)]
            if len(diagonal) == len(own):
                deltas[name] = self._diagonal(name, shape, updates, diagonal, weights, norms)
            elif len(factored) == len(own):
                deltas[name] = self._kronecker(name, shape, updates, factored, weights, latest)
            else:
                raise InputError("FisherAverage: experts' Fisher files of different representations; measure all alike")
        return Combined(deltas)

    def _tell_unread(self, fishers: Sequence[Fisher]) -> None:
        """Say which options of the diagonal form Kronecker factors leave unread."""
        if all(isinstance(fisher, KroneckerFisher) for fisher in fishers):
            for option in self.changed(dict.fromkeys(("normalise", "floored"), "")):
                log.warning("FisherAverage %s has no effect here: it is read with diagonal Fisher files", option)

    def _diagonal(
        self,
        name: str,
        shape: tuple[int, int],
        updates: Sequence[Delta],
        fishers: Sequence[DiagonalFisher],
        weights: Sequence[float],
        norms: Sequence[float],
    ) -> LazyDelta:
        diagonals = [per_weight(fisher, name) for fisher in fishers]

        def evaluate(rows: slice) -> torch.Tensor:
            given = [d.block(rows) for d in diagonals]
            blocks = [update.block(rows) for update in updates]
            return diagonal_average(
                blocks, given, weights, norms=norms, floor=self.floor or FLOOR, floored=self.floored
            )

        return LazyDelta(shape, evaluate)

    def _kronecker(
        self,
        name: str,
        shape: tuple[int, int],
        updates: Sequence[Delta],
        fishers: Sequence[KroneckerFisher],
        weights: Sequence[float],
        latest: Latest,
    ) -> LazyDelta:
        def compute() -> torch.Tensor:
            ridge = self.floor or RIDGE
            left, right = zip(*(fisher.factors(name) for fisher in fishers), strict=True)
            try:
                return kronecker_average([d.dense() for d in updates], left, right, weights, ridge=ridge)
            except ValueError as error:
                raise InputError(f"FisherAverage floor is {ridge:g}: {name}: {error}") from None

        return LazyDelta(shape, lambda rows: latest.rows(name, compute, rows))


def diagonal_average(
    updates: Sequence[torch.Tensor],
    fishers: Sequence[torch.Tensor],
    weights: Sequence[float] | None = None,
    *,
    norms: Sequence[float] | None = None,
    floor: float = FLOOR,
    floored: Literal["first", "normalised"] = "first",
) -> torch.Tensor:
    """(O, I) merged update, float64.

    Args:
        updates: ΔW_i, (O, I) each.
        fishers: Diagonal Fisher information of every weight, (O, I) each.
        weights: λ_i; unset means 1 for each.
        norms: What each λ_i is divided by, where it is not 0; unset means 1 for each.
        floor: Smallest Fisher information.
        floored: Of the first expert, before it is divided by its norm, or of every expert afterwards.
    """
    total, top = (torch.zeros_like(updates[0], dtype=torch.float64) for _ in range(2))
    given = zip(updates, fishers, weights or [1.0] * len(updates), norms or [1.0] * len(updates), strict=True)
    for place, (update, fisher, weight, norm) in enumerate(given):
        raw = fisher.double()
        if floored == "normalised":
            scaled = weight * (raw / (norm or 1.0)).clamp(min=floor)
        else:
            scaled = weight * (raw.clamp(min=floor) if place == 0 else raw) / (norm or 1.0)
        total += scaled
        top += scaled * update.double()
    return top / total


def kronecker_average(
    updates: Sequence[torch.Tensor],
    outputs: Sequence[torch.Tensor],
    inputs: Sequence[torch.Tensor],
    weights: Sequence[float] | None = None,
    *,
    ridge: float = RIDGE,
) -> torch.Tensor:
    """(O, I) merged update, float64.

    Args:
        updates: ΔW_i, (O, I) each.
        outputs: L_i = E[δδᵀ], (O, O) each.
        inputs: R_i = E[xxᵀ], (I, I) each.
        weights: λ_i; unset means 1 for each.
        ridge: Added to each factor, times its mean eigenvalue, so that directions unseen by all are averaged.
    """
    given = weights or [1.0] * len(updates)
    left = [w * _ridged(m, ridge) for w, m in zip(given, outputs, strict=True)]
    right = [_ridged(m, ridge) for m in inputs]
    v, w = _common_basis(left), _common_basis(right)
    pairs = [(v.T @ f @ v, w.T @ r @ w) for f, r in zip(left, right, strict=True)]
    diagonal = torch.stack([torch.outer(f.diagonal(), r.diagonal()) for f, r in pairs]).sum(0)
    mean = torch.stack([d.double() for d in updates]).mean(0)
    rest = torch.stack([f @ (d.double() - mean) @ r for f, r, d in zip(left, right, updates, strict=True)]).sum(0)
    change = _conjugate_gradients(
        lambda y: torch.stack([f @ y @ r for f, r in pairs]).sum(0), v.T @ rest @ w, diagonal.clamp(min=TINY)
    )
    return mean + v @ change @ w.T


def _common_basis(factors: Sequence[torch.Tensor]) -> torch.Tensor:
    """(n, n) V with ``Vᵀ F_1 V`` diagonal and ``Vᵀ (Σ F_i) V = I``; all zero where no factor is anything.

    Raises:
        ValueError: the sum is singular.
    """
    total = torch.stack(list(factors)).sum(0)
    if not total.any():
        return torch.zeros_like(total)
    try:
        return torch.from_numpy(scipy.linalg.eigh(factors[0].numpy(), total.numpy())[1])
    except scipy.linalg.LinAlgError:
        raise ValueError("the sum of the Kronecker factors is singular; expected a ridge above 0") from None


def _ridged(matrix: torch.Tensor, ridge: float) -> torch.Tensor:
    wide = matrix.double()
    return wide + ridge * wide.diagonal().mean() * torch.eye(len(wide), dtype=torch.float64)


def _conjugate_gradients(
    apply: Callable[[torch.Tensor], torch.Tensor], target: torch.Tensor, diagonal: torch.Tensor
) -> torch.Tensor:
    x, residual = torch.zeros_like(target), target
    step_to = residual / diagonal
    direction, energy = step_to, (residual * step_to).sum()
    goal = TOLERANCE**2 * energy
    for _ in range(MOST_STEPS):
        if energy <= goal:
            return x
        image = apply(direction)
        step = energy / (direction * image).sum()
        x, residual = x + step * direction, residual - step * image
        step_to = residual / diagonal
        before, energy = energy, (residual * step_to).sum()
        direction = step_to + energy / before * direction
    raise ValueError(f"conjugate gradients did not converge in {MOST_STEPS} steps; a larger ridge helps")
