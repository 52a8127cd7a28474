"""Interference: what N experts merged at once keep of what each could do alone, and what becomes of safety.

normalised performance of task i = score of the merged model on task i / score of expert i on task i
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

from src.data.row_source import RowSource
from src.data.suite import CHECKED
from src.errors import InputError
from src.experiments.cell import Cell
from src.experiments.costs import cost_table
from src.experiments.document import Document, examples
from src.experiments.grid import Grid, Model
from src.experiments.interference_claims import KEPT, difference_table, kept_claims, summary
from src.experiments.interference_tables import (
    alone_table,
    degradation_table,
    geometry_table,
    hardly_learnt,
    kept_front,
    performance_table,
    safety_alone,
    safety_scores,
    size_table,
    task_table,
)
from src.experiments.kept import kept_of, nothing_alone
from src.experiments.plain_settings import plain
from src.experiments.point_names import name_and_experts, with_count
from src.experiments.recipe import ExpertSpec
from src.experiments.scores import draws_for
from src.experiments.settings import MethodSpec
from src.experiments.store import Store
from src.experiments.study import Plan, Study, check_names, finished, left_out, notes_on, of_methods
from src.experiments.tasks import Task, read_tasks

TASK = "{task}"
"""What stands for a task's name in the place of its expert."""


@dataclass
class TaskExperts:
    """How the experts of tasks are trained.

    Args:
        config: YAML of ``fit`` that everything else comes from.
        settings: Settings over those of ``config``, nested like it.
        val_rows: Rows of a task's training file that choose the checkpoint.
        max_new_tokens: Longest answer to generate in an evaluation, in tokens.
        limit: Most test rows of a task; unset takes all.
        adapter: PEFT LoRA directories or hub repositories to take in place of trainings, with ``{task}`` for a task's
            name: ``experts/{task}``. The same for every seed.
    """

    config: str = "expert.yaml"
    settings: dict[str, Any] | None = None
    val_rows: int = 16
    max_new_tokens: int = 32
    limit: int | None = None
    adapter: str | None = None

    def __post_init__(self) -> None:
        """Stop where a number is out of its range."""
        for key, value in (("max_new_tokens", self.max_new_tokens), ("limit", self.limit)):
            if value is not None and value < 1:
                raise InputError(f"study.experts.{key} is {value}; expected at least 1")
        if self.adapter is not None and TASK not in self.adapter:
            raise InputError(f"study.experts.adapter is {self.adapter}; expected {TASK} in it, for the task's name")


