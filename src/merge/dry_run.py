"""What a merge would write: shapes, ranks, memory and size, without writing it."""

from src.adapters.deltas import BLOCK_ELEMENTS, combined
from src.adapters.pairs import LowRankPair
from src.merge.forms import Form
from src.merge.inputs import Inputs
from src.merge.sweep import Variant

FLOAT32 = 4


def describe(inputs: Inputs, point: Variant, form: Form, alpha: float, count: int) -> str:
    """A table of modules by shape, and totals."""
    total = point.combine.combine(inputs.as_experts())
    updates = [total.deltas]
    if point.method is not None and inputs.safety is not None and not point.method.needs_fisher:
        updates.append(inputs.safety.updates)
    merged = combined(updates, [1.0, alpha][: len(updates)])
    lines = ["shape            modules  rank"]
    groups: dict[tuple[tuple[int, int], str], int] = {}
    for delta in merged.values():
        rank = str(delta.rank) if isinstance(delta, LowRankPair) else "full"
        groups[delta.shape, rank] = groups.get((delta.shape, rank), 0) + 1
    lines += [f"{f'{o} x {i}':<16} {number:>7}  {rank}" for ((o, i), rank), number in groups.items()]
    largest = max(delta.shape[0] * delta.shape[1] for delta in merged.values())
    size = sum(_parameters(delta.shape, delta, form) for delta in merged.values()) * FLOAT32
    memory = sum(a.a.nbytes + a.b.nbytes for adapter in inputs.adapters for a in adapter.pairs.values())
    work = BLOCK_ELEMENTS if form.exact else largest
    lines.append(f"{count} output(s) of form {form.label}: about {_human(size)} each")
    lines.append(f"memory: {_human(memory)} for the adapters, about {_human(3 * work * FLOAT32)} per worker")
    lines.append("nothing was written")
    return "\n".join(lines)


def _parameters(shape: tuple[int, int], delta: object, form: Form) -> int:
    if form.full_model:
        return shape[0] * shape[1]
    rank = delta.rank if isinstance(delta, LowRankPair) else min(shape)
    return min(rank, form.rank or rank) * sum(shape)


def _human(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"
