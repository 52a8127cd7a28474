"""Evaluation results as rows of a table: one per model, in the order base, experts, merges by method and strength."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.errors import InputError
from src.files import read_json

COLUMNS = {
    "harmful": ("refusal", "refusal"),
    "borderline": ("refusal", "over-refusal"),
    "benign": ("refusal", "over-refusal"),
    "utility": ("exact_match", "accuracy"),
    "jailbreak": ("attack_success", "attack success"),
    "choice": ("accuracy", "accuracy"),
    "code": ("pass@1", "pass@1"),
}
"""Kind of suite to the counter that matters for it and the name of its column."""
EXPERT_ORDER = ("utility", "safety")


@dataclass(frozen=True)
class Share:
    """A measured share with its 95 % Wilson interval and number of trials."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        """``.53 [.44, .62]``."""
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class ModelResult:
    """One evaluated model.

    Attributes:
        name: Its name in the evaluation.
        method: ``base``, ``expert`` or the merge method.
        alpha: Strength of a merge.
        shares: Column to share.
        collapse: Suite to share of collapsed answers.
        perplexity: Suite to perplexity of the reference answers.
    """

    name: str
    method: str
    alpha: float | None
    shares: dict[str, Share]
    collapse: dict[str, float]
    perplexity: dict[str, float]

    @property
    def label(self) -> str:
        """Name in tables: a merge is called by method and strength."""
        return self.name if self.alpha is None else f"{self.method}, α = {self.alpha:g}"


def load_results(folder: Path) -> list[ModelResult]:
    """Read ``metrics.json`` of an evaluation.

    Raises:
        InputError: the file is missing or is not one that the test command wrote.
    """
    path = folder / "metrics.json"
    record = read_json(path, "the metrics of an evaluation (made by `python -m src test`)")
    if not isinstance(record, dict) or not record.get("models"):
        raise InputError(f"{path}: no key 'models'; expected the metrics of an evaluation")
    return sorted((_result(model) for model in record["models"]), key=_order)


def _result(model: dict[str, Any]) -> ModelResult:
    manifest = model["manifest"]
    kind = manifest.get("kind")
    method = model["name"] if not model["adapter"] else manifest.get("method") if kind == "merge" else "expert"
    suites = model["suites"]
    shares = {}
    for name, suite in suites.items():
        key, column = COLUMNS[suite["kind"]]
        if key in suite:
            found = suite[key]
            shares[f"{column} ({name})"] = Share(found["value"], found["interval"][0], found["interval"][1], found["n"])
    return ModelResult(
        name=model["name"],
        method=str(method),
        alpha=manifest.get("alpha") if kind == "merge" else None,
        shares=shares,
        collapse={name: suite["collapse"]["value"] for name, suite in suites.items() if "collapse" in suite},
        perplexity={name: suite["perplexity"]["value"] for name, suite in suites.items() if "perplexity" in suite},
    )


def _order(result: ModelResult) -> tuple[int, int, str, float, str]:
    group = 0 if result.method == "base" else 1 if result.method == "expert" else 2
    leaf = Path(result.name).name
    expert = EXPERT_ORDER.index(leaf) if leaf in EXPERT_ORDER else len(EXPERT_ORDER)
    # Task arithmetic is the baseline: its block comes before those of other methods.
    method = "" if result.method == "TaskArithmetic" else result.method
    return group, expert, method, result.alpha or 0.0, result.name
