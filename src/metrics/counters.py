"""torchmetrics of the evaluation loop. All states are integers: the order of rows and ranks cannot matter."""

from collections.abc import Sequence
from math import inf, nan
from typing import Any

import torch
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from src.metrics.bootstrap import ENDS, resampled_means
from src.metrics.collapse import is_collapsed
from src.metrics.exact import AnswerForm, is_exact
from src.metrics.intervals import wilson
from src.metrics.refusal import is_refusal

MICRO = 1_000_000
"""Negative log-likelihoods are summed in whole micro-nats: integer addition is associative, float addition is not."""
NO_CATEGORY = "none"
"""Where rows without a category are counted, if others have one."""


class Rate(Metric):
    """Share of answers with a property: ``hits / total``, over all of them and by category.

    Args:
        categories: Names of the categories that answers may belong to; every process must give the same ones.
    """

    full_state_update = False
    hits: torch.Tensor
    total: torch.Tensor

    def __init__(self, categories: Sequence[str] = ()) -> None:
        super().__init__()
        self.categories = list(categories)
        size = 1 + len(self.categories)
        self.add_state("hits", torch.zeros(size, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(size, dtype=torch.int64), dist_reduce_fx="sum")

    def count(self, flags: Sequence[bool], categories: Sequence[str] | None = None) -> None:
        """Add one answer per flag, each to its category where there are any."""
        self.hits[0] += sum(flags)
        self.total[0] += len(flags)
        for flag, category in zip(flags, categories or (), strict=bool(categories)):
            place = 1 + self.categories.index(category)
            self.hits[place] += int(flag)
            self.total[place] += 1

    def compute(self) -> torch.Tensor:
        """The share over all categories, float64; NaN before the first answer."""
        return self.hits[0].double() / self.total[0]

    def summary(self) -> dict[str, Any]:
        """Value, 95 % Wilson interval, hits and n over all processes; the same by category where there are any."""
        with self.sync_context():
            hits, total = self.hits.tolist(), self.total.tolist()
        found = share(hits[0], total[0])
        if not self.categories:
            return found
        counted = zip(self.categories, hits[1:], total[1:], strict=True)
        return found | {"categories": {name: share(h, n) for name, h, n in counted if n}}


def named_categories(categories: Sequence[str]) -> list[str]:
    """The category of each row, :data:`NO_CATEGORY` where it has none; nothing where no row has one."""
    return [category or NO_CATEGORY for category in categories] if any(categories) else []


def share(hits: int, total: int) -> dict[str, Any]:
    """A counted share with its 95 % Wilson interval."""
    return {"value": hits / total, "interval": list(wilson(hits, total)), "hits": hits, "n": total}


class FlagRate(Rate):
    """Share of rows with a flag that was set elsewhere."""

    def update(self, flags: Sequence[bool], categories: Sequence[str] | None = None) -> None:
        """Count rows."""
        self.count(flags, categories)


class RefusalRate(Rate):
    """Share of answers that open with a refusal. On safe prompts the same number is the over-refusal rate.

    A collapsed answer ("I can't I can't I can't …") is no refusal: it is never counted as safe.
    """

    def update(self, answers: Sequence[str]) -> None:
        """Count answers."""
        self.count([is_refusal(answer) and not is_collapsed(answer) for answer in answers])


class CollapseRate(Rate):
    """Share of answers that are empty, repeating or without a word."""

    def update(self, answers: Sequence[str]) -> None:
        """Count answers."""
        self.count([is_collapsed(answer) for answer in answers])


class ExactMatch(Rate):
    """Share of answers that equal their reference."""

    def __init__(self, form: AnswerForm = "text") -> None:
        super().__init__()
        self.form: AnswerForm = form

    def update(self, answers: Sequence[str], references: Sequence[str]) -> None:
        """Count answers against references."""
        pairs = zip(answers, references, strict=True)
        self.count([is_exact(answer, reference, self.form) for answer, reference in pairs])


class AnswerPerplexity(Metric):
    """``exp(Σ NLL / Σ tokens)`` of reference answers, teacher-forced.

    A row whose likelihood is 0 or not a number makes the perplexity infinite: it is counted, never left out.
    """

    full_state_update = False
    rows: list[torch.Tensor]

    def __init__(self) -> None:
        super().__init__()
        # Of each row the NLL in micro-nats, the number of tokens, and whether the NLL is finite.
        self.add_state("rows", [], dist_reduce_fx="cat")

    def update(self, nll: torch.Tensor, tokens: torch.Tensor) -> None:
        """Add rows: summed negative log-likelihood (N,) in nats and number of answer tokens (N,)."""
        finite = nll.isfinite()
        micro = (torch.where(finite, nll, 0).double() * MICRO).round().long()
        self.rows.append(torch.stack([micro, tokens.long(), finite.long()], 1))

    def compute(self) -> torch.Tensor:
        """Perplexity, float64; NaN before the first token."""
        return torch.tensor(self._mean_nll(self._known()), dtype=torch.float64).exp()

    def summary(self) -> dict[str, Any]:
        """Perplexity and mean negative log-likelihood (nats per token) over n answer tokens of all processes.

        The 95 % interval is a bootstrap over rows; there is none for one row, or where a likelihood is not finite.
        ``not_finite`` is the number of such rows, where there are any.
        """
        with self.sync_context():
            rows = self._known()
        nll = self._mean_nll(rows)
        strange = int((rows[:, 2] == 0).sum())
        value = torch.tensor(nll).double().exp().item()
        found = {"value": value, "nll": nll, "n": int(rows[:, 1].sum()), "rows": len(rows)}
        if strange:
            return found | {"not_finite": strange}
        return found | ({"interval": _perplexity_interval(rows)} if len(rows) > 1 else {})

    def _known(self) -> torch.Tensor:
        """All rows (N, 3) so far, int64, on the processor."""
        empty = torch.zeros(0, 3, dtype=torch.int64)
        return dim_zero_cat(self.rows).cpu() if len(self.rows) else empty

    @staticmethod
    def _mean_nll(rows: torch.Tensor) -> float:
        micro, tokens, finite = rows.sum(0).tolist()
        if finite < len(rows):
            return inf
        return micro / MICRO / tokens if tokens else nan


def _perplexity_interval(rows: torch.Tensor) -> list[float]:
    """95 % interval of the perplexity of rows (N, 3), whatever their order."""
    ordered = torch.tensor(sorted(rows[:, :2].tolist()), dtype=torch.float64)
    means = resampled_means(ordered)
    ends: list[float] = torch.quantile(means[:, 0] / means[:, 1] / MICRO, ENDS).exp().tolist()
    return ends
