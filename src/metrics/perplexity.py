"""Perplexity of reference answers, teacher-forced, and how two models differ in it on the same rows."""

from collections.abc import Sequence
from math import exp, inf, isfinite, nan
from typing import Any

import torch
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from src.metrics.bootstrap import ENDS, resampled_means
from src.metrics.categories import categories_of, each_category

MICRO = 1_000_000
"""Negative log-likelihoods are summed in whole micro-nats: integer addition is associative, float addition is not."""
LARGEST = 700.0
"""Nats per token whose perplexity is a float64."""


class AnswerPerplexity(Metric):
    """``exp(Σ NLL / Σ tokens)`` of reference answers, teacher-forced, over all of them and by category.

    A row whose likelihood is 0 or not a number makes the perplexity infinite: it is counted, never left out.

    Args:
        categories: What rows may have as their category; every process must give the same ones.
    """

    full_state_update = False
    rows: list[torch.Tensor]

    def __init__(self, categories: Sequence[str] = ()) -> None:
        super().__init__()
        self.categories = list(categories)
        # Of each row the NLL in micro-nats, the number of tokens, whether the NLL is finite, and which category it has.
        self.add_state("rows", [], dist_reduce_fx="cat")

    def update(self, nll: torch.Tensor, tokens: torch.Tensor, categories: Sequence[str] | None = None) -> None:
        """Add rows: summed negative log-likelihood (N,) in nats and number of answer tokens (N,), their categories."""
        finite = nll.isfinite()
        micro = (torch.where(finite, nll, 0).double() * MICRO).round().long()
        places = [self.categories.index(name) for name in categories] if categories else [-1] * len(nll)
        columns = [micro, tokens.long(), finite.long(), torch.tensor(places, dtype=torch.int64, device=micro.device)]
        self.rows.append(torch.stack(columns, 1))

    def compute(self) -> torch.Tensor:
        """Perplexity, float64; NaN before the first token."""
        return torch.tensor(self._mean_nll(self._known()), dtype=torch.float64).exp()

    def summary(self) -> dict[str, Any]:
        """Perplexity and mean negative log-likelihood (nats per token) over n answer tokens of all processes.

        The 95 % interval is a bootstrap over rows; there is none for one row, or where a likelihood is not finite.
        ``not_finite`` is the number of such rows, where there are any. By category the same, where there are any.
        """
        with self.sync_context():
            rows = self._known()
        found = self._summary(rows)
        if not self.categories:
            return found
        names = [categories_of(self.categories[place]) for place in rows[:, 3].tolist()]
        groups = {one: torch.tensor([one in each for each in names]) for one in each_category(self.categories)}
        return found | {"categories": {one: self._summary(rows[chosen]) for one, chosen in groups.items()}}

    def _summary(self, rows: torch.Tensor) -> dict[str, Any]:
        nll = self._mean_nll(rows)
        strange = int((rows[:, 2] == 0).sum())
        value = torch.tensor(nll).double().exp().item()
        found = {"value": value, "nll": nll, "n": int(rows[:, 1].sum()), "rows": len(rows)}
        if strange:
            return found | {"not_finite": strange}
        return found | ({"interval": _perplexity_interval(rows)} if len(rows) > 1 else {})

    def _known(self) -> torch.Tensor:
        """All rows (N, 4) so far, int64, on the processor."""
        empty = torch.zeros(0, 4, dtype=torch.int64)
        return dim_zero_cat(self.rows).cpu() if len(self.rows) else empty

    @staticmethod
    def _mean_nll(rows: torch.Tensor) -> float:
        micro, tokens, finite, _ = rows.sum(0).tolist()
        if finite < len(rows):
            return inf
        return micro / MICRO / tokens if tokens else nan


def _perplexity_interval(rows: torch.Tensor) -> list[float]:
    """95 % interval of the perplexity of rows (N, 4), whatever their order."""
    ordered = torch.tensor(sorted(rows[:, :2].tolist()), dtype=torch.float64)
    means = resampled_means(ordered)
    ends: list[float] = torch.quantile(means[:, 0] / means[:, 1] / MICRO, ENDS).exp().tolist()
    return ends


def perplexity_difference(
    first: Sequence[float], second: Sequence[float], tokens: Sequence[int], *, draws: int
) -> dict[str, Any]:
    """Perplexity of a model minus that of another on the same rows, with its 95 % interval by a paired bootstrap.

    There is no interval for one row, and no value where a perplexity is not finite.

    Args:
        first: Summed negative log-likelihood of each row's answer under one model, in nats.
        second: The same under the other.
        tokens: Answer tokens of each row.
        draws: Bootstrap draws.
    """
    count, total = len(tokens), sum(tokens)
    ends = [sum(nll) / total if total else inf for nll in (first, second)]
    if not all(map(isfinite, ends)) or max(ends) > LARGEST:
        return {"value": None, "n": count}
    found: dict[str, Any] = {"value": exp(ends[0]) - exp(ends[1]), "n": count}
    if count > 1:
        means = resampled_means(torch.tensor([first, second, tokens], dtype=torch.float64).T, draws=draws)
        each = (means[:, :2] / means[:, 2:]).exp()
        ends = torch.quantile(each[:, 0] - each[:, 1], ENDS).tolist()
        found |= {"interval": ends} if all(map(isfinite, ends)) else {}
    return found
