"""The module that evaluates a base model and any number of adapters on it, in one Lightning test loop.

Every model answers every suite: answers are decoded, reference answers and choices are scored teacher-forced. Adapters
are swapped by hooks, so one load of the base serves all. What a batch gave is kept at once (:mod:`src.models.partial`),
graded and written at the end (:mod:`src.models.results`).
"""

import logging
from pathlib import Path
from typing import Any

import torch

from src.adapters.attach import check_fits
from src.adapters.peft_files import Adapter, read_adapter
from src.data.schedule import SuiteBatch
from src.data.suite import Suite
from src.data.suite_tokens import SuiteTokens
from src.data.suites import EvaluationData
from src.errors import InputError
from src.models.adapter_swap import Swap
from src.models.adapter_warnings import warn_of_templates
from src.models.answer_files import answer_file
from src.models.base import BaseSpec, check_trained_on, fingerprint, load_model, weights_digest
from src.models.computation import Computation, choose_modes
from src.models.discovery import find_baseline, named_adapters
from src.models.evaluation_checks import check_programs, check_sampling, check_unseen
from src.models.generation import NotFinite, own_ends
from src.models.judging import awaited_judges, check_judges, share_judges
from src.models.kept_buffers import KeptBuffers
from src.models.partial import FOLDER, Parts, Record, answers_key, result_key
from src.models.progress import Progress
from src.models.results import Results
from src.models.sharding import shard
from src.models.speed import MatmulMode, check_matmul_error
from src.models.stopping import stop_together
from src.models.whole_data import check_whole
from src.provenance import versions

log = logging.getLogger(__name__)

BASE = "base"
NUMERICAL = ("torch", "transformers")
"""Packages whose version may change a computed number."""