class Interference(Study):
    """Many experts merged at once.

    Args:
        tasks: Folder of tasks (:mod:`src.experiments.tasks`).
        counts: Numbers of experts to merge, rising.
        methods: Combinations, with a safety method or without; ``strength`` is the safety method's.
        experts: How experts are trained.
    """

    def __init__(
        self, tasks: str, counts: list[int], methods: list[MethodSpec], experts: TaskExperts | None = None
    ) -> None:
        check_names(methods)
        self.tasks, self.counts, self.methods = tasks, counts, methods
        self.experts = experts or TaskExperts()
        if not counts or sorted(set(counts)) != counts or counts[0] < 2:
            raise InputError(f"study.counts is {counts}; expected rising numbers of at least 2")
        for method in methods:
            if method.combine is None:
                raise InputError(f"method {method.name}: this study merges experts; expected combine")
            if method.train is not None:
                raise InputError(f"method {method.name}: this study merges experts as they are; leave train out")

    def _ordered(self, seed: int) -> list[Task]:
        """The tasks in the order in which they are added: the folder's for seed 0, shuffled for others."""
        found = read_tasks(self.tasks, trained=self.experts.adapter is None)
        if len(found) < self.counts[-1]:
            raise InputError(f"study.tasks {self.tasks}: {len(found)} tasks; expected at least {self.counts[-1]}")
        if seed:
            random.Random(seed).shuffle(found)
        return found[: self.counts[-1]]

    def plan(self, grid: Grid, seeds: Sequence[int]) -> Plan:
        """Experts alone on their own tasks, and their merges on all of them and on the safety suites."""
        models: list[Model] = []
        others: list[Cell] = []
        safety_suites = [plain(suite) for suite in grid.recipe.evaluation.suites]
        if tasks_too := [suite["name"] for suite in safety_suites if suite.get("kind") in CHECKED]:
            raise InputError(
                f"recipe.evaluation.suites: {', '.join(tasks_too)} asks for right answers, of which a study of "
                "interference shows its experts' own tasks alone; expected suites of harmful and benign prompts"
            )
        asked = {suite["name"] for suite in safety_suites}
        for seed in seeds:
            tasks = self._ordered(seed)
            if both := sorted(asked & {task.name for task in tasks}):
                named = f"study.tasks {self.tasks}: {', '.join(both)}"
                raise InputError(f"{named} is a suite of recipe.evaluation, too; expected tasks of other names")
            experts = [self._expert(grid, task, seed) for task in tasks]
            safety = grid.safety(seed)
            others.append(Cell("inspect", f"geometry, seed {seed}", {}, {"adapters": (*experts, safety)}, units=1.0))
            for task, expert in zip(tasks, experts, strict=True):
                own = grid.test(expert, f"{task.name} alone, seed {seed}", [self._suite(task)])
                models.append(Model(f"expert {task.name}", None, seed, own, expert))
            models.append(Model("safety", None, seed, grid.test(safety, f"safety, seed {seed}"), safety))
            for count in self.counts:
                suites = [*(self._suite(task) for task in tasks[:count]), *safety_suites]
                for spec in self.methods:
                    made = grid.merges(spec, experts[:count], grid.safety(seed, spec=spec), seed)
                    models += [
                        Model(
                            with_count(spec.name, count),
                            spec.shown(value),
                            seed,
                            grid.test(cell, f"{count} experts, {cell.label}", suites),
                            cell,
                            experts=count,
                        )
                        for value, cell in made
                    ]
        there = self.experts.adapter
        given = [] if there is None else [f"Given experts, the same for every seed: {there}."]
        return Plan(models, others, [*notes_on(grid, self.methods), *given])

    def _expert(self, grid: Grid, task: Task, seed: int) -> Cell:
        how = self.experts
        if how.adapter is not None:
            spec = ExpertSpec(adapter=how.adapter.replace(TASK, task.name))
        else:
            train = RowSource(task.train, seed=0, skip=how.val_rows)
            val = RowSource(task.train, seed=0, limit=how.val_rows)
            spec = ExpertSpec(train, val, how.config, how.settings or {})
        return grid.expert(spec, seed, f"expert {task.name}")

    def _suite(self, task: Task) -> dict[str, Any]:
        rows: dict[str, Any] = {"path": task.test} | (
            {} if self.experts.limit is None else {"limit": self.experts.limit}
        )
        suite = {"name": task.name, "kind": "utility", "rows": rows, "max_new_tokens": self.experts.max_new_tokens}
        return suite | ({"rouge": True} if task.metric == "rougeL" else {})

    def report(self, plan: Plan, store: Store) -> Document:
        """Normalised performance by method and number, its slope and variance, sizes, angles, refusal, costs."""
        # Means over other seeds, which merge other tasks, do not compare: a merge is shown with all of its seeds.
        whole, notes = finished([model for model in plan.models if model.experts is not None], store)
        merged = [model for seeds in whole.values() for model in seeds]
        single = [model for model in plan.models if model.experts is None]
        done = [model for model in single if store.has_result(model.test)]
        notes += left_out([model.test.label for model in single if model not in done], len(single))
        alone = {
            (model.method.removeprefix("expert "), model.seed): store.read(model.test)
            for model in done
            if model.method.startswith("expert ")
        }
        names = list(dict.fromkeys(map(name_and_experts, merged)))
        most = max((count for _, count in names), default=0)
        compared = sum(count == most for _, count in names)
        draws = draws_for(len(KEPT) * comb(compared, 2))
        kept = [found for model in merged if (found := kept_of(model, alone, store, draws=draws)) is not None]
        differences = kept_claims(kept)
        scores = safety_scores(merged, store)
        safety = safety_alone([store.read(model.test) for model in done if model.method == "safety"])
        geometry = {i: store.read(cell) for i, cell in enumerate(plan.others) if store.has_result(cell)}
        shown = {model.test.label: model for model in merged if model.seed == merged[0].seed}
        own = alone_table(alone)
        weak = [note for one in own for note in hardly_learnt(one)]
        return {
            "summary": summary(kept, scores, differences),
            "notes": [*notes, *plan.notes, *nothing_alone(merged, alone), *weak],
            "fronts": kept_front(kept, scores),
            "tables": [
                performance_table(names, kept, scores, safety),
                *difference_table(differences, kept),
                degradation_table(kept),
                *own,
                task_table(kept),
                size_table(merged, store),
                *geometry_table(geometry),
                cost_table(of_methods(whole), store),
            ],
            "examples": examples(shown, store),
        }
