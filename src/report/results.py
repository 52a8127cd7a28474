"""Evaluation results as rows of a table: one per model, in the order base, experts, merges by method and strength."""

from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from src.errors import InputError, one_line
from src.files import read_json
from src.merge.sweep import swept_once
from src.metrics.bootstrap import Estimate

COLUMNS = {
    "harmful": (("refusal", "refusal"), ("attack_success", "attack success")),
    "borderline": (("refusal", "over-refusal"),),
    "benign": (("refusal", "over-refusal"),),
    "utility": (("exact_match", "accuracy"),),
    "jailbreak": (("refusal", "jailbreak refusal"), ("attack_success", "attack success")),
    "choice": (("accuracy", "accuracy"),),
    "code": (("pass@1", "pass@1"),),
}
"""Kind of suite to the counters that matter for it, where it has them, each with the name of its column."""
METRICS = "metrics.json"
EXPERT_ORDER = ("utility", "safety")


@dataclass(frozen=True)
class ModelResult:
    """One evaluated model.

    Attributes:
        name: Its name in the evaluation.
        method: ``base``, ``expert`` or the merge method.
        alpha: Strength of a merge.
        shares: Column to share, with Wilson's interval; of ROUGE-L and of pass@1 over several samples, which are means
            of parts, with a bootstrap's.
        collapse: Suite to share of collapsed answers.
        perplexity: Suite to perplexity of the reference answers.
        swept: The option and value that tell a merge from the others of its path, where alpha does not.
    """

    name: str
    method: str
    alpha: float | None
    shares: dict[str, Estimate]
    collapse: dict[str, float]
    perplexity: dict[str, float]
    swept: tuple[str, float] | None = None

    @property
    def path(self) -> str:
        """What its points form a path of: a merge method over its strengths, or the model alone."""
        if self.alpha is None:
            return self.name
        return self.method if self.swept is None else f"{self._unswept} over {self.swept[0]}"

    @property
    def strength(self) -> tuple[str, float] | None:
        """Name and value of what grows along its path; nothing where it is no merge."""
        return self.swept or (None if self.alpha is None else ("α", self.alpha))

    @property
    def label(self) -> str:
        """Name in tables: a merge is called by method and strength."""
        if self.strength is None:
            return self.name
        return f"{self._unswept if self.swept else self.method}, {self.strength[0]} = {self.strength[1]:g}"

    @property
    def _unswept(self) -> str:
        """Its method, and alpha where that is not 1, without what was swept."""
        assert self.swept is not None
        name = self.method.rpartition(f", {self.swept[0]} = ")[0]
        return name if self.alpha == 1 else f"{name}, α = {self.alpha:g}"


def load_results(folder: Path) -> list[ModelResult]:
    """Read ``metrics.json`` of an evaluation.

    Raises:
        InputError: the file is missing or is not one that the test command wrote.
    """
    path = folder / METRICS
    record = read_json(path, "the metrics of an evaluation (made by `python -m src test`)")
    if not isinstance(record, dict) or not record.get("models"):
        raise InputError(f"{path}: no key 'models'; expected the metrics of an evaluation")
    try:
        found = [_result(model) for model in record["models"]]
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        why = f"{type(error).__name__}: {one_line(error)}"
        raise InputError(f"{path}: 'models' is not what `python -m src test` writes there ({why})") from None
    return sorted(_by_sweep(found), key=_order)


def _by_sweep(found: list[ModelResult]) -> list[ModelResult]:
    """Merges at one alpha, several of a swept option, lie on a path along that option."""
    paths = defaultdict(list)
    for one in found:
        if one.alpha is not None and (point := swept_once(one.method)):
            paths[point[:2]].append((one, point))
    swept: dict[str, tuple[str, float]] = {}
    for points in paths.values():
        if len({one.alpha for one, _ in points}) == 1 < len({value for _, (*_, value) in points}):
            swept |= {one.name: (option, value) for one, (_, option, value) in points}
    return [replace(one, swept=swept.get(one.name)) for one in found]


def _result(model: dict[str, Any]) -> ModelResult:
    manifest = model["manifest"]
    kind = manifest.get("kind")
    method = model["name"] if not model["adapter"] else manifest.get("method") if kind == "merge" else "expert"
    suites = model["suites"]
    shares = {}
    for name, suite in suites.items():
        # A suite that asks for ROUGE has free answers: an exact match says nothing there.
        for key, column in (("rouge_l", "ROUGE-L"),) if "rouge_l" in suite else COLUMNS[suite["kind"]]:
            if key in suite:
                low, high = suite[key]["interval"]
                shares[f"{column} ({name})"] = Estimate(suite[key]["value"], low, high, suite[key]["n"])
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
    method = "" if result.method == "TaskArithmetic" else result.path
    return group, expert, method, result.strength[1] if result.strength else 0.0, result.name
