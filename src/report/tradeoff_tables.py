"""Rows of the two tables of a trade-off: each model against the utility expert, and each method's front."""

from src.metrics.bootstrap import Estimate
from src.report.tradeoff import KEEP, Front, Tradeoff

NOTHING = "–"


def _signed(value: Estimate | str) -> str:
    """``+0.12 [-0.03, +0.27]``, or the text that stands in its place."""
    return value if isinstance(value, str) else f"{value.value:+.2f} [{value.low:+.2f}, {value.high:+.2f}]"


def measured(value: Estimate | None) -> str:
    """``0.53 [0.44, 0.62]``, or a dash where there is nothing."""
    return NOTHING if value is None else f"{value.value:.2f} [{value.low:.2f}, {value.high:.2f}]"


def cost_rows(found: Tradeoff) -> list[list[str]]:
    """Heading and a row per model."""
    gain, loss = found.costs[0].gain.n, found.costs[0].loss.n
    heads = ["model", f"safety gain, n = {gain}", f"utility loss, n = {loss}", "safety tax", f"drift, n = {loss}"]
    return [
        heads,
        *([c.label, _signed(c.gain), _signed(c.loss), _signed(c.tax), _signed(c.drift)] for c in found.costs),
    ]


def front_rows(found: Tradeoff) -> list[list[str]]:
    """Heading and a row per method."""
    safety, utility = found.costs[0].gain.n, found.costs[0].loss.n
    heads = [
        "method",
        "strengths",
        f"Safety@{KEEP:.0%}Utility, n = {safety}",
        f"Utility@ASR≤{found.attacks_at_most:g}, n = {utility}",
        f"hypervolume, n = {min(safety, utility)}",
    ]
    return [heads, *(_front(front) for front in found.fronts)]


def _front(front: Front) -> list[str]:
    numbers = (front.safety_at_utility, front.utility_at_attack, front.hypervolume)
    return [front.method, str(front.points), *map(measured, numbers)]


COST_COLUMNS = [
    f"{name} {part}"
    for name in ("safety gain", "utility loss", "safety tax", "drift")
    for part in ("value", "low", "high")
]


def cost_columns(found: Tradeoff, name: str) -> list[float | str]:
    """Columns of a model in the CSV, as :data:`COST_COLUMNS`; empty for the expert itself."""
    cost = next((one for one in found.costs if one.name == name), None)
    if cost is None:
        return [""] * len(COST_COLUMNS)
    columns: list[float | str] = []
    for value in (cost.gain, cost.loss, cost.tax, cost.drift):
        columns += [value, "", ""] if isinstance(value, str) else [value.value, value.low, value.high]
    return columns
