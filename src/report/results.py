"""Evaluation results as rows of a table: one per model, in the order base, experts, merges by method and strength."""

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from src.errors import InputError, one_line
from src.merge.sweep import swept_once
from src.metrics.bootstrap import Estimate
from src.metrics.file import METRICS, read_metrics

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
OPTION = re.compile(r", ([\w.]+) = ")
SWEPT = re.compile(r"(?:, [\w.]+ = -?[\d.]+(?:e[+-]?\d+)?)+$")
"""What the name of a merge ends in where options were swept."""
POINT = re.compile(r"[\w.]+--?[\d.]+(?:e[+-]?\d+)?")
"""Name of a folder of one point: ``alpha-0.5``."""
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
    record = read_metrics(path)
    try:
        found = _told_apart(record["models"], [_result(model) for model in record["models"]])
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        why = f"{type(error).__name__}: {one_line(error)}"
        raise InputError(f"{path}: 'models' is not what `python -m src test` writes there ({why})") from None
    return sorted(_by_sweep(found), key=_order)


def _told_apart(models: Sequence[Mapping[str, Any]], found: list[ModelResult]) -> list[ModelResult]:
    """Merges of one method that differ in more than their strengths get the folders that they lie in beside its name.

    Points of one path are of the same settings, adapters and Fisher files; others are a method of their own.
    """
    made: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for i, (model, one) in enumerate(zip(models, found, strict=True)):
        if one.alpha is not None:
            made[SWEPT.sub("", one.method)][_made_of(model["manifest"], one.method)].append(i)
    several = {i: name for name, groups in made.items() if len(groups) > 1 for each in groups.values() for i in each}
    for i, name in several.items():
        folder = Path(found[i].name)
        while POINT.fullmatch(folder.name):
            folder = folder.parent
        found[i] = replace(found[i], method=f"{name} ({folder}){found[i].method[len(name) :]}")
    return found


def _made_of(manifest: Mapping[str, Any], method: str) -> str:
    """What a merge was made of and how, but for its strength and the options that its name says were swept."""
    swept = set(OPTION.findall(method))
    combine = manifest.get("combine") or {}
    own = {key: value for key, value in (manifest.get("settings") or {}).items() if key not in swept}
    first = {k: value for k, value in (combine.get("settings") or {}).items() if f"combine.{k}" not in swept}
    experts = [[one.get("sha256"), one.get("weight")] for one in manifest.get("utility") or ()]
    files = [(manifest.get("safety") or {}).get("sha256"), *(one.get("sha256") for one in manifest.get("fisher") or ())]
    form = {key: (manifest.get("flags") or {}).get(key) for key in ("rank", "energy")}
    return json.dumps([own, combine.get("method"), first, experts, files, form], sort_keys=True, default=str)


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
    method = result.path.removeprefix("TaskArithmetic")
    return group, expert, method, result.strength[1] if result.strength else 0.0, result.name
