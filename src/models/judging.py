"""Judges of an evaluation: one copy for all suites that name it, tried before answers are generated."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from src.data.suite import Suite
from src.data.suites import EvaluationData
from src.errors import InputError
from src.judges.verdicts import Verdicts
from src.metrics.judging import Judge
from src.models.partial import Record
from src.models.stopping import stop_together


def share_judges(suites: Sequence[Suite]) -> None:
    """Give suites that name the same judge, in the same words, one copy of it.

    Raises:
        InputError: a judge that is a local model is not there.
    """
    known: dict[str, Judge] = {}
    for suite in suites:
        if suite.judge is not None:
            suite.judge = known.setdefault(_words(suite.judge), suite.judge)


def _words(judge: Judge) -> str:
    """A judge's key, and how its verdicts are counted."""
    return " ".join([judge.key, *(f"{name}={judge.settings[name]}" for name in sorted(judge.counting))])


def awaited_judges(
    data: EvaluationData, records: Mapping[tuple[int, int], Mapping[int, Record]], models: int, folder: Path
) -> list[Judge]:
    """The judges that will be asked: not all answers are there, or not all verdicts on them.

    Args:
        data: The suites.
        records: For each model and suite (their positions), the known records by sequence.
        models: Number of models.
        folder: Where verdicts are kept.
    """
    found: dict[str, Judge] = {}
    stores: dict[str, Verdicts] = {}
    for number, suite in enumerate(data.suites):
        if suite.judge is None or _words(suite.judge) in found:
            continue
        rows, key = data.rows[suite.name], suite.judge.key
        if key not in stores:
            stores[key] = Verdicts(folder, key)
        for model in range(models):
            known = records.get((model, number), {})
            items = [(row.judged, known[i]["answer"]) for i, row in enumerate(rows) if i in known]
            if len(items) < len(rows) or stores[key].missing(items, final=suite.judge.stands):
                found[_words(suite.judge)] = suite.judge
    return list(found.values())


def check_judges(judges: Sequence[Judge], *, first: bool) -> None:
    """Try the judges in the first process; what is wrong stops all processes. A collective operation.

    Raises:
        InputError: one cannot judge.
    """
    problem = ""
    if first:
        try:
            for judge in judges:
                judge.check()
        except InputError as error:
            problem = str(error)
    stop_together([problem])
