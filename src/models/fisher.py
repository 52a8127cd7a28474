"""The module that measures both Fisher matrices: ``Trainer.predict`` over calibration rows, scores from activations.

F_s is taken where the refusals happen, at θ0 + ΔW_u + P; F_u at θ0 + ΔW_u. Both in one core space.
"""

import logging
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import load_file, save_file

from src.adapters.attach import attached, check_fits
from src.adapters.basis import CoreBasis, core_basis
from src.adapters.checks import check_base, check_compatible
from src.adapters.pairs import Pairs, weighted_sum
from src.adapters.peft_files import Adapter, read_adapter
from src.data.batches import Batch
from src.data.modules import CalibrationData
from src.errors import InputError
from src.files import write_atomically
from src.fisher.files import FisherFile
from src.fisher.labels import Labels, draw_labels
from src.fisher.lowrank import LowRankFisher
from src.fisher.scores import ScoreRecorder
from src.models.base import BaseSpec, fingerprint, load_model
from src.models.logits import answer_logits, answer_rows, answer_targets, leaf_embeddings
from src.models.sharding import shard
from src.models.speed import MatmulMode, choose_matmul
from src.provenance import versions

log = logging.getLogger(__name__)

Reference = Literal["base", "utility", "patched"]
PASSES = ("safety", "utility")


