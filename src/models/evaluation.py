"""The module that evaluates a base model and any number of adapters on it, in one Lightning test loop.

Every model answers every suite: answers are decoded greedily, reference answers are scored teacher-forced. Adapters
are swapped by hooks, so one load of the base serves all.
"""

import json
import logging
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed import all_gather_object, is_initialized
from torchmetrics import Metric

from src.adapters.attach import attached, check_fits
from src.adapters.checks import check_base
from src.adapters.peft_files import CONFIG, Adapter, read_adapter
from src.data.batches import Batch
from src.data.chat import Encoded
from src.data.modules import EvaluationData, Suite
from src.errors import InputError
from src.files import write_atomically, write_json
from src.metrics.collapse import is_collapsed
from src.metrics.counters import AnswerPerplexity, CollapseRate, ExactMatch, RefusalRate
from src.metrics.exact import is_exact
from src.metrics.refusal import is_refusal
from src.models.base import BaseSpec, fingerprint, load_model
from src.models.generation import greedy
from src.models.logits import SCORED_TOGETHER, answer_nll, can_pack
from src.models.sharding import shard
from src.models.speed import MatmulMode, choose_matmul
from src.provenance import versions

log = logging.getLogger(__name__)

BASE = "base"


def find_adapters(folder: Path) -> list[Path]:
    """Every adapter directory below a folder, sorted by path; hidden directories are left out."""
    found = [path.parent for path in folder.rglob(CONFIG)]
    return sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts))


