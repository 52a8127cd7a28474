"""Fisher matrices in weight coordinates, as combinations and masks read them: module by module, rows at a time.

Fisher files are mapped, so what is not read takes no memory.
"""

import threading
from collections.abc import Callable, Sequence

import torch

from src.adapters.deltas import LazyDelta, changes
from src.errors import InputError
from src.fisher.base import Fisher, ModuleFisher
from src.fisher.diagonal import DiagonalFisher, PerCoordinate
from src.merge.combination import Expert, module_names


def module_fisher(fisher: Fisher, name: str, shape: tuple[int, int], owner: str) -> ModuleFisher:
    """The Fisher matrix, checked to hold a module in weight coordinates.

    Args:
        fisher: The matrix.
        name: The module.
        shape: (O, I) of its update.
        owner: Whose matrix it is, for the message.

    Raises:
        InputError: it does not; the message names the module.
    """
    if not isinstance(fisher, ModuleFisher) or fisher.shapes.get(name) != shape:
        raise InputError(
            f"{owner}: its Fisher file has no weight of {name} with the shape {shape}; measure with --model.basis "
            "union, and where experts alone are combined with --model.safety naming what `python -m src merge "
            "--combine Concatenate` makes of all of them"
        )
    return fisher


def changed_modules(experts: Sequence[Expert]) -> list[str]:
    """Modules that an expert changes: a module whose every update is zero needs no Fisher information and has none."""
    return [
        name
        for name in module_names(experts)
        if any(name in expert.deltas and changes(expert.deltas[name]) for expert in experts)
    ]


def per_weight(fisher: PerCoordinate, name: str) -> LazyDelta:
    """The mean of each weight of a module as (O, I), float64, read a few rows at a time."""
    rows, columns = fisher.shapes[name]
    sums, count = fisher.sums[name].view(-1, rows, columns), fisher.counts.sum()
    return LazyDelta((rows, columns), lambda some: sums[:, some].double().sum(0) / count)


def diagonal_norm(fisher: DiagonalFisher, names: Sequence[str]) -> float:
    """Euclidean norm of the diagonal of some modules, as far as they are in the file.

    Args:
        fisher: The matrix.
        names: The modules that a merge changes: what else a file holds depends on the adapters of its own pass.
    """
    held = [name for name in names if name in fisher.shapes]
    return sum(fisher.module_diagonal(name).square().sum().item() for name in held) ** 0.5


def fishers_of(experts: Sequence[Expert], what: str) -> list[Fisher]:
    """Every expert's own Fisher matrix.

    Raises:
        InputError: an expert has none.
    """
    found = [expert.fisher for expert in experts]
    if any(fisher is None for fisher in found):
        raise InputError(f"{what} needs a Fisher file of every expert: pass --fisher with one directory for each")
    return [fisher for fisher in found if fisher is not None]


class Latest(threading.local):
    """The last whole update that a thread has computed: its blocks are asked for one after the other."""

    def __init__(self) -> None:
        self._name: str | None = None
        self._value = torch.empty(0)

    def rows(self, name: str, compute: Callable[[], torch.Tensor], some: slice) -> torch.Tensor:
        """Rows of a module's update, computed once for all blocks of it."""
        if self._name != name:
            self._name, self._value = name, compute()
        return self._value[some]
