"""The form in which a merge is written: an exact adapter, one of limited rank, or a full model."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from src.adapters.deltas import Delta, is_lowrank, lowrank
from src.adapters.pairs import NOT_FINITE, Pairs
from src.adapters.truncate import Truncated, truncate
from src.errors import InputError
from src.merge.card import FULL_MODEL
from src.merge.parallel import in_order

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Form:
    """The user's choice, checked.

    Attributes:
        rank: Largest rank of each module, or
        energy: share of each module's squared norm that its rank must keep, or
        full_model: write whole weights; none of them: exact factors.
        warn_below: Total kept energy under which a warning is given; a smaller ``energy`` lowers it.
    """

    rank: int | None = None
    energy: float | None = None
    full_model: bool = False
    warn_below: float = 0.95

    def __post_init__(self) -> None:
        if (self.rank is not None) + (self.energy is not None) + self.full_model > 1:
            raise InputError("rank, energy and full_model exclude each other; give one of them")
        if self.rank is not None and self.rank < 1:
            raise InputError(f"rank is {self.rank}; expected at least 1")
        if not 0 <= self.warn_below <= 1:
            raise InputError(f"warn_below is {self.warn_below}; expected a number from 0 to 1")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise InputError(f"energy is {self.energy}; expected a number above 0 to 1")

    @property
    def exact(self) -> bool:
        """Whether factors are written as they are."""
        return self.rank is None and self.energy is None and not self.full_model

    def check(self, deltas: Mapping[str, Delta], name: str) -> None:
        """Check that this form can hold the updates.

        Raises:
            InputError: an adapter is asked for and there is no update, or an exact one and the update is full rank.
        """
        if not deltas and not self.full_model:
            raise InputError("nothing to write: every weight is 0, or no adapter updates any module")
        if self.exact and not is_lowrank(deltas):
            raise InputError(
                f"{name} gives full-rank updates, which no adapter holds exactly; give --rank 16, --energy 0.9 or "
                "--full_model true"
            )

    def adapter(self, deltas: Mapping[str, Delta], workers: int) -> tuple[Pairs, dict[str, Any]]:
        """The updates as pairs, and what was kept of them.

        Raises:
            InputError: an update that is to be truncated is not finite.
        """
        if self.exact:
            return lowrank(deltas), {"form": "exact", "kept_energy": 1.0}
        names = list(deltas)
        cut = in_order(lambda name: self._truncated(name, deltas[name]), names, workers)
        results = dict(zip(names, cut, strict=True))
        return {name: result.pair for name, result in results.items()}, self._report(results)

    def _truncated(self, name: str, delta: Delta) -> Truncated:
        try:
            return truncate(delta, rank=self.rank, energy=self.energy)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            raise InputError(f"{name}: {NOT_FINITE}") from None

    def _report(self, results: Mapping[str, Truncated]) -> dict[str, Any]:
        total = sum(result.total for result in results.values())
        kept = sum(result.kept for result in results.values()) / total if total > 0 else 1.0
        # An energy that was asked for is no surprise; rounding may stay a little under it.
        if kept < min(self.warn_below, 1.0 if self.energy is None else self.energy * (1 - 1e-9)):
            log.warning("only %.1f %% of the merged update's energy is kept (form %s)", 100 * kept, self.label)
        modules = {name: r.kept / r.total if r.total > 0 else 1.0 for name, r in results.items()}
        return {"form": self.label, "kept_energy": kept, "kept_energy_by_module": modules}

    @property
    def label(self) -> str:
        """The form in a few words."""
        if self.full_model:
            return FULL_MODEL
        if self.rank is not None:
            return f"rank {self.rank}"
        return "exact" if self.energy is None else f"energy {self.energy:g}"
