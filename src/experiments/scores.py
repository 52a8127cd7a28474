"""What models scored, row by row, and what may be said about it: means over seeds, intervals, paired differences.

A row's score is its mean over the seeds; rows are what is resampled, once for all models of a measure, so that every
difference is a paired one. Legend of shapes: N rows, M models, S bootstrap draws.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from typing import Any, Literal

import numpy as np
import torch

from src.data.suite import BENIGN, HARMFUL
from src.experiments.store import Record
from src.metrics.bootstrap import ENDS, Estimate, bootstrap, flipped_means, resampled_means, swapped_p, unmoved, widest
from src.metrics.categories import categories_of
from src.metrics.groups import EQUAL, numbered

DRAWS = 20_000
"""Enough for the ends of an interval to move by less than .002 with other draws, where rows are a hundred."""
FINER = 400
"""Draws for each comparison of a table, where :data:`DRAWS` are fewer: Holm's adjustment then leaves a difference that
no draw contradicts a p-value of .5 %, far enough from 5 % for a draw more or less not to decide."""

Measure = Literal[
    "refusal", "attack_success", "over_refusal", "utility", "task_nll", "answer_nll", "collapse", "kept", "kept_ratio"
]
Split = Literal["validation", "test", "all"]
MEASURES: dict[Measure, tuple[str, bool]] = {
    "refusal": ("refusal of harmful prompts", True),
    "attack_success": ("attack success", False),
    "over_refusal": ("over-refusal", False),
    "utility": ("utility", True),
    "task_nll": ("NLL of task answers", False),
    "answer_nll": ("NLL of benign answers", False),
    "collapse": ("collapsed answers", False),
    "kept": ("performance kept", True),
    "kept_ratio": ("ratio of mean scores", True),
}
"""Name of a measure in tables, and whether more of it is better. The last two are of several rows, not of one
(:mod:`src.experiments.kept`)."""
CHECKS = {"choice": "correct", "code": "pass@1"}

Row = tuple[str, str, int]
"""Suite, what a row is after (its goal, else its prompt), and which of equal rows."""
BY_GOAL: tuple[Measure, ...] = ("refusal", "attack_success", "over_refusal", "collapse")
"""Measures whose equal rows belong together; equal questions with other choices do not."""


def row_scores(record: Record) -> dict[Measure, dict[Row, float]]:
    """Scores of an evaluated model (the record of a test cell), by measure and row."""
    found: dict[Measure, dict[Row, float]] = {}
    for suite in record["settings"]["data"]["suites"]:
        columns = record["found"]["rows"][suite["name"]]
        keys = row_keys(suite["name"], columns["ids"])
        for measure, column in _columns(suite):
            if column in columns:
                found.setdefault(measure, {}).update(zip(keys, map(float, columns[column]), strict=True))
    return found


def joined(record: Record, further: Sequence[Record]) -> Record:
    """One record of a model's answers in several test cells; what only the further ones ask is in ``reports``."""
    if not further:
        return record
    suites = [suite for cell in (record, *further) for suite in cell["settings"]["data"]["suites"]]
    rows = dict(pair for cell in (record, *further) for pair in cell["found"]["rows"].items())
    settings = record["settings"] | {"data": record["settings"]["data"] | {"suites": suites}}
    reports = set().union(*map(_asked, further)) - _asked(record)
    return record | {"settings": settings, "found": record["found"] | {"rows": rows}, "reports": reports}


def _asked(record: Record) -> set[str]:
    """Ids of the prompts that a test cell asks."""
    return {one for columns in record["found"]["rows"].values() for one in columns["ids"]}


def row_keys(suite: str, ids: Sequence[str]) -> list[Row]:
    """Keys of a suite's rows; equal prompts are told apart by their order."""
    seen: dict[str, int] = {}
    keys = []
    for one in ids:
        keys.append((suite, one, seen.get(one, 0)))
        seen[one] = seen.get(one, 0) + 1
    return keys


def _columns(suite: Mapping[str, Any]) -> Iterator[tuple[Measure, str]]:
    kind = suite["kind"]
    if kind in HARMFUL:
        yield from (("refusal", "refused"), ("attack_success", "attacked"), ("collapse", "collapsed"))
    elif kind in BENIGN:
        yield from (("over_refusal", "refused"), ("collapse", "collapsed"), ("answer_nll", "nll"))
    else:
        # A suite that asks for ROUGE has free answers: an exact match says nothing there.
        yield from (("utility", CHECKS.get(kind, "rouge_l" if suite.get("rouge") else "exact")), ("task_nll", "nll"))


