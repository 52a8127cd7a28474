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
from src.experiments.equal_refusal import COSTS, drawn_differences, estimated, shared_levels
from src.experiments.scores import MEASURES, Measure, Scores, gathered
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
        own = [_of_seed(scores, curves[ours], curves[other]) for scores in each]
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


def _of_seed(
    scores: Mapping[Measure, Scores], ours: Sequence[str], other: Sequence[str]
) -> tuple[tuple[float, ...], dict[Measure, np.ndarray]]:
    """Levels that both paths reach on one seed, and (1 + S,) differences by measure."""
    if "refusal" not in scores:
        return (), {}
    levels = shared_levels(scores["refusal"], ours, other)
    measures = [m for m in COSTS if m in scores] if len(levels) else []
    drawn = {m: drawn_differences(scores["refusal"], scores[m], ours, other, levels) for m in measures}
    return tuple(levels.tolist()), drawn


def seed_gaps_table(found: Sequence[Row], ours: str, where: str) -> list[Document]:
    """The differences as a table; none without several seeds that meet."""
    measures = [m for m in COSTS if any(m in differences for *_, differences in found)]
    if not measures:
        return []
    columns = [column("other", f"{ours} against"), column("seed", "seed"), column("range", "refusal from – to")]
    columns += [column(m, f"{MEASURES[m][0]}, difference") for m in measures]
    rows = []
    for other, seed, levels, differences in found:
        reached = f"{levels[0]:.2f} – {levels[-1]:.2f}" if levels else "" if seed == MEAN else "no common range"
        cells: dict[str, Any] = {m: number(differences[m]) if m in differences else "" for m in measures}
        rows.append({"other": other, "seed": seed, "range": reached} | cells)
    return [table(f"{ours} at equal refusal, seed by seed ({where})", columns, rows, note=NOTE)]
