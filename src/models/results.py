"""Results of an evaluation: gathered from all processes, graded, summed up and written."""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed import all_gather_object, is_initialized

from src.adapters.peft_files import Adapter
from src.data.rows import rows_sha256
from src.data.suite import CHECKED, Suite
from src.data.suites import EvaluationData
from src.errors import InputError
from src.files import write_json
from src.judges.verdicts import Verdicts, judged
from src.metrics.code import program
from src.metrics.file import METRICS
from src.metrics.judging import Judgement
from src.models.answer_files import answer_file, remove_other_answers, write_answers
from src.models.grading import (
    Graded,
    choice_scores,
    compared,
    goals_of,
    graded_answer,
    graded_choice,
    graded_code,
    safety_line,
    safety_summary,
    suite_summary,
    utility_line,
)
from src.models.partial import FOLDER, Record
from src.provenance import versions
from src.sandbox.run import Limits, outcome_key, run_program

log = logging.getLogger(__name__)

LIMITS = Limits()


class Results:
    """All records of an evaluation.

    Args:
        data: The suites.
        models: Names of the models.
        records: For each model and suite (their positions), this process's records by sequence.
        output: Directory to write.
        trainer: Tells this process from the others.
    """

    def __init__(
        self,
        data: EvaluationData,
        models: Sequence[str],
        records: Mapping[tuple[int, int], Mapping[int, Record]],
        output: Path,
        trainer: Any,
    ) -> None:
        self.data, self.models, self.output = data, list(models), output
        self.rank, self.world_size = trainer.global_rank, trainer.world_size
        # NCCL gathers what lies on a GPU only.
        self.device = trainer.strategy.root_device if is_initialized() else torch.device("cpu")
        self.graded: dict[tuple[int, int], list[Record]] = {}
        self._stores: dict[str, Verdicts] = {}
        parts = self._gathered(dict(records))
        self.records = {
            (model, number): self._whole(parts, model, number)
            for model in range(len(models))
            for number in range(len(data.suites))
        }

    def _gathered(self, mine: Any) -> list[Any]:
        """What every process holds."""
        if not is_initialized():
            return [mine]
        found: list[Any] = [None] * self.world_size
        all_gather_object(found, mine)
        return found

    def _whole(self, parts: Sequence[Mapping[Any, Any]], model: int, number: int) -> list[Record]:
        """Records of every sequence, in order; one that several processes hold is the same in each."""
        suite = self.data.suites[number]
        found: dict[int, Record] = {}
        for part in parts:
            found |= part.get((model, number), {})
        count = len(self.data.tokens[suite.name].encoded)
        if sorted(found) != list(range(count)):
            raise RuntimeError(
                f"{self.models[model]}, {suite.name}: {len(found)} results for {count} rows; each must occur once"
            )
        return [found[i] for i in range(count)]

    def grade(self, *, device: str, allow_code_execution: bool) -> None:
        """Grade every row; judging and running programs are shared out between the processes."""
        for (model, number), records in self.records.items():
            suite = self.data.suites[number]
            rows: Any = self.data.rows[suite.name]
            units = self.data.tokens[suite.name].units
            if suite.kind == "choice":
                grouped = [[records[i] for i in unit] for unit in units]
                found = [graded_choice(suite, row, group) for row, group in zip(rows, grouped, strict=True)]
            elif not suite.generates:
                found = records
            elif suite.kind == "code":
                outcomes = self._outcomes(suite, records, allow_code_execution)
                found = [graded_code(suite, [records[i] for i in u], [outcomes[i] for i in u]) for u in units]
            else:
                verdicts = self._verdicts(suite, records, device)
                graded = zip(rows, records, verdicts, strict=True)
                found = [graded_answer(suite, row, record, verdict) for row, record, verdict in graded]
            self.graded[model, number] = found

    def _shared(self, compute: Callable[[], Sequence[Any]], count: int) -> list[Any]:
        """Values of all processes, each of which computes every so-manieth one, in order.

        What stops one process stops all: the others would wait for it for ever.
        """
        mine: Any
        try:
            mine = list(compute())
        except InputError as error:
            mine = error
        parts = self._gathered(mine)
        for part in parts:
            if isinstance(part, InputError):
                raise part
        return [parts[i % len(parts)][i // len(parts)] for i in range(count)]

    def _verdicts(self, suite: Suite, records: Sequence[Record], device: str) -> list[Judgement | None]:
        if suite.judge is None:
            return [None] * len(records)
        mine = range(self.rank, len(records), self.world_size)
        rows = self.data.rows[suite.name]
        verdicts = partial(
            judged,
            suite.judge,
            [rows[i].judged for i in mine],
            [records[i]["answer"] for i in mine],
            folder=self._store(suite.judge.key),
            device=device,
        )
        return self._shared(verdicts, len(records))

    def _store(self, key: str) -> Verdicts:
        """What is known under a key, read once."""
        if key not in self._stores:
            self._stores[key] = Verdicts(self.output / FOLDER, key, str(self.rank))
        return self._stores[key]

    def _outcomes(self, suite: Suite, records: Sequence[Record], allow: bool) -> list[dict[str, str]]:
        """How the program of each sample ended."""
        encoded: Any = self.data.tokens[suite.name].encoded

        def ending(items: Sequence[Sequence[str]]) -> list[Any]:
            return [vars(run_program(item[0], LIMITS, allow_code_execution=allow)) for item in items]

        mine = range(self.rank, len(records), self.world_size)
        programs = []
        for i in mine:
            row = encoded[i].row
            programs.append([program(row.prompt, records[i]["answer"], row.test, row.entry_point)])
        store = self._store(f"programs-{outcome_key(LIMITS)}")
        return self._shared(lambda: store.mapped(programs, ending, final=_ended), len(records))

    def write_metrics(
        self,
        base: Mapping[str, str],
        models: Mapping[str, Adapter | None],
        settings: Mapping[str, Any],
        *,
        baseline: str,
        all_pairs: bool = False,
    ) -> None:
        """Count over all processes; the first writes ``metrics.json``, with differences to the baseline or of pairs."""
        found: list[Record] = []
        for model, (name, adapter) in enumerate(models.items()):
            suites = {suite.name: self._summary(model, number) for number, suite in enumerate(self.data.suites)}
            found.append(
                {
                    "name": name,
                    "adapter": adapter and {"path": adapter.name, "sha256": adapter.sha256},
                    "manifest": {} if adapter is None else _of_manifest(adapter.manifest),
                    "suites": suites,
                    "safety": safety_summary(self._graded(model)),
                }
            )
        if self.rank == 0:
            for model, one in enumerate(found):
                one["against"] = self._against(model, baseline, all_pairs=all_pairs)
                said = ", ".join(filter(None, (safety_line(one["safety"]), utility_line(one["suites"]))))
                log.info("%s: %s%s", one["name"], said or "no answers to count", self._cut(one["suites"]))
            rows = {name: rows_sha256(each) for name, each in self.data.rows.items()}
            record = {"base": base, "models": found, "rows_sha256": rows, "versions": versions(), "settings": settings}
            write_json(self.output / METRICS, record)

    def _cut(self, suites: Mapping[str, Record]) -> str:
        """In suites whose answers count whole, how many were cut at their most tokens; a refusal shows before."""
        whole = [suite for suite in self.data.suites if suite.judge is not None or suite.kind in CHECKED]
        found = [(suite, suites[suite.name].get("unfinished", 0)) for suite in whole]
        said = ", ".join(f"{suite.name} {count} of {self._asked(suite)}" for suite, count in found if count)
        return f"; answers cut at max_new_tokens: {said}" if said else ""

    def _asked(self, suite: Suite) -> int:
        """Number of answers to a suite, samples included."""
        return len(self.data.tokens[suite.name].encoded)

    def _against(self, model: int, baseline: str, *, all_pairs: bool) -> Record:
        """Paired differences to the baseline and, of all pairs, to each model before this one; then suite by suite."""
        others = sorted({self.models.index(baseline), *range(model if all_pairs else 0)})
        return {
            self.models[other]: {
                suite.name: compared(
                    self.graded[model, number], self.graded[other, number], goals_of(suite, self.data.rows[suite.name])
                )
                for number, suite in enumerate(self.data.suites)
            }
            for other in others
            if other != model
        }

    def _graded(self, model: int) -> list[Graded]:
        """The graded rows of every suite."""
        return [
            Graded(suite.kind, self.graded[model, number], goals_of(suite, self.data.rows[suite.name]))
            for number, suite in enumerate(self.data.suites)
        ]

    def _summary(self, model: int, number: int) -> Record:
        suite = self.data.suites[number]
        rows, graded = self.data.rows[suite.name], self.graded[model, number]
        process = {"rank": self.rank, "world_size": self.world_size, "device": self.device}
        summary = suite_summary(suite, rows, graded, **process)
        tokens = self.data.tokens[suite.name]
        counts = {"cut": tokens.cut, "cut_references": tokens.cut_references}
        return summary | {name: count for name, count in counts.items() if count}

    def write_answers(self) -> None:
        """The first process writes one JSONL file per model and suite, a line per row."""
        if self.rank != 0:
            return
        for (model, number), records in self.records.items():
            suite = self.data.suites[number]
            units = self.data.tokens[suite.name].units
            each = self.graded.get((model, number)) or [_raw(suite, [records[i] for i in unit]) for unit in units]
            path = answer_file(self.output, self.models[model], suite.name)
            write_answers(path, self.data.rows[suite.name], each)
        names = [(self.models[model], self.data.suites[number].name) for model, number in self.records]
        remove_other_answers(self.output, {answer_file(self.output, *each) for each in names})


def _ended(outcome: Mapping[str, str]) -> bool:
    """Whether a program's ending stands: one that ran out of time may have met a busy machine."""
    return outcome["ending"] != "timeout"


def _raw(suite: Suite, records: Sequence[Record]) -> Record:
    """What was found on a row, ungraded: its answer or answers, or the scores of its choices."""
    if suite.kind == "choice":
        return {"scores": choice_scores(records)}
    if suite.kind == "code":
        answers = [record["answer"] for record in records]
        return {"answers": answers, "unfinished": [record["unfinished"] for record in records]}
    return records[0]


def _of_manifest(manifest: Mapping[str, Any]) -> Record:
    """What an adapter is listed under and, of a merge, what tells it from others of its method and strength."""
    kept = {key: manifest.get(key) for key in ("kind", "method", "alpha")}
    if kept["kind"] != "merge":
        return kept
    kept |= {key: manifest.get(key) for key in ("settings", "utility", "safety", "fisher")}
    for key, parts in (("combine", ("method", "settings")), ("flags", ("rank", "energy"))):
        kept[key] = {part: (manifest.get(key) or {}).get(part) for part in parts}
    return kept
