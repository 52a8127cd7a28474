"""What a page says of methods at equal refusal (:mod:`src.experiments.equal_refusal`): tables and sentences."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

from src.experiments.document import Document, column, number, p_column, table
from src.experiments.equal_refusal import COSTS, HIGHEST, LOWEST, MOST_APART, STEP, Gap
from src.experiments.point_names import called
from src.experiments.scores import MEASURES, Measure
from src.experiments.statements import NOT_AFTER_HOLM, holm_note, marked
from src.metrics.bootstrap import Estimate

WIDE = 0.25
"""Refusal between neighbours of the worse path beyond which a sentence marks that a line was drawn across it."""
FEW = 2
"""Levels of refusal up to which a sentence names them."""
ACROSS = (
    f"† two points of the worse method are more than {WIDE:g} of refusal apart there; the straight line between them "
    "can make it look worse than it is."
)
NOTE = (
    f"Mean difference over the levels of refusal, {STEP:g} apart, from {LOWEST:g} to {HIGHEST:g}, that both methods "
    "reach. Between measured points costs are read off a straight line, which begins at the utility expert; points "
    f"more than {MOST_APART:g} apart are not joined. The widest step is the largest gap bridged so: a line can make a "
    "method look worse than it is. 95 % intervals, paired bootstrap over rows."
)
BY_SEED = (
    " Each seed by itself, over its own levels (table “seed by seed”); then the mean over the seeds whose paths meet. "
    "The range spans all of these seeds, and need not be that of each."
)
POOLED = (
    "For comparison alone: no claim is made of it. Means over seeds are taken before paths are drawn, so where one "
    "strength refuses differently on every seed it overstates differences."
)
SHARES = (
    "At each level of refusal that both methods reach, means over the seeds that reach it, 95 % intervals, each for "
    "one comparison. 0.5 is half of the other method's over-refusal. Empty where the other's may be 0."
)
NO_RANGE = "no common range"


def equal_refusal_tables(
    found: Sequence[Gap], pooled: Sequence[Gap], ours: str, seeds: Sequence[int], where: str
) -> list[Document]:
    """All tables of a method at equal refusal.

    Args:
        found: Differences, seed by seed and on average.
        pooled: Differences of paths of means over seeds; shown beside several seeds.
        ours: The method.
        seeds: The seeds, in the order of the gaps' own.
        where: Which rows they are of.
    """
    tables = [equal_refusal_table(found, ours, where, several=len(seeds) > 1)]
    if shares := shares_table(found, ours, where):
        tables.append(shares)
    if len(seeds) > 1 and any(gap.met for gap in found):
        tables += [seed_table(found, ours, seeds, where), pooled_table(pooled, ours, where)]
    return tables


def equal_refusal_table(found: Sequence[Gap], ours: str, where: str, *, several: bool = False) -> Document:
    """Differences at equal refusal, a row for each other method; ``several`` says whether there are several seeds."""
    measures = _measures(found)
    columns = [column("other", "against"), *_difference_columns(measures)]
    columns += [p_column(f"{measure}_holm", f"{MEASURES[measure][0]}, p (Holm)") for measure in measures]
    columns += [column("seeds", "seeds that meet")] if several else []
    columns += [column("own_step", "own widest step"), column("step", "the other's")]
    rows = []
    for gap in found:
        row: dict[str, Any] = {"other": gap.other, "range": _range(gap), "seeds": gap.met}
        row |= dict(zip(("own_step", "step"), (round(step, 3) for step in gap.steps), strict=True)) if gap.met else {}
        row |= {measure: number(one) for measure, one in gap.differences.items()}
        rows.append(row | {f"{measure}_holm": p for measure, p in gap.p_values.items()})
    claimed = [gap.p_values[measure] for gap in found for measure in gap.differences if gap.wins(measure)]
    count = sum(len(gap.p_values) for gap in found)
    note = holm_note(claimed, count, "differences whose interval excludes 0")
    return table(_title(ours, where), columns, rows, note=f"{NOTE}{BY_SEED if several else ''} {note}")


def seed_table(found: Sequence[Gap], ours: str, seeds: Sequence[int], where: str) -> Document:
    """Every seed's own differences."""
    measures = _measures(found)
    columns = [column("other", "against"), column("seed", "seed"), *_difference_columns(measures)]
    rows = []
    for gap in found:
        for seed, levels, own in zip(seeds, gap.levels, gap.each, strict=True):
            row: dict[str, Any] = {"other": gap.other, "seed": str(seed), "range": _span(levels)}
            rows.append(row | {m: number(own[m]) for m in measures if m in own})
    return table(_title(ours, where, "seed by seed"), columns, rows)


