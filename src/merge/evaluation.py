"""The evaluation of a merged adapter as a table for its card.

An evaluation is made after a merge. The same inputs give the same bytes, so merging again with ``--evaluation
metrics.json`` finds the adapter in it by the hash of its weights; numbers of another adapter never get into a card.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.errors import InputError
from src.merge.forms import Form
from src.metrics.file import read_metrics


@dataclass(frozen=True)
class Evaluation:
    """What the test command measured.

    Attributes:
        path: ``metrics.json``.
        models: Its models.
    """

    path: Path
    models: list[dict[str, Any]]

    @classmethod
    def read(cls, path: Path, form: Form) -> "Evaluation":
        """Read the file.

        Raises:
            InputError: it is missing or is not one that the test command wrote, or a full model is to be written.
        """
        if form.full_model:
            raise InputError("evaluation is of adapters; a full model has no hash to be found by")
        record = read_metrics(path)
        if not isinstance(record["models"], list) or not all(map(_is_model, record["models"])):
            raise InputError(
                f"{path}: a model without adapter, suites or measures under 'models'; expected those of an evaluation"
            )
        return cls(path, record["models"])

    def table(self, sha256: str) -> str:
        """Suites and measures of one adapter beside those of the base model, in Markdown.

        Args:
            sha256: Hash of the adapter's weights.

        Raises:
            InputError: the evaluation does not cover the adapter.
        """
        found = [model for model in self.models if (model["adapter"] or {}).get("sha256") == sha256]
        if not found:
            raise InputError(
                f"{self.path}: no model with the weights {sha256[:12]}…, which this merge writes; evaluate the merged "
                "adapter first, then merge again with --evaluation"
            )
        base = next((model for model in self.models if not model["adapter"]), None)
        before = dict(_measures(base)) if base is not None else {}
        lines = ["| suite | measure | this adapter | base model |", "|---|---|---|---|"]
        for (suite, name), value in _measures(found[0]):
            lines.append(f"| {suite} | {name} | {value} | {before.get((suite, name), '')} |")
        return "\n".join([*lines, "", "Values with 95 % intervals, and the number of rows that they are of."])


def _is_model(found: Any) -> bool:
    """Whether this is what the test command writes of one model."""
    if not isinstance(found, dict) or "adapter" not in found:
        return False
    suites = found.get("suites")
    if not isinstance(found["adapter"], dict | None) or not isinstance(suites, dict):
        return False
    return all(isinstance(numbers, dict) and all(map(_is_measure, numbers.items())) for numbers in suites.values())


def _is_measure(entry: tuple[str, Any]) -> bool:
    """Whether a table can show it, or leaves it out."""
    name, found = entry
    if not isinstance(found, dict) or not {"value", "interval", "n"} <= set(found):
        return name != "perplexity" or (isinstance(found, dict) and isinstance(found.get("value"), int | float))
    interval = found["interval"]
    numbers = [found["value"], *interval] if isinstance(interval, list) and len(interval) == 2 else [None]
    return all(isinstance(number, int | float) for number in numbers)


def _measures(model: dict[str, Any]) -> Iterator[tuple[tuple[str, str], str]]:
    """(suite, measure) and its value in words."""
    for suite, numbers in model["suites"].items():
        for name, found in numbers.items():
            if isinstance(found, dict) and {"value", "interval", "n"} <= set(found):
                low, high = found["interval"]
                yield (
                    (suite, name),
                    f"{found['value']:.3f} [{low:.3f}, {high:.3f}], n = {found.get('rows', found['n'])}",
                )
            elif name == "perplexity":
                yield (suite, name), f"{found['value']:.3f}"
