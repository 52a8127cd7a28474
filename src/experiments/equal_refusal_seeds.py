"""Methods at equal refusal on each seed's own paths, and the mean of these differences.

:mod:`src.experiments.equal_refusal` compares paths whose points are means over seeds at one strength. Where a strength
means another refusal on every seed, such a point is a mean of models that lie far apart: on a curve that bends upwards
it lies above each seed's own curve, and the difference of two methods can be larger than that of any seed. Here a
method is compared with another on the experts of one seed at a time, as a user has them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from src.experiments.document import Document, column, number, table
from src.experiments.equal_refusal import COSTS, differences, estimated
from src.experiments.scores import MEASURES, Measure, gathered
from src.experiments.store import Record
from src.metrics.bootstrap import Estimate

MEAN = "mean of the seeds"
NOTE = (
    "Every seed's experts by themselves, at the levels of refusal that both paths reach there; then the mean over "
    "those seeds, rows resampled alike in all. The table above takes means over seeds at equal strengths first, which "
    "lie further apart where a strength means another refusal on every seed."
)
Row = tuple[str, str, tuple[float, ...], dict[Measure, Estimate]]
"""The other method, the seed or :data:`MEAN`, the levels, and the differences."""


def seed_gaps(
    known: Mapping[str, Sequence[Record]],
    seeds: Sequence[int],
    curves: Mapping[str, Sequence[str]],
    ours: str,
    **split: Any,
) -> list[Row]:
    """Ours against every other method, seed by seed and on average.

    Args:
        known: Records of each model, one per seed.
        seeds: The seeds, in that order.
        curves: Method to the models of its path.
        ours: One of the methods.
        split: Which rows (see :func:`src.experiments.scores.gathered`).
    """
    if len(seeds) < 2 or ours not in curves:
        return []
    each = [gathered({name: [records[i]] for name, records in known.items()}, **split) for i in range(len(seeds))]
    found: list[Row] = []
    for other in (name for name in curves if name != ours):
        own = [differences(scores, curves[ours], curves[other]) for scores in each]
        found += [
            (other, str(seed), levels, {m: estimated(one, scores[m])[0] for m, one in drawn.items()})
            for seed, scores, (levels, drawn) in zip(seeds, each, own, strict=True)
        ]
        met = [(scores, drawn) for scores, (levels, drawn) in zip(each, own, strict=True) if levels]
        if met:
            shared = [m for m in COSTS if all(m in drawn for _, drawn in met)]
            means = {m: estimated(np.mean([drawn[m] for _, drawn in met], axis=0), met[0][0][m])[0] for m in shared}
            found.append((other, MEAN, (), means))
    return found


def seed_gaps_table(found: Sequence[Row], ours: str, where: str) -> list[Document]:
    """The differences as a table; none without several seeds that meet."""
    measures = [m for m in COSTS if any(m in cells for *_, cells in found)]
    if not measures:
        return []
    columns = [column("other", f"{ours} against"), column("seed", "seed"), column("range", "refusal from – to")]
    columns += [column(m, f"{MEASURES[m][0]}, difference") for m in measures]
    rows = []
    for other, seed, levels, cells in found:
        reached = f"{levels[0]:.2f} – {levels[-1]:.2f}" if levels else "" if seed == MEAN else "no common range"
        row: dict[str, Any] = {"other": other, "seed": seed, "range": reached}
        rows.append(row | {m: number(one) for m, one in cells.items()})
    return [table(f"{ours} at equal refusal, seed by seed ({where})", columns, rows, note=NOTE)]
