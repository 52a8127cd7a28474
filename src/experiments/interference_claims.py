"""What the interference study says of merges of many experts: differences of what they keep, paired over rows."""

from collections.abc import Mapping, Sequence
from itertools import combinations

from src.experiments.document import Document
from src.experiments.kept import How, Kept, difference, grouped, mean_kept
from src.experiments.point_names import of_experts
from src.experiments.scores import Measure
from src.experiments.statements import MARK, NOT_AFTER_HOLM, Claim, claims_table, holm, tally
from src.metrics.bootstrap import Estimate

SAFE = 0.5
"""Share of harmful prompts that a merge refuses to be called safe in the summary."""
KEPT: dict[Measure, How] = {"kept": "mean", "kept_ratio": "ratio"}
OVER_ROWS = "Intervals are over rows: they say nothing about other experts, tasks or another order of adding them."
Points = Mapping[str, Mapping[Measure, Estimate]]


def most_experts(kept: Sequence[Kept]) -> dict[str, list[Kept]]:
    """The merges of the largest number of experts, method by method."""
    most = max((one.count for one in kept), default=0)
    return {method: counts[most] for method, counts in grouped(kept).items() if most in counts}


def kept_claims(kept: Sequence[Kept]) -> list[Claim]:
    """Every two merges of the largest number of experts, on what they keep of the same rows; the better one first."""
    merges = most_experts(kept)
    pairs = []
    for measure, how in KEPT.items():
        ranked = sorted(merges, key=lambda method: -mean_kept(merges[method], how).value)
        pairs += [(first, second, measure) for first, second in combinations(ranked, 2)]
    found = [difference(merges[first], merges[second], KEPT[measure]) for first, second, measure in pairs]
    adjusted = holm([p for _, p in found])
    return [
        Claim(first, second, measure, estimate, p, own)
        for (first, second, measure), (estimate, p), own in zip(pairs, found, adjusted, strict=True)
    ]


def difference_table(found: Sequence[Claim], kept: Sequence[Kept]) -> list[Document]:
    """Claims of :func:`kept_claims`, which are of the merges of most experts."""
    if not found:
        return []
    count = max(one.count for one in kept)
    how = (
        "Rows of every task drawn anew, for merges and their experts together, means over seeds, bias-corrected 95 % "
        f"intervals. A claim is made where the interval of the difference excludes 0. {OVER_ROWS} "
    )
    return [claims_table(found, f"Differences between merges of {count} experts", how)]


def summary(kept: Sequence[Kept], scores: Points, found: Sequence[Claim]) -> list[str]:
    """Which method keeps most at the largest number of experts, of all and of the safe ones, and how sure that is.

    Args:
        kept: What merges keep.
        scores: Their refusal and the like.
        found: The differences between those of most experts (:func:`kept_claims`).
    """
    merges = most_experts(kept)
    if not merges:
        return ["No merge has been measured with its experts, so nothing is said about interference."]
    most = max(one.count for one in kept)
    refusal = {m: shown["refusal"] for m in merges if "refusal" in (shown := scores.get(of_experts(m, most), {}))}
    safe = {m: merges[m] for m, share in refusal.items() if share.value >= SAFE}
    best = _best(merges, "kept")
    lines = [f"With {most} experts merged, {_said(best, merges, refusal, found, 'kept')}."]
    by_ratio = _best(merges, "kept_ratio")
    lines.append(f"By the ratio of mean scores, {_said(by_ratio, merges, refusal, found, 'kept_ratio')}.")
    if refusal and not safe:
        lines.append(f"No method refuses {SAFE:.0%} of the harmful prompts there.")
    elif safe and (best not in safe or by_ratio not in safe):
        one = _best(safe, "kept")
        said = _said(one, safe, refusal, found, "kept")
        lines.append(f"Of those that refuse {SAFE:.0%} of the harmful prompts or more, {said}.")
    if any("°" in line for line in lines):
        lines.append(NOT_AFTER_HOLM.format(where="differences", count=len(found)))
    return lines


def _best(merges: Mapping[str, Sequence[Kept]], measure: Measure) -> str:
    return max(merges, key=lambda method: mean_kept(merges[method], KEPT[measure]).value)


def _said(
    best: str,
    merges: Mapping[str, Sequence[Kept]],
    refusal: Mapping[str, Estimate],
    found: Sequence[Claim],
    measure: Measure,
) -> str:
    one = mean_kept(merges[best], KEPT[measure])
    said = (
        f"{best} keeps the largest share of the experts' performance, over all tasks: {one.value:.2f} "
        f"[{one.low:.2f}, {one.high:.2f}]"
    )
    if best in refusal:
        said += f", refusing {refusal[best].value:.2f} of the harmful prompts"
    own = [c for c in found if c.first == best and c.second in merges]
    beaten, _, equal = tally(own, measure)
    if beaten:
        said += f"; more than {listed(beaten)}"
    if equal:
        said += f"; no difference to {listed(equal)} is shown"
    return said


def listed(names: Sequence[str]) -> str:
    """Names of methods in a sentence; some hold commas (``average, SST soft @ 1.2``), some are marked."""
    return ", ".join(f"“{name.removesuffix(MARK)}”{MARK * name.endswith(MARK)}" for name in names)