class EvaluationModule(LightningModule):
    """Evaluates the base model and adapters on all suites.

    Args:
        base: The base model.
        adapters: Adapters to evaluate, or folders of adapters (a sweep); all must exist.
        discover: A folder; whatever adapters lie below it are evaluated too, and none is not an error.
        include_base: Evaluate the base without any adapter as well.
        allow_seen: Evaluate even on prompts that an adapter was trained or calibrated on.
        matmul: How float32 matrices are multiplied on this processor; ``auto`` measures.
        max_matmul_error: Largest relative error of a product that ``auto`` accepts.
    """

    def __init__(
        self,
        base: BaseSpec,
        adapters: list[str] | str | None = None,
        discover: str | None = None,
        include_base: bool = True,
        allow_seen: bool = False,
        matmul: MatmulMode = "auto",
        max_matmul_error: float = 1e-5,
    ) -> None:
        super().__init__()
        self.base, self.allow_seen = base, allow_seen
        self.matmul, self.max_matmul_error = matmul, max_matmul_error
        named = [adapters] if isinstance(adapters, str) else adapters or []
        self.models: dict[str, Adapter | None] = {BASE: None} if include_base else {}
        for name, path in _expand(named, discover).items():
            self.models[name] = read_adapter(path)
        if not self.models:
            raise InputError("nothing to evaluate: no adapter is named or found, and include_base is false")
        log.info("evaluating %d models: %s", len(self.models), ", ".join(self.models))
        self.output = Path()
        self.settings: dict[str, Any] = {}
        self.model: Any = None
        self.base_fingerprint = ""
        self._modes: dict[str, str] = {}
        self._can_pack: bool | None = None
        self.counters = torch.nn.ModuleDict()
        self._at: AbstractContextManager[None] | None = None
        self._records: dict[tuple[str, str], list[dict[str, Any]]] = {}

    @property
    def _data(self) -> EvaluationData:
        return self.trainer.datamodule  # type: ignore[attr-defined, no-any-return]

    def configure_model(self) -> None:
        """Load the base, check every adapter against it, shard where the strategy asks for it."""
        if self.model is not None:
            return
        self.model = load_model(self.base)
        # A mode that rounds to bfloat16 converts every weight anew at every decoding step: three times slower in a real
        # loop, although the products alone look faster.
        accepted = {"score": self.max_matmul_error, "decode": min(self.max_matmul_error, 1e-5)}
        for (use, error), rows in zip(accepted.items(), (512, 64), strict=True):
            self._modes[use] = choose_matmul(self.matmul, self.model, max_error=error, rows=rows)
        self.base_fingerprint = fingerprint(self.model)
        for adapter in self.models.values():
            if adapter is not None:
                check_base(adapter, self.base.name, self.base_fingerprint, what="base.name")
                check_fits(self.model, adapter.pairs, adapter.name)
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            shard(self.model, self.device_mesh)

    def setup(self, stage: str) -> None:
        """One set of counters per model and suite; refuse rows that an adapter has seen."""
        self._check_unseen()
        for index in range(len(self.models)):
            for number, suite in enumerate(self._data.suites):
                self.counters[f"{index}_{number}"] = torch.nn.ModuleDict(_counters(suite))

    def _check_unseen(self) -> None:
        for name, adapter in self.models.items():
            for suite, rows in self._data.rows.items():
                both = [row for row in rows if adapter is not None and row.prompt_hash in adapter.seen]
                if both and not self.allow_seen:
                    raise InputError(
                        f"suite {suite}: {len(both)} prompts, the first {both[0].id}, were used to train or calibrate "
                        f"{name}; evaluate on other rows (or pass --model.allow_seen true)"
                    )

    def _place(self, dataloader_idx: int) -> tuple[str, Suite, dict[str, Metric], Adapter | None]:
        model, number = divmod(dataloader_idx, len(self._data.suites))
        name = list(self.models)[model]
        counters: Any = self.counters[f"{model}_{number}"]
        return name, self._data.suites[number], counters, self.models[name]

    def _start(self, batch_idx: int, dataloader_idx: int) -> None:
        if batch_idx == 0:
            self._leave()
            adapter = self._place(dataloader_idx)[3]
            self._at = attached(self.model, adapter.pairs if adapter else {})
            self._at.__enter__()

    def _leave(self) -> None:
        if self._at is not None:
            self._at.__exit__(None, None, None)
            self._at = None

    def on_test_batch_start(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Swap adapters where a new model's turn begins."""
        self._start(batch_idx, dataloader_idx)

    def on_predict_batch_start(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Swap adapters where a new model's turn begins."""
        self._start(batch_idx, dataloader_idx)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Answer and score a batch; no collective operation happens here."""
        name, suite, counters, _ = self._place(dataloader_idx)
        if not batch.weight and not self._sharded:
            return
        records: list[dict[str, Any]] = [{"index": i} for i in batch.index.tolist()]
        if suite.generate:
            answers = self._answers(batch, suite)
            if batch.weight:
                self._count(suite, counters, self._rows(suite, batch), answers, records)
        if self._scored(suite):
            self._score(batch, counters, records)
        if batch.weight:
            self._records.setdefault((name, suite.name), []).extend(records)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Answer a batch, without counting anything."""
        name, suite, _, _ = self._place(dataloader_idx)
        if not batch.weight and not self._sharded:
            return
        answers = self._answers(batch, suite)
        if not batch.weight:
            return
        records = [{"index": i, "answer": answer} for i, answer in zip(batch.index.tolist(), answers, strict=True)]
        self._records.setdefault((name, suite.name), []).extend(records)

    @property
    def _sharded(self) -> bool:
        """Whether other processes hold parts of the weights."""
        return isinstance(self.trainer.strategy, ModelParallelStrategy)

    def _scored(self, suite: Suite) -> bool:
        """Whether the suite's reference answers are scored: every row must have one."""
        return suite.score and all(row.response for row in self._data.rows[suite.name])

    def _rows(self, suite: Suite, batch: Batch) -> list[Encoded]:
        return [self._data.encoded[suite.name][i] for i in batch.index.tolist()]

    def _answers(self, batch: Batch, suite: Suite) -> list[str]:
        encoder = self._data.encoder
        torch.set_float32_matmul_precision(self._modes["decode"])
        tokens = greedy(
            self.model,
            batch,
            max_new_tokens=suite.max_new_tokens,
            stop_ids=encoder.stop_ids,
            pad_id=encoder.tokenizer.pad_token_id,
            sharded=self._sharded,
        )
        return [encoder.decode(answer) for answer in tokens]

    def _count(
        self,
        suite: Suite,
        counters: dict[str, Metric],
        rows: list[Encoded],
        answers: list[str],
        records: list[dict[str, Any]],
    ) -> None:
        references = [row.row.response for row in rows]
        for counter in counters.values():
            if isinstance(counter, ExactMatch):
                counter.update(answers, references)
            elif isinstance(counter, RefusalRate | CollapseRate):
                counter.update(answers)
        for record, answer, reference in zip(records, answers, references, strict=True):
            record |= {"answer": answer, "refused": is_refusal(answer), "collapsed": is_collapsed(answer)}
            if suite.kind == "utility":
                record["exact"] = is_exact(answer, reference, suite.answer)

    def _score(self, batch: Batch, counters: dict[str, Metric], records: list[dict[str, Any]]) -> None:
        torch.set_float32_matmul_precision(self._modes["score"])
        # Under sharding every process makes the same number of passes, whatever the sizes of its batches.
        together = len(batch.index) if self._sharded else SCORED_TOGETHER
        nll, tokens = answer_nll(self.model, batch, pack=self._packs(batch), together=together)
        if not batch.weight:
            return
        counters["perplexity"].update(nll, tokens)
        for record, value, count in zip(records, nll.tolist(), tokens.tolist(), strict=True):
            record |= {"nll": value, "tokens": count}

    def _packs(self, batch: Batch) -> bool:
        """Whether to pack; tried out once per run."""
        if self._sharded:
            return False
        if self._can_pack is None:
            first = next(batch.split(SCORED_TOGETHER))
            if first.common_prefix:
                self._can_pack = can_pack(self.model, first)
        return bool(self._can_pack)

    def on_test_epoch_end(self) -> None:
        """Bring the processes together: metrics to ``metrics.json``, answers to ``answers/MODEL/SUITE.jsonl``."""
        self._leave()
        results = [self._result(index, name, adapter) for index, (name, adapter) in enumerate(self.models.items())]
        self._write_records()
        if self.trainer.is_global_zero:
            record = {
                "base": {"name": self.base.name, "fingerprint": self.base_fingerprint},
                "models": results,
                "versions": versions(),
                "settings": self.settings,
            }
            write_json(self.output / "metrics.json", record)
        self.trainer.strategy.barrier("evaluation")

    def on_predict_epoch_end(self) -> None:
        """Write the answers."""
        self._leave()
        self._write_records()
        self.trainer.strategy.barrier("answers")

    def _result(self, index: int, name: str, adapter: Adapter | None) -> dict[str, Any]:
        suites = {}
        for number, suite in enumerate(self._data.suites):
            counters: Any = self.counters[f"{index}_{number}"]
            scored = self._scored(suite)
            suites[suite.name] = {"kind": suite.kind} | {
                key: counter.summary() for key, counter in counters.items() if key != "perplexity" or scored
            }
        return {
            "name": name,
            "adapter": adapter and {"path": adapter.name, "sha256": adapter.sha256},
            "manifest": {} if adapter is None else {k: adapter.manifest.get(k) for k in ("kind", "method", "alpha")},
            "suites": suites,
        }

    def _write_records(self) -> None:
        gathered: list[Any] = [self._records]
        if is_initialized():
            gathered = [None] * self.trainer.world_size
            all_gather_object(gathered, self._records)
        if not self.trainer.is_global_zero:
            return
        for name in self.models:
            for suite in self._data.suites:
                found = [record for part in gathered for record in part.get((name, suite.name), [])]
                self._write_suite(name, suite, sorted(found, key=lambda record: record["index"]))

    def _write_suite(self, name: str, suite: Suite, records: list[dict[str, Any]]) -> None:
        rows = self._data.rows[suite.name]
        if [record["index"] for record in records] != list(range(len(rows))):
            raise RuntimeError(
                f"{name}, {suite.name}: {len(records)} results for {len(rows)} rows; each must occur once"
            )
        lines = []
        for row, record in zip(rows, records, strict=True):
            known = {"id": row.id, "prompt_hash": row.prompt_hash, "category": row.category, "prompt": row.prompt}
            rest = {key: value for key, value in record.items() if key != "index"}
            lines.append(json.dumps(known | {"reference": row.response} | rest, ensure_ascii=False) + "\n")
        path = self.output / "answers" / name / f"{suite.name}.jsonl"
        write_atomically(path, lambda temporary: temporary.write_text("".join(lines), "utf-8"))


def _counters(suite: Suite) -> dict[str, Metric]:
    counters: dict[str, Metric] = {}
    if suite.generate:
        counters |= {"refusal": RefusalRate(), "collapse": CollapseRate()}
        if suite.kind == "utility":
            counters["exact_match"] = ExactMatch(suite.answer)
    return counters | {"perplexity": AnswerPerplexity()}


def _expand(named: list[str], discover: str | None) -> dict[str, str]:
    """Name in tables to path, folders of adapters expanded."""
    found: dict[str, str] = {}
    for name in named:
        folder = Path(name)
        inner = find_adapters(folder) if folder.is_dir() and not (folder / CONFIG).exists() else []
        if inner:
            found |= {str(folder.name / path.relative_to(folder)): str(path) for path in inner}
        else:
            found[name.rstrip("/")] = name
    if discover is not None:
        root = Path(discover)
        paths = find_adapters(root) if root.is_dir() else []
        log.info("%d adapters found below %s", len(paths), discover)
        found |= {str(path.relative_to(root)): str(path) for path in paths}
    return found