class EvaluationModule(KeptBuffers):
    """Evaluates the base model and adapters on all suites.

    Args:
        base: The base model.
        adapters: Adapters to evaluate, or folders of adapters (a sweep); all must exist.
        discover: A folder; where no adapter is named, those below it are evaluated, and none is not an error.
        include_base: Evaluate the base without any adapter as well.
        allow_seen: Evaluate even on prompts that an adapter was trained or calibrated on.
        allow_code_execution: Run the programs of code suites even where this machine cannot isolate them.
        baseline: Name of the model that differences are taken to; unset is the first.
        all_pairs: Take the differences of all pairs of models, and not to the baseline alone.
        matmul: How float32 matrices are multiplied on this processor; ``auto`` measures, and on a GPU takes TF32 where
            the error below admits 1e-3, except to generate.
        max_matmul_error: Largest relative error of a product that ``auto`` accepts. Choices do not hang on it: what
            is close is computed again exactly.
    """

    def __init__(
        self,
        base: BaseSpec,
        adapters: list[str] | str | None = None,
        discover: str | None = None,
        include_base: bool = True,
        allow_seen: bool = False,
        allow_code_execution: bool = False,
        baseline: str | None = None,
        all_pairs: bool = False,
        matmul: MatmulMode = "auto",
        max_matmul_error: float = 1e-5,
    ) -> None:
        super().__init__()
        check_matmul_error(max_matmul_error)
        self.base, self.allow_seen, self.allow_code_execution = base, allow_seen, allow_code_execution
        self.matmul, self.max_matmul_error = matmul, max_matmul_error
        named = [adapters] if isinstance(adapters, str) else adapters or []
        self.models: dict[str, Adapter | None] = {BASE: None} if include_base else {}
        taken = {answer_file(Path(), BASE, ""): BASE}
        for name, path in named_adapters(named, discover).items():
            other = taken.setdefault(answer_file(Path(), name, ""), name)
            if other == BASE or other != name:
                who = "the base model" if other == BASE else "another adapter"
                raise InputError(f"model.adapters: {path} would be called {other}, as {who} is; rename its folder")
            self.models[name] = read_adapter(path)
        check_trained_on(self._adapters, base)
        if not self.models:
            raise InputError("nothing to evaluate: no adapter is named or found, and include_base is false")
        self.baseline, self.all_pairs = find_baseline(baseline, list(self.models)), all_pairs
        log.info("evaluating %d models: %s", len(self.models), ", ".join(self.models))
        self.output = Path()
        self.settings: dict[str, Any] = {}
        self.model: Any = None
        self.base_fingerprint = self.base_digest = ""
        self._scores = True
        self._computation: Computation
        self._progress: Progress
        self._parts: Parts
        self._problems: list[str] = []
        self._keys: dict[tuple[int, int], str] = {}
        self._records: dict[tuple[int, int], dict[int, Record]] = {}
        self._swap: Swap

    @property
    def _data(self) -> EvaluationData:
        return self.trainer.datamodule  # type: ignore[attr-defined, no-any-return]

    @property
    def _adapters(self) -> list[Adapter]:
        return [adapter for adapter in self.models.values() if adapter is not None]

    def setup(self, stage: str) -> None:
        """Refuse what cannot be evaluated, before anything is loaded."""
        self._scores = stage == "test"
        option = "limit_test_batches" if self._scores else "limit_predict_batches"
        check_whole(getattr(self.trainer, option), option, "evaluation")
        if self.sharded:
            check_sampling(self._data.suites)
        templates = list(map(self._data.template_of, self._data.suites))
        warn_of_templates(self._adapters, templates, self._data.encoder.tokenizer)
        if self._scores:
            check_programs(self._data.suites, allow=self.allow_code_execution)
            share_judges(self._data.suites)
        if not self.allow_seen:
            check_unseen(self.models, self._data.rows, self.base.name)

    def configure_model(self) -> None:
        """Load the base, check every adapter against it, shard where the strategy asks for it, lay out the work."""
        if self.model is not None:
            return
        self.model = load_model(self.base)
        modes = choose_modes(
            self.matmul,
            self.model,
            self.max_matmul_error,
            choices=any(suite.kind == "choice" for suite in self._data.suites),
            device=self.trainer.strategy.root_device.type,
        )
        self.base_fingerprint, self.base_digest = fingerprint(self.model), weights_digest(self.model)
        check_trained_on(self._adapters, self.base, self.base_fingerprint)
        for adapter in self._adapters:
            check_fits(self.model, adapter.pairs, adapter.name)
        if self.sharded:
            shard(self.model, self.device_mesh)
        self._computation = Computation(self.model, modes, self.sharded, self._data.max_tokens)
        self._swap = Swap(self.model, list(self.models.values()))
        self._plan()

    def _plan(self) -> None:
        """Tokenise for this model, and leave out what an earlier run has finished."""
        data = self._data
        data.encode_suites(getattr(self.model.config, "max_position_embeddings", None), own_ends(self.model))
        self._parts = Parts(self.output / FOLDER, self.global_rank)
        # One process decides what is left: all must lay out the same steps.
        known = self._known()
        self._records = self.trainer.strategy.broadcast(known)
        if self._scores:
            judges = awaited_judges(data, self._records, len(self.models), self.output / FOLDER)
            check_judges(judges, first=self.global_rank == 0)
        done = {place: set(records) for place, records in self._records.items()}
        data.plan(len(self.models), done, sharded=self.sharded)
        if found := sum(map(len, done.values())):
            log.info("%d results of an earlier run are taken up again", found)
        self._progress = Progress(sum(len(step.rows) for step in data.steps if step.weight))

    def _known(self) -> dict[tuple[int, int], dict[int, Record]]:
        """Settle the keys of all results; in the first process, what is kept under them.

        Predict takes what test has answered.
        """
        data, found = self._data, {}
        package, form = versions(), [self.base.dtype, self.base.quantization, self.base.attention]
        form.append(self.trainer.strategy.root_device.type)
        for model, adapter in enumerate(self.models.values()):
            for number, suite in enumerate(data.suites):
                key = result_key(
                    base=self.base_digest,
                    number_format=[*form, self.matmul, self.max_matmul_error, str(self.trainer.precision)]
                    + (["settled"] if suite.kind == "choice" else []),
                    adapter=adapter and adapter.identity,
                    content=data.content(suite),
                    versions=[package[name] for name in NUMERICAL],
                )
                own = key if self._scores or not data.measures(suite) else answers_key(key)
                self._keys[model, number] = own
                if self.global_rank == 0:
                    found[model, number] = self._parts.read(key) if own == key else self._parts.read_answers(own, key)
        return found

    def test_step(self, batch: SuiteBatch, batch_idx: int) -> None:
        """Answer and score a batch, and keep what it gave; no collective operation happens here."""
        self._step(batch)

    def predict_step(self, batch: SuiteBatch, batch_idx: int) -> None:
        """Answer a batch, without counting anything."""
        self._step(batch)

    def _step(self, batch: SuiteBatch) -> None:
        if not batch.weight and not self._computation.sharded:
            return
        self._swap.to(batch.model)
        before = len(self._problems)
        records = self._computed(batch, self._data.suites[batch.suite], score=self._scores)
        if not batch.weight or len(self._problems) > before:
            return
        records = [{"index": i} | record for i, record in zip(batch.index.tolist(), records, strict=True)]
        place = batch.model, batch.suite
        self._parts.add(self._keys[place], records)
        self._records.setdefault(place, {}).update({record["index"]: record for record in records})
        self._progress.advance(len(records), f"{list(self.models)[batch.model]}, {self._data.suites[batch.suite].name}")

    def _computed(self, batch: SuiteBatch, suite: Suite, *, score: bool) -> list[Record]:
        tokens, compute = self._data.tokens[suite.name], self._computation
        if suite.kind == "choice":
            return compute.choices(tokens, batch)
        records: list[Record] = [{} for _ in batch.index]
        if suite.generates:
            records = self._answers(suite, tokens, batch)
        if score and self._data.scored(suite):
            records = [one | two for one, two in zip(records, compute.likelihoods(batch), strict=True)]
        if score and suite.generates and suite.collapse_nll is not None:
            self._swap.to(None)
            answers = [record["answer"] for record in records]
            for record, value in zip(records, compute.strangeness(tokens, batch, answers), strict=True):
                record["answer_nll"] = value
        return records

    def _answers(self, suite: Suite, tokens: SuiteTokens, batch: SuiteBatch) -> list[Record]:
        try:
            return self._computation.answers(suite, tokens, batch)
        except NotFinite as error:
            row = tokens.encoded[int(batch.index[error.place])].row.id
            problem = (
                f"suite {suite.name}: {list(self.models)[batch.model]} gives {row} logits that are not numbers; look "
                f"for NaN in its weights, or set base.dtype to a wider type than {self.base.dtype}; a run without it "
                "goes on from what others have answered"
            )
            if self.trainer.world_size == 1:
                raise InputError(problem) from None
            self._problems.append(problem)
            return [{"answer": ""} for _ in batch.index]

    def on_test_epoch_end(self) -> None:
        """Bring the processes together: metrics to ``metrics.json``, answers to ``answers/MODEL/SUITE.jsonl``."""
        results = self._finished()
        results.grade(device=str(self.device), allow_code_execution=self.allow_code_execution)
        base = {"name": self.base.name, "fingerprint": self.base_fingerprint}
        results.write_metrics(base, self.models, self.settings, baseline=self.baseline, all_pairs=self.all_pairs)
        results.write_answers()
        self.trainer.strategy.barrier("evaluation")

    def on_predict_epoch_end(self) -> None:
        """Write the answers."""
        self._finished().write_answers()
        self.trainer.strategy.barrier("answers")

    def _finished(self) -> Results:
        stop_together(self._problems)
        self._swap.to(None)
        torch.set_float32_matmul_precision("highest")
        return Results(self._data, list(self.models), self._records, self.output, self.trainer)