def pooled_table(pooled: Sequence[Gap], ours: str, where: str) -> Document:
    """Differences of paths of means over seeds; no claim is made of them."""
    measures = _measures(pooled)
    columns = [column("other", "against"), *_difference_columns(measures)]
    rows: list[dict[str, Any]] = [
        {"other": gap.other, "range": _range(gap)} | {m: number(one) for m, one in gap.differences.items()}
        for gap in pooled
    ]
    return table(_title(ours, where, "paths of means over seeds"), columns, rows, note=POOLED)


def shares_table(found: Sequence[Gap], ours: str, where: str) -> Document | None:
    """Over-refusal as a share of every other method's, level by level; None where there is none."""
    levels = sorted(set(chain.from_iterable(gap.shares for gap in found)))
    if not levels:
        return None
    columns = [column("other", "over-refusal as a share of that of"), *(column(f"{x:.2f}", f"{x:.2f}") for x in levels)]
    rows = [
        {"other": gap.other} | {f"{level:.2f}": number(one) for level, one in gap.shares.items()}
        for gap in found
        if gap.shares
    ]
    return table(_title(ours, where, "over-refusal level by level"), columns, rows, note=SHARES)


def sentences(found: Sequence[Gap], ours: str) -> list[str]:
    """Who is better at equal refusal, measure by measure."""
    said = []
    for measure in COSTS:
        results = [(gap, gap.wins(measure)) for gap in found if measure in gap.differences]
        parts = [
            f"{verb} {', '.join(_named(gap, measure) for gap in chosen)}"
            for verb, wanted in (("better than that of", 1), ("worse than that of", -1))
            if (chosen := [gap for gap, result in results if result == wanted])
        ]
        equal = [_between(gap, measure) for gap, result in results if result == 0]
        parts += [f"not shown to differ from that of {', '.join(equal)}"] if equal else []
        if parts:
            said.append(f"At equal refusal, the {MEASURES[measure][0]} of {called(ours)} is {'; '.join(parts)}.")
    if any("°" in one for one in said):
        said.append(NOT_AFTER_HOLM.format(where="at equal refusal", count=sum(len(gap.p_values) for gap in found)))
    if any("†" in one for one in said):
        said.append(ACROSS)
    apart = [called(gap.other) for gap in found if not gap.met]
    if said and apart:
        said.append(f"At no common level of refusal, so not compared with {called(ours)}: {', '.join(apart)}.")
    return said


def _between(gap: Gap, measure: Measure) -> str:
    """A method that is not shown to differ, with the interval: how large a difference may have gone unseen."""
    one = gap.differences[measure]
    return f"{called(gap.other)} ({_interval(one)})"


def _interval(one: Estimate) -> str:
    value, low, high = (round(end, 3) + 0.0 for end in (one.value, one.low, one.high))
    return f"{value:+.3f} [{low:+.3f}, {high:+.3f}]".replace("-", "−")


def _named(gap: Gap, measure: Measure) -> str:
    parts = [_interval(gap.differences[measure])]
    parts += [f"at {_range(gap)}"] if len(set(chain.from_iterable(gap.levels))) <= FEW else []
    parts += [f"{gap.met} of {len(gap.levels)} seeds"] if gap.met < len(gap.levels) else []
    across = "†" if gap.steps[gap.wins(measure) > 0] > WIDE else ""
    return f"{marked(gap.other, gap.p_values[measure])}{across} ({'; '.join(parts)})"


def _measures(found: Sequence[Gap]) -> list[Measure]:
    return [m for m in COSTS if any(m in gap.differences for gap in found)]


def _difference_columns(measures: Sequence[Measure]) -> list[Any]:
    return [column("range", "refusal from – to"), *(column(m, f"{MEASURES[m][0]}, difference") for m in measures)]


def _range(gap: Gap) -> str:
    return _span(tuple(chain.from_iterable(gap.levels)))


def _span(levels: Sequence[float]) -> str:
    if not levels:
        return NO_RANGE
    low, high = min(levels), max(levels)
    return f"{low:.2f} – {high:.2f}" if low < high else f"{low:.2f}"


def _title(ours: str, where: str, what: str = "") -> str:
    return f"{ours} at equal refusal{', ' if what else ''}{what} ({where})"
