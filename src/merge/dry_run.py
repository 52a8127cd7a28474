"""What a merge would write: shapes, ranks, memory and size, without writing it."""

from collections.abc import Mapping
from pathlib import Path

from src.adapters.deltas import BLOCK_ELEMENTS, Delta
from src.adapters.pairs import LowRankPair
from src.merge.forms import Form
from src.merge.inputs import Inputs

FLOAT32 = 4


def describe(inputs: Inputs, merged: Mapping[str, Delta], form: Form, count: int, base_bytes: int) -> str:
    """A table of modules by shape, and totals.

    Args:
        inputs: The adapters.
        merged: What would be written, or an update of the same shapes and ranks.
        form: In which form.
        count: How many times.
        base_bytes: Size of the base's weights, for a full model.
    """
    lines = ["shape            modules  rank"]
    groups: dict[tuple[tuple[int, int], str], int] = {}
    for delta in merged.values():
        rank = str(delta.rank) if isinstance(delta, LowRankPair) else "full"
        groups[delta.shape, rank] = groups.get((delta.shape, rank), 0) + 1
    lines += [f"{f'{o} x {i}':<16} {number:>7}  {rank}" for ((o, i), rank), number in groups.items()]
    largest = max((delta.shape[0] * delta.shape[1] for delta in merged.values()), default=0)
    factors = sum(_parameters(delta, form) for delta in merged.values()) * FLOAT32
    size = base_bytes if form.full_model else factors
    memory = sum(a.a.nbytes + a.b.nbytes for adapter in inputs.adapters for a in adapter.pairs.values())
    files = sum(Path(entry["path"]).stat().st_size for entry in inputs.calibration.files)
    work = BLOCK_ELEMENTS if form.exact else largest
    lines.append(f"{count} output(s) of form {form.label}: about {_human(size)} each")
    fisher = f", {_human(files)} of Fisher files" if files else ""
    lines.append(f"memory: {_human(memory)} for the adapters{fisher}, about {_human(3 * work * FLOAT32)} per worker")
    lines.append("nothing was written")
    return "\n".join(lines)


def _parameters(delta: Delta, form: Form) -> int:
    rank = delta.rank if isinstance(delta, LowRankPair) else min(delta.shape)
    return min(rank, form.rank or rank) * sum(delta.shape)


def _human(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"
