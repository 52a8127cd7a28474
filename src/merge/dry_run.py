"""What a merge would write: shapes, ranks, memory and size, without writing it.

Memory is modelled, in bytes beside those of the program itself and of files that are mapped; the factors were measured
(peak resident memory of TIES and of task arithmetic, 1500 x 2000 to 3000 x 6000; within a third).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from src.adapters.base_weights import BaseWeights
from src.adapters.deltas import BLOCK_ELEMENTS, Delta
from src.adapters.pairs import LowRankPair
from src.adapters.truncate import OVERSAMPLING
from src.merge.forms import Form
from src.merge.inputs import Inputs
from src.sizes import human_size

FLOAT32, FLOAT64 = 4, 8
HEADER = 250
"""Bytes of a safetensors header for the two factors of a module, beside the module's name twice."""
BLOCKS = 16
"""Blocks of rows that an element-wise rule holds at a time."""
OF_FACTORS, OF_KRYLOV = 48, 340
"""Bytes for each element of both factors, at the rank that is worked with, while an update is cut to a rank."""
OF_GRAM, OF_SQUARE = 36, 30
"""Bytes for each element of an update, and of its smaller Gram matrix, where all eigenvectors are computed."""


@dataclass(frozen=True)
class Outline:
    """One output.

    Attributes:
        groups: (shape, rank in words) to the number of modules.
        size: Bytes of its weights; an upper bound where the rank follows from an energy.
        held: Bytes of memory for the merged update and the factors that are written.
        work: Bytes of memory per worker.
    """

    groups: Mapping[tuple[tuple[int, int], str], int]
    size: int
    held: int
    work: int


def outline(
    merged: Mapping[str, Delta], form: Form, base: BaseWeights | None, base_bytes: int, itemsize: int
) -> Outline:
    """Look at one output.

    Args:
        merged: What would be written, or an update of the same shapes and ranks.
        form: In which form.
        base: The base's weights, for a full model.
        base_bytes: Size of the base's weights, for a full model.
        itemsize: Bytes of an element of a full-rank update.
    """
    groups: dict[tuple[tuple[int, int], str], int] = {}
    for delta in merged.values():
        rank = str(delta.rank) if isinstance(delta, LowRankPair) else "full"
        groups[delta.shape, rank] = groups.get((delta.shape, rank), 0) + 1
    held = sum(pair.a.nbytes + pair.b.nbytes for pair in merged.values() if isinstance(pair, LowRankPair))
    if form.full_model:
        return Outline(groups, base_bytes, held, max((_added(name, base) for name in merged), default=0))
    parameters = {name: _parameters(delta, form) for name, delta in merged.items()}
    copies = FLOAT32 if form.exact else FLOAT64 + FLOAT32
    return Outline(
        groups,
        size=sum(FLOAT32 * count + 2 * len(name) + HEADER for name, count in parameters.items()),
        held=held + (0 if form.exact else copies * sum(parameters.values())),
        work=max((_work(delta, form, itemsize) for delta in merged.values()), default=0),
    )


def describe(inputs: Inputs, outputs: Iterable[Outline], form: Form, workers: int) -> str:
    """A table of modules by shape, and totals, of all outputs from the smallest to the largest.

    Args:
        inputs: The adapters.
        outputs: At least one.
        form: Their form.
        workers: Number of threads.
    """
    found = sorted(outputs, key=lambda output: output.size)
    largest = found[-1]
    lines = ["shape            modules  rank"]
    lines += [f"{f'{o} x {i}':<16} {number:>7}  {rank}" for ((o, i), rank), number in largest.groups.items()]
    if any(output.groups != largest.groups for output in found):
        lines[0] += "   (of the largest output)"
    adapters = sum(a.a.nbytes + a.b.nbytes for adapter in inputs.adapters for a in adapter.pairs.values())
    files = sum(Path(entry["path"]).stat().st_size for entry in inputs.calibration.files)
    held, work = (max(getattr(output, part) for output in found) for part in ("held", "work"))
    lines.append(f"{len(found)} output(s) of form {form.label}: {_sizes(found, form)}")
    fisher = f", {human_size(files)} of Fisher files" if files else ""
    merged = f"{_about(form)} {human_size(held)} for what is merged"
    each = f"about {human_size(work)} per worker ({1 if form.full_model else workers})"
    lines.append(f"memory beside the program: {human_size(adapters)} for the adapters{fisher}, {merged}, {each}")
    lines.append("nothing was written")
    return "\n".join(lines)


def _sizes(outputs: Sequence[Outline], form: Form) -> str:
    least, most = outputs[0].size, outputs[-1].size
    if least == most:
        return f"{_about(form)} {human_size(most)} each"
    whole = human_size(sum(output.size for output in outputs))
    return f"{_about(form)} {human_size(least)} to {human_size(most)} each, {whole} in all"


def _about(form: Form) -> str:
    """An energy says nothing of a rank before the work is done."""
    return "about" if form.energy is None else "at most"


def _parameters(delta: Delta, form: Form) -> int:
    rank = delta.rank if isinstance(delta, LowRankPair) else min(delta.shape)
    return min(rank, form.rank or rank) * sum(delta.shape)


def _added(module: str, base: BaseWeights | None) -> int:
    """Bytes for the sum of a weight and its update, and for the check that it is finite, which makes copies."""
    key = base.key_of(module) if base is not None else None
    if base is None or key is None:
        return 0
    weight = base.get(key)
    return 2 * weight.nbytes + 4 * weight.numel() + BLOCKS * BLOCK_ELEMENTS * FLOAT32


def _work(delta: Delta, form: Form, itemsize: int) -> int:
    """Bytes that the work on one module takes."""
    o, i = delta.shape
    if form.exact:
        return 0
    if isinstance(delta, LowRankPair):
        return OF_FACTORS * delta.rank * (o + i)
    shorter, whole = min(o, i), o * i
    blocks = BLOCKS * BLOCK_ELEMENTS * itemsize
    if form.rank is not None and form.rank + OVERSAMPLING < shorter // 2:
        return blocks + 2 * itemsize * whole + OF_KRYLOV * (form.rank + OVERSAMPLING) * (o + i)
    return blocks + (OF_GRAM - FLOAT32 + itemsize) * whole + OF_SQUARE * shorter**2