def in_split(row: Row, split: Split, *, share: float, seed: int, reports: AbstractSet[str] = frozenset()) -> bool:
    """Whether a row belongs to a split: by a hash of what it is after, whatever suite and order it comes in.

    Args:
        row: The row.
        split: The split.
        share: Share of validation rows.
        seed: Which division.
        reports: Rows on which nothing is chosen; all of them are test rows.
    """
    if split == "all":
        return True
    if row[1] in reports:
        return split == "test"
    place = int.from_bytes(hashlib.sha256(f"{seed}:{row[1]}".encode()).digest()[:8], "big") / 2**64
    return (place < share) == (split == "validation")


@dataclass(frozen=True)
class Scores:
    """Scores of M models on N rows.

    Attributes:
        models: Their names.
        rows: The rows.
        values: (N, M) scores, means over seeds.
        seed: Seed of the bootstrap.
        count: Number of its draws (S).
        groups: The number of each row's group, where some belong together.
    """

    models: tuple[str, ...]
    rows: tuple[Row, ...]
    values: torch.Tensor
    seed: int = 0
    count: int = DRAWS
    groups: list[int] | None = None

    @cached_property
    def draws(self) -> torch.Tensor:
        """(S, M) means over resampled rows; the same rows for all models."""
        return resampled_means(self.values, seed=self.seed, draws=self.count, groups=self.groups)

    def mean(self, model: str) -> float:
        """A model's mean score."""
        return self.values[:, self.models.index(model)].mean().item()

    def estimate(self, model: str) -> Estimate:
        """A model's mean score with its 95 % interval; where all rows score alike, :func:`bootstrap`'s of that case."""
        column = self.models.index(model)
        values = self.values[:, column].tolist()
        if unmoved(values, self.mean(model), self.groups):
            return bootstrap(values, draws=self.count, groups=self.groups)
        return self._estimate(self.mean(model), self.draws[:, column])

    @cached_property
    def flips(self) -> torch.Tensor:
        """(S, M) means over rows of random signs; the same signs for all models."""
        return flipped_means(self.values, seed=self.seed, draws=self.count, groups=self.groups)

    def difference(self, first: str, second: str) -> Estimate:
        """Mean of ``first − second`` over the rows with its 95 % interval, honest at its edges (:func:`widest`)."""
        one, two = self.models.index(first), self.models.index(second)
        pairs = [(float(a), float(b)) for a, b in self.values[:, [one, two]].tolist()]
        value = (self.values[:, one] - self.values[:, two]).mean().item()
        found = self._estimate(value, self.draws[:, one] - self.draws[:, two])
        low, high = widest(pairs, value, self.groups)
        return Estimate(value, min(found.low, low), max(found.high, high), found.n)

    def p_value(self, first: str, second: str) -> float:
        """Two-sided p-value of no difference: the larger of the bootstrap's and of the paired randomisation test's.

        The latter (R. A. Fisher, The Design of Experiments, 1935, on Darwin's pairs) swaps the two models in rows at
        random; where all scores are yes or no it is McNemar's exact test. Where few rows differ the bootstrap's tail is
        too light: of 10 rows for one model and none for the other it draws none without a difference.
        """
        one, two = self.models.index(first), self.models.index(second)
        value = (self.values[:, one] - self.values[:, two]).mean().item()
        randomised = swapped_p(self.flips[:, one] - self.flips[:, two], value)
        return max(randomised, two_sided_p((self.draws[:, one] - self.draws[:, two]).numpy()))

    def _estimate(self, value: float, drawn: torch.Tensor) -> Estimate:
        low, high = torch.quantile(drawn, ENDS).tolist()
        return Estimate(value, low, high, len(self.rows))


def two_sided_p(drawn: np.ndarray) -> float:
    """Bootstrap p-value of no difference, of drawn differences (S,): twice the smaller tail, at least 2 / (S + 1).

    Draws without a difference are in both tails, whatever way they were rounded.
    """
    tail = min(int((drawn <= EQUAL).sum()), int((drawn >= -EQUAL).sum()))
    return min(1.0, 2 * (tail + 1) / (len(drawn) + 1))


