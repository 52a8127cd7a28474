"""How points of a study are called, in tables, fronts and notes: ``TIES @ 0.5``, ``TIES @ 0.5, 8 experts``."""

from src.experiments.grid import Model
from src.merge.sweep import shortest


def at_strength(method: str, strength: float | None) -> str:
    """``TIES @ 0.5``; the method alone where it has no strength."""
    return method if strength is None else f"{method} @ {shortest(strength)}"


def called(name: str) -> str:
    """A name as it stands in a sentence: in quotation marks where it has a comma of its own."""
    return f"“{name}”" if "," in name else name


def method_and_strength(name: str) -> tuple[str, str]:
    """What :func:`at_strength` joined; the strength is empty where there is none."""
    method, at, strength = name.rpartition(" @ ")
    return (method, strength) if at else (name, "")


def of_experts(name: str, count: int) -> str:
    """``TIES @ 1, 8 experts``."""
    return f"{name}, {count} experts"


def with_count(method: str, count: int) -> str:
    """``TIES (8)``: what the grid of the interference study calls a method that merges eight experts."""
    return f"{method} ({count})"


def name_and_experts(model: Model) -> tuple[str, int]:
    """``TIES @ 1`` and 8, of a model whose method :func:`with_count` has named."""
    assert model.experts is not None
    method = model.method.removesuffix(with_count("", model.experts))
    return at_strength(method, model.strength), model.experts
