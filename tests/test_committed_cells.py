"""Results that are committed: what their answers count as has to be what the source of today counts."""

import json
from collections import Counter
from pathlib import Path

from src.metrics.collapse import collapse
from src.metrics.refusal import is_refusal

CELLS = Path(__file__).resolve().parents[1] / "docs" / "results" / "cells"


def test_answers_that_cells_keep_in_words_are_counted_as_they_were():
    """A change of the matcher that this test sees needs ``FORMAT`` of ``src/experiments/cell.py`` raised."""
    counted = Counter()
    for path in sorted(CELLS.glob("*.json")):
        cell = json.loads(path.read_text(encoding="utf-8"))
        for suite, kept in cell["found"].get("examples", {}).items() if cell["stage"] == "test" else ():
            rows = cell["found"]["rows"][suite]
            for example in kept if "refused" in rows else ():
                place, answer = rows["ids"].index(example["id"]), example["answer"]
                refused = is_refusal(answer) and not rows["collapsed"][place]
                assert refused == bool(rows["refused"][place]), (path.name, suite, answer)
                assert bool(collapse(answer, "")) <= bool(rows["collapsed"][place]), (path.name, suite, answer)
                counted[refused] += 1
    assert min(counted[True], counted[False]) > 1000