def draws_for(comparisons: int) -> int:
    """How many draws a table of so many comparisons needs: :data:`FINER` for each, and never fewer than usual."""
    return max(DRAWS, FINER * comparisons)


def gathered(
    records: Mapping[str, Sequence[Record]],
    split: Split = "all",
    *,
    share: float = 0.5,
    split_seed: int = 0,
    draws: int = DRAWS,
) -> dict[Measure, Scores]:
    """Scores of models by measure. One with scores that are not finite is left out (:func:`not_finite` says so).

    Args:
        records: Model to the records of its test cells, one per seed.
        split: Which rows.
        share: Share of validation rows.
        split_seed: Which division into validation and test rows.
        draws: Number of bootstrap draws.

    Raises:
        ValueError: two models or seeds answered different rows.
    """
    by_model = {model: [row_scores(record) for record in given] for model, given in records.items()}
    reports = {one for given in records.values() for record in given for one in record.get("reports", ())}
    found: dict[Measure, Scores] = {}
    for measure in MEASURES:
        named = {model: [one[measure] for one in seeds if measure in one] for model, seeds in by_model.items()}
        if not named or not all(named.values()):
            continue
        first = next(iter(named.values()))[0]
        rows = tuple(row for row in first if in_split(row, split, share=share, seed=split_seed, reports=reports))
        for model, seeds in named.items():
            if len(seeds) != len(by_model[model]) or any(one.keys() != first.keys() for one in seeds):
                raise ValueError(f"{model}, {measure}: seeds or models answered different rows")
        if rows:
            columns = [[sum(one[row] for one in seeds) / len(seeds) for row in rows] for seeds in named.values()]
            values = torch.tensor(columns, dtype=torch.float64).T
            if values.isfinite().all():
                # As many rows of other prompts are drawn apart; the same rows alike, whatever is measured on them.
                seed = len({one.rows for one in found.values() if len(one.rows) == len(rows)} - {rows})
                groups = numbered([row[1] for row in rows]) if measure in BY_GOAL else None
                found[measure] = Scores(tuple(named), rows, values, seed, draws, groups)
    return found


def seed_by_seed(
    records: Mapping[str, Sequence[Record]], seeds: int, split: Split = "all", **options: Any
) -> list[dict[Measure, Scores]]:
    """Scores of models on each of so many seeds (:func:`gathered`); rows are resampled alike in all."""
    return [gathered({name: [own[i]] for name, own in records.items()}, split, **options) for i in range(seeds)]


def not_finite(
    records: Mapping[str, Sequence[Record]], split: Split = "all", *, share: float = 0.5, split_seed: int = 0
) -> list[str]:
    """A note for each measure that :func:`gathered` leaves out, as rows of a split have scores that are not finite."""
    bad: dict[Measure, Counter[str]] = defaultdict(Counter)
    for model, given in records.items():
        for record in given:
            reports = record.get("reports", frozenset())
            for measure, scores in row_scores(record).items():
                rows = [row for row, score in scores.items() if not isfinite(score)]
                if count := sum(in_split(row, split, share=share, seed=split_seed, reports=reports) for row in rows):
                    bad[measure][model] += count
    return [
        f"{MEASURES[measure][0]}: left out, as some scores are not finite numbers ("
        + ", ".join(f"{model}: {count}" for model, count in bad[measure].items())
        + ")."
        for measure in MEASURES
        if measure in bad
    ]


def by_category(
    record: Record, split: Split = "all", *, share: float = 0.5, split_seed: int = 0
) -> dict[str, tuple[int, int, int]]:
    """Category to (refused, rows, goals) over a split's harmful rows; those without a category are left out."""
    reports = record.get("reports", set())
    found: dict[str, tuple[int, int, set[str]]] = {}
    for suite in record["settings"]["data"]["suites"]:
        columns = record["found"]["rows"][suite["name"]]
        if suite["kind"] not in HARMFUL or "refused" not in columns:
            continue
        keys = row_keys(suite["name"], columns["ids"])
        for row, text, flag in zip(keys, columns["categories"], columns["refused"], strict=True):
            if text and in_split(row, split, share=share, seed=split_seed, reports=reports):
                for category in categories_of(text):
                    hits, count, goals = found.get(category, (0, 0, set()))
                    found[category] = hits + flag, count + 1, goals | {row[1]}
    return {category: (hits, count, len(goals)) for category, (hits, count, goals) in found.items()}