class FisherModule(LightningModule):
    """Per-example scores of the core coordinates on safety and on benign calibration rows.

    Args:
        base: The base model.
        utility: Utility adapter, or a list of them (directories or hub ids).
        safety: Safety adapter; it spans the core space.
        utility_weights: Weight of each utility adapter; unset means 1 for each.
        labels: ``model`` draws answer tokens from the model (Fisher information), ``data`` takes the rows' own
            (empirical Fisher).
        draws: Draws of labels per row; more cost one backward pass each.
        seed: Seed of the draws.
        reference_safety: Where F_s is taken: ``base`` (θ0), ``utility`` (θ0 + ΔW_u) or ``patched`` (θ0 + ΔW_u + ΔW_s).
        reference_utility: Where F_u is taken.
        basis: ``safety``: the core space of the safety adapter; ``union``: of all adapters.
        matmul: How float32 matrices are multiplied on this processor; ``auto`` measures.
        max_matmul_error: Largest relative error of a product that ``auto`` accepts.
    """

    def __init__(
        self,
        base: BaseSpec,
        utility: list[str] | str,
        safety: str,
        utility_weights: list[float] | None = None,
        labels: Labels = "model",
        draws: int = 1,
        seed: int = 0,
        reference_safety: Reference = "patched",
        reference_utility: Reference = "utility",
        basis: Literal["safety", "union"] = "safety",
        matmul: MatmulMode = "auto",
        max_matmul_error: float = 1e-5,
    ) -> None:
        super().__init__()
        if draws < 1 or (draws > 1 and labels == "data"):
            raise InputError(f"model.draws is {draws} with labels {labels!r}; expected 1, or more with labels model")
        self.base, self.labels, self.draws, self.seed = base, labels, draws, seed
        self.references: dict[str, Reference] = {"safety": reference_safety, "utility": reference_utility}
        self.matmul, self.max_matmul_error = matmul, max_matmul_error
        self.utility = [read_adapter(path) for path in ([utility] if isinstance(utility, str) else utility)]
        self.safety = read_adapter(safety)
        self.weights = utility_weights or [1.0] * len(self.utility)
        if len(self.weights) != len(self.utility):
            raise InputError(f"model.utility_weights: {len(self.weights)} weights for {len(self.utility)} adapters")
        check_compatible([*self.utility, self.safety])
        spanning = [self.safety] if basis == "safety" else [*self.utility, self.safety]
        self.core: CoreBasis = core_basis([adapter.pairs for adapter in spanning])
        self.output = Path()
        self.settings: dict[str, Any] = {}
        self.model: Any = None
        self.base_fingerprint = ""
        self._recorder: ScoreRecorder
        self._at: AbstractContextManager[None] | None = None
        self._found: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {name: [] for name in PASSES}

    def configure_model(self) -> None:
        """Load the base, check the adapters against it, shard where the strategy asks for it."""
        if self.model is not None:
            return
        self.model = load_model(self.base)
        choose_matmul(self.matmul, self.model, max_error=self.max_matmul_error)
        self.base_fingerprint = fingerprint(self.model)
        for adapter in (*self.utility, self.safety):
            check_base(adapter, self.base.name, self.base_fingerprint, what="base.name")
            check_fits(self.model, adapter.pairs, adapter.name)
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            shard(self.model, self.device_mesh)
        self._recorder = ScoreRecorder(self.model, self.core.u, self.core.v)

    def _reference(self, name: Reference) -> Pairs:
        adapters, weights = [a.pairs for a in self.utility], list(self.weights)
        if name == "base":
            return {}
        if name == "patched":
            adapters, weights = [*adapters, self.safety.pairs], [*weights, 1.0]
        return weighted_sum(adapters, weights)

    def on_predict_batch_start(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Move to the pass's reference point at its first batch."""
        if batch_idx == 0:
            self._leave_reference()
            reference = self.references[PASSES[dataloader_idx]]
            self._at = attached(self.model, self._reference(reference))
            self._at.__enter__()

    def _leave_reference(self) -> None:
        if self._at is not None:
            self._at.__exit__(None, None, None)
            self._at = None

    @property
    def _data(self) -> CalibrationData:
        return self.trainer.datamodule  # type: ignore[attr-defined, no-any-return]

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Record the scores of a batch."""
        name = PASSES[dataloader_idx]
        ids = [self._data.rows[name][i].id for i in batch.index.tolist()]
        with torch.enable_grad():
            scores = self.scores(batch, ids)
        if batch.weight:
            self._found[name].append((batch.index, scores.cpu()))

    def scores(self, batch: Batch, ids: list[str]) -> torch.Tensor:
        """(N, draws, D) scores of N rows, scaled by 1/√draws."""
        with self._recorder.recording(), leaf_embeddings(self.model) as leaves:
            logits = answer_logits(self.model, batch)
            log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
            drawn = []
            for draw in range(self.draws):
                if self.labels == "data":
                    labels = answer_targets(batch)
                else:
                    labels = draw_labels(logits, answer_rows(batch), ids, seed=self.seed, draw=draw)
                total = log_p.gather(1, labels[:, None]).sum()
                torch.autograd.grad(total, leaves[0], retain_graph=draw + 1 < self.draws)
                drawn.append(self._recorder.take())
        return torch.stack(drawn, dim=1) / self.draws**0.5

    def on_predict_epoch_end(self) -> None:
        """Bring the ranks' rows together in the order of the data and write one file per pass."""
        self._leave_reference()
        for name in PASSES:
            self._write_part(name)
        self.trainer.strategy.barrier("fisher parts")
        if self.trainer.is_global_zero:
            for name in PASSES:
                self._join_parts(name)
        self.trainer.strategy.barrier("fisher files")

    def _part(self, name: str, rank: int) -> Path:
        return self.output / f".{name}.part-{rank}.safetensors"

    def _write_part(self, name: str) -> None:
        found = self._found[name]
        dim = self.core.dim
        index = torch.cat([index.cpu() for index, _ in found]) if found else torch.zeros(0, dtype=torch.int64)
        scores = torch.cat([scores for _, scores in found]) if found else torch.zeros(0, self.draws, dim)
        tensors = {"index": index, "scores": scores}
        write_atomically(self._part(name, self.trainer.global_rank), lambda path: save_file(tensors, path))

    def _join_parts(self, name: str) -> None:
        paths = [self._part(name, rank) for rank in range(self.trainer.world_size)]
        parts = [load_file(path) for path in paths]
        kept = [part for part in parts if len(part["index"])]
        index = torch.cat([part["index"] for part in kept])
        scores = torch.cat([part["scores"] for part in kept])[index.argsort()]
        rows = self._data.rows[name]
        if index.sort().values.tolist() != list(range(len(rows))):
            raise RuntimeError(f"{name}: {len(index)} scores for {len(rows)} rows; each row must occur once")
        fisher = LowRankFisher(scores.flatten(0, 1), len(rows))
        record = self._record(name) | {"trace": fisher.trace()}
        FisherFile(fisher, self.core.u, self.core.v, record).save(self.output / f"{name}.safetensors")
        for path in paths:
            path.unlink()
        log.info("F_%s: %d rows, D = %d, trace %.4g", name[0], len(rows), fisher.dim, record["trace"])

    def _record(self, name: str) -> dict[str, Any]:
        """Provenance of one pass."""

        def entry(adapter: Adapter, weight: float) -> dict[str, Any]:
            return {"path": adapter.name, "sha256": adapter.sha256, "weight": weight}

        return {
            "pass": name,
            "labels": self.labels,
            "draws": self.draws,
            "seed": self.seed,
            "reference": self.references[name],
            "utility": [entry(a, w) for a, w in zip(self.utility, self.weights, strict=True)],
            "safety": entry(self.safety, 1.0),
            "base": {"name": self.base.name, "fingerprint": self.base_fingerprint},
            "basis_sha256": self.core.digest(),
            "rows": [row.id for row in self._data.rows[name]],
            "seen": sorted({row.prompt_hash for row in self._data.rows[name]}),
            "versions": versions(),
            "settings": self.settings,
        }
