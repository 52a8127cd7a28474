"""Which claims "A beats B" hold: the interval of the paired difference excludes zero, else no difference is shown."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from src.experiments.document import Document, better, column, number, p_column, table
from src.experiments.point_names import called
from src.experiments.scores import MEASURES, Measure, Scores
from src.metrics.bootstrap import Estimate

LEVEL = 0.05
"""Adjusted p-values below it hold."""
MARK = "°"
NO_DIFFERENCE = "no difference shown"
BOOTSTRAP = (
    "Paired bootstrap over prompts of means over seeds, 95 % intervals. A claim is made where the interval of the "
    "difference excludes 0. p is the larger of the bootstrap's and of the paired randomisation test's. "
)
HOLM = (
    "Intervals are for one comparison each; the Holm-adjusted p-values are for all {count} of this table together: of "
    "the {claims} {what}, {kept} also hold at 5 % after adjustment."
)
NOT_AFTER_HOLM = "° {where}: does not hold at 5 % after Holm's adjustment for {count} comparisons."


@dataclass(frozen=True)
class Claim:
    """One comparison.

    Attributes:
        first: The method that is compared.
        second: The one that it is compared with.
        measure: The measure.
        difference: first − second.
        p_value: Of no difference.
        adjusted: The same after Holm's adjustment.
    """

    first: str
    second: str
    measure: Measure
    difference: Estimate
    p_value: float
    adjusted: float

    @property
    def winner(self) -> str | None:
        """Who beats the other; nobody where the interval includes zero."""
        return {1: self.first, -1: self.second}.get(better(self.measure, self.difference))

    @property
    def sentence(self) -> str:
        """The claim in words."""
        if self.winner is None:
            return NO_DIFFERENCE
        loser = self.second if self.winner == self.first else self.first
        return f"{self.winner} beats {loser}"

    @property
    def verdict(self) -> str:
        """The claim where its first method is known from what stands around it."""
        return NO_DIFFERENCE if self.winner is None else "beats it" if self.winner == self.first else "is beaten by it"


def claims(
    scores: Mapping[Measure, Scores], first: str, others: Sequence[str], measures: Sequence[Measure]
) -> list[Claim]:
    """One model against others on several measures."""
    found = [(m, other) for m in measures if m in scores for other in others]
    p_values = [scores[measure].p_value(first, other) for measure, other in found]
    return [
        Claim(first, other, measure, scores[measure].difference(first, other), p, adjusted)
        for (measure, other), p, adjusted in zip(found, p_values, holm(p_values), strict=True)
    ]


def holm(values: Sequence[float]) -> list[float]:
    """Adjusted p-values, in the order given (S. Holm, 1979): the chance of any false claim among m is below the level.

    p̃_(i) = max over j ≤ i of min(1, (m − j + 1) p_(j)),   p_(1) ≤ … ≤ p_(m)
    """
    order = sorted(range(len(values)), key=lambda i: values[i])
    adjusted, highest = [0.0] * len(values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(values) - rank) * values[i]))
        adjusted[i] = highest
    return adjusted


def claims_table(found: Sequence[Claim], title: str, how: str = BOOTSTRAP) -> Document:
    """Claims as a table, with the note on multiple comparisons behind the one on how they were computed.

    Where one model is compared with all others, the note names it, and no column repeats it.
    """
    made = [claim for claim in found if claim.winner is not None]
    rows: list[dict[str, Any]] = [
        {
            "measure": MEASURES[claim.measure][0],
            "first": claim.first,
            "second": claim.second,
            "difference": number(claim.difference),
            "p": claim.p_value,
            "holm": claim.adjusted,
            "claim": claim.sentence,
        }
        for claim in found
    ]
    firsts = {claim.first for claim in found}
    if len(firsts) == 1:
        for row, claim in zip(rows, found, strict=True):
            row["claim"] = claim.verdict
        heads = {"measure": "measure", "second": "against", "difference": "difference"}
        how = f"Differences are {firsts.pop()} less the other. {how}"
    else:
        heads = {"measure": "measure", "first": "A", "second": "B", "difference": "A − B"}
    columns = [*(column(key, label) for key, label in heads.items()), p_column("p", "p"), p_column("holm", "p (Holm)")]
    columns.append(column("claim", "claim"))
    note = how + holm_note([claim.adjusted for claim in made], len(found), "claims")
    return table(title, columns, rows, note=note)


def holm_note(claimed: Sequence[float], count: int, what: str) -> str:
    """How many claims of a table hold once adjusted.

    Args:
        claimed: Adjusted p-values of those that their intervals make.
        count: Comparisons of the table.
        what: The claims' name.
    """
    return HOLM.format(count=count, claims=len(claimed), what=what, kept=sum(p < LEVEL for p in claimed))


def marked(name: str, adjusted: float) -> str:
    """A name in a sentence, with ° where what is said of it does not hold after adjustment."""
    return called(name) if adjusted < LEVEL else f"{called(name)}{MARK}"


def tally(found: Sequence[Claim], measure: Measure) -> tuple[list[str], list[str], list[str]]:
    """Names that the first method beats on a measure, is beaten by (:func:`marked`), and shows no difference to."""
    beaten: list[str] = []
    beaten_by: list[str] = []
    equal: list[str] = []
    for claim in found:
        if claim.measure == measure:
            place = equal if claim.winner is None else beaten if claim.winner == claim.first else beaten_by
            place.append(called(claim.second) if claim.winner is None else marked(claim.second, claim.adjusted))
    return beaten, beaten_by, equal
