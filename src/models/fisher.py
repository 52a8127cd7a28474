"""The module that measures Fisher matrices: ``Trainer.predict`` over calibration rows, scores from activations.

F_s is taken where the refusals happen, at θ0 + ΔW_u + ΔW_s; F_u at θ0 + ΔW_u. Both in one set of coordinates.
"""

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy

from src.adapters.attach import attached, check_fits
from src.adapters.basis import CoreBasis, core_basis
from src.adapters.checks import check_compatible, check_no_embeddings
from src.adapters.pairs import Pairs
from src.adapters.peft_files import Adapter
from src.adapters.read_together import in_common_terms, read_adapters
from src.data.batches import Batch
from src.data.calibration import CalibrationData
from src.errors import InputError
from src.fisher.base import Representation
from src.fisher.labels import LabelSource
from src.fisher.scores import Granularity, ScoreRecorder, together
from src.models.adapter_warnings import warn_of_learnt, warn_of_templates
from src.models.base import BaseSpec, check_trained_on, fingerprint, load_model, weights_digest
from src.models.checkpointing import checkpoint_layers
from src.models.estimate import Estimate, Hardware, Kept, estimate
from src.models.fisher_jobs import backward_jobs, in_step
from src.models.fisher_open import open_pass
from src.models.fisher_output import publish, ready_file, remove_joined, remove_stale
from src.models.fisher_pass import Coordinates, FisherPass
from src.models.fisher_record import write_pass
from src.models.fisher_settings import check_settings, check_utility
from src.models.kept_buffers import KeptBuffers
from src.models.logits import answer_logits, answer_places, leaf_embeddings
from src.models.patch_at import patch_at
from src.models.progress import Progress
from src.models.reference import Reference, named_by, reference_update
from src.models.sharding import shard
from src.models.speed import MatmulMode, check_matmul_error, choose_matmul
from src.models.stopping import stop_together
from src.models.whole_data import check_whole

log = logging.getLogger(__name__)


class FisherModule(KeptBuffers):
    """Fisher information on safety and on benign calibration rows, from exact scores of every example.

    Args:
        base: The base model.
        utility: Utility adapter, or a list of them (directories or hub ids).
        safety: Safety adapter; it spans the core space.
        utility_weights: Weight of each utility adapter; unset means 1 for each.
        representation: ``lowrank`` keeps every score (the exact matrix); ``block`` is exact within a module;
            ``kronecker`` (K-FAC) and ``diagonal`` are approximations; ``magnitude`` is the mean of |g| per weight, for
            ``merge --method Led``.
        coordinates: ``core``: the entries of C in U C Vᵀ; ``weight``: every entry of the adapted layers' weights
            (``kronecker``, ``diagonal`` and ``magnitude`` only).
        basis: ``safety``: the core space of the safety adapter; ``union``: of all adapters.
        labels: ``model`` draws answer tokens from the model (Fisher information), ``data`` takes the rows' own
            (empirical Fisher), ``random_tokens`` measures on rows of random tokens.
        labels_utility: The same for F_u alone; unset means as for F_s.
        draws: Draws of labels per row; more cost one backward pass each.
        granularity: ``sequence`` takes one score per row, ``token`` one per answer token (as many backward passes as
            the longest answer has tokens; under sharding, the longest of all processes' batches).
        seed: Seed of the draws.
        reference_safety: Where F_s is taken: ``base`` (θ0), ``utility`` (θ0 + ΔW_u), ``patched`` (θ0 + ΔW_u + ΔW_s), or
            a weight for each of ``utility``, ``safety`` and any other adapter.
        reference_utility: Where F_u is taken.
        relearn: Measure as well what re-learned coefficients need: F_u at the patched point, and mean signed scores of
            refusals and of benign answers there (one more pass).
        halves: Keep two halves of the rows apart, for diagnostics on held-out rows; twice the size of the sums.
            ``lowrank`` can always be split, but not its mean scores (``relearn``).
        shard_rows: Rows after which a process writes what it has: a killed pass goes on from there.
        gradient_checkpointing: Compute each layer's activations again in the backward pass: less memory, more time.
        matmul: How float32 matrices are multiplied on this processor; ``auto`` measures on a CPU.
        max_matmul_error: Largest relative error of a product that ``auto`` accepts; on a GPU that is TF32 from 1e-3 on.
    """

    def __init__(
        self,
        base: BaseSpec,
        utility: list[str] | str,
        safety: str,
        utility_weights: list[float] | None = None,
        representation: Representation = "lowrank",
        coordinates: Coordinates = "core",
        basis: Literal["safety", "union"] = "safety",
        labels: LabelSource = "model",
        labels_utility: LabelSource | None = None,
        draws: int = 1,
        granularity: Granularity = "sequence",
        seed: int = 0,
        reference_safety: Reference = "patched",
        reference_utility: Reference = "utility",
        relearn: bool = False,
        halves: bool = True,
        shard_rows: int = 256,
        gradient_checkpointing: bool = False,
        matmul: MatmulMode = "auto",
        max_matmul_error: float = 1e-5,
    ) -> None:
        super().__init__()
        self.labels: dict[str, LabelSource] = {"safety": labels, "utility": labels_utility or labels}
        self.labels["benign"] = self.labels["utility"]
        check_matmul_error(max_matmul_error)
        check_settings(
            self.labels.values(), draws, representation, coordinates, granularity, shard_rows, relearn=relearn
        )
        names = [utility] if isinstance(utility, str) else utility
        self.weights = check_utility(names, utility_weights)
        self.base, self.draws, self.granularity, self.seed = base, draws, granularity, seed
        self.representation, self.coordinates = representation, coordinates
        self.relearn, self.halves, self.shard_rows = relearn, halves, shard_rows
        self.references: dict[str, Reference] = {"safety": reference_safety, "utility": reference_utility}
        self.matmul, self.max_matmul_error = matmul, max_matmul_error
        self.gradient_checkpointing = gradient_checkpointing
        *self.utility, self.safety = read_adapters([*names, safety])
        if coordinates == "weight" and self.safety.layout.constant:
            raise InputError("model.coordinates weight: a LoRA bias (lora_bias) is no entry of a weight; expected core")
        self.adapters = [*self.utility, self.safety, *named_by(self.references.values())]
        check_trained_on(self.adapters, base)
        check_compatible(in_common_terms(self.adapters), [base.name, *base.aliases], "--model.base.aliases")
        self.core = self._core_basis([self.safety] if basis == "safety" else [*self.utility, self.safety])
        self.start: torch.Tensor | None = None
        self.passes = {"safety": "safety", "utility": "utility"}
        if relearn:
            self.passes["benign"], self.references["benign"] = "utility", reference_safety
            self.start = patch_at(reference_safety, self.utility, self.weights, self.safety, self.core)
        self.output = Path()
        self.settings, self.shared_settings = dict[str, Any](), dict[str, Any]()
        self.model: Any = None
        self.base_fingerprint = self.base_digest = self.matmul_chosen = ""
        self._recorder: ScoreRecorder
        self._at = ExitStack()
        self._running: dict[str, FisherPass] = {}
        self._progress: Progress

    def _core_basis(self, spanning: Sequence[Adapter]) -> CoreBasis:
        check_no_embeddings(spanning)
        try:
            return core_basis([adapter.pairs for adapter in spanning])
        except ValueError as error:
            raise InputError(f"{', '.join(adapter.name for adapter in spanning)}: {error}") from None

    @property
    def random_passes(self) -> list[str]:
        """Passes over random tokens."""
        return [name for name in self.passes if self.labels[name] == "random_tokens"]

    def estimate(self, data: CalibrationData, trainer: Trainer) -> Estimate:
        """Sizes of the passes, without loading a weight."""
        return estimate(
            self.base,
            self.core.shapes,
            data,
            Kept(
                representation=self.representation,
                draws=self.draws,
                halves=self.halves,
                shard_rows=self.shard_rows,
                weight_coordinates=self.coordinates == "weight",
                granularity=self.granularity,
                undrawn=[name for name in self.passes if self.labels[name] != "model"],
                means=[name for name in self.passes if name != "utility"] if self.relearn else (),
                started=self.start is not None,
            ),
            Hardware(
                processes=trainer.world_size,
                shards=trainer.world_size if isinstance(trainer.strategy, ModelParallelStrategy) else 1,
                precision=str(trainer.precision),
                checkpointing=self.gradient_checkpointing,
            ),
        )

    def setup(self, stage: str) -> None:
        """Refuse a part of the batches: it is no Fisher matrix of the rows."""
        check_whole(self.trainer.limit_predict_batches, "limit_predict_batches", "Fisher matrix of the rows")
        warn_of_templates(self.adapters, [self.data.template], self.data.encoder.tokenizer)
        warn_of_learnt([*self.utility, self.safety], self.data.measured)

    def configure_model(self) -> None:
        """Load the base, check the adapters against it, shard where the strategy asks for it."""
        if self.model is not None:
            return
        self.model = load_model(self.base)
        device = self.trainer.strategy.root_device.type
        chosen = choose_matmul(self.matmul, self.model, max_error=self.max_matmul_error, device=device)
        # What the first process finds fastest, on all of them: a pass has one arithmetic.
        self.matmul_chosen = self.trainer.strategy.broadcast(chosen)
        torch.set_float32_matmul_precision(self.matmul_chosen)
        self.base_fingerprint, self.base_digest = fingerprint(self.model), weights_digest(self.model)
        check_trained_on(self.adapters, self.base, self.base_fingerprint)
        for adapter in self.adapters:
            check_fits(self.model, adapter.pairs, adapter.name)
        if self.sharded:
            shard(self.model, self.device_mesh)
        bases = (self.core.u, self.core.v) if self.coordinates == "core" else (dict.fromkeys(self.core.modules),) * 2
        self._recorder = ScoreRecorder(self.model, *bases)

    @property
    def data(self) -> CalibrationData:
        """The calibration rows."""
        return self.trainer.datamodule  # type: ignore[attr-defined, no-any-return]

    def _reference(self, name: str) -> Pairs:
        pairs = reference_update(self.references[name], self.utility, self.weights, self.safety)
        check_fits(self.model, pairs, f"the reference point of F_{name}")
        return pairs

    def on_predict_start(self) -> None:
        """Find what an earlier, killed pass has left, before any process writes."""
        if self.gradient_checkpointing:
            checkpoint_layers(self.model)
        self._running = {name: open_pass(self, name) for name in self.passes}
        loaders: Any = self.trainer.predict_dataloaders
        self._progress = Progress(sum(len(rows) for loader in loaders for rows, weight in loader.sampler if weight))
        if self.trainer.is_global_zero:
            remove_stale(self.output)
        self.trainer.strategy.barrier("fisher shards")

    def on_predict_batch_start(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Move to the pass's reference point at its first batch."""
        if batch_idx == 0:
            self._leave()
            self._at.enter_context(attached(self.model, self._reference(list(self.passes)[dataloader_idx])))

    def _leave(self) -> None:
        """Leave the reference point, and write what the pass there has found since its last shard."""
        for running in self._running.values():
            running.flush()
        self._at.close()

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Take up the scores of a batch, unless they are on the disk already."""
        running = self._running[list(self.passes)[dataloader_idx]]
        rows = len(batch.index) if batch.weight else 0
        if running.skips(batch_idx):
            self._progress.skip(rows)
            return
        if batch.weight or self.sharded:
            with torch.enable_grad():
                self._measure(running, batch)
        answered = int((batch.lengths > batch.answer_starts).sum())
        running.end_step(batch_idx, answered if batch.weight else 0)
        if self.trainer.world_size == 1:
            stop_together([running.problem])
        self._progress.advance(rows, f"F_{running.name}")

    def _measure(self, running: FisherPass, batch: Batch) -> None:
        ids = [self.data.rows[running.name][i].id for i in batch.index.tolist()]
        with self._recorder.recording(answer_places(batch)), leaf_embeddings(self.model) as leaves:
            logits = answer_logits(self.model, batch)
            jobs = backward_jobs(
                running,
                batch,
                logits,
                ids,
                labels=self.labels[running.name],
                draws=self.draws,
                granularity=self.granularity,
                seed=self.seed,
            )
            if self.sharded:
                jobs = in_step(jobs, batch, logits, ids, self.trainer.strategy.root_device)
            for job in jobs:
                for accumulator in job.sinks:
                    accumulator.begin(job.examples)
                self._recorder.sink = together(*(accumulator.update for accumulator in job.sinks))
                torch.autograd.grad(job.total, leaves[0], retain_graph=job is not jobs[-1])
                self._recorder.complete()

    def on_predict_epoch_end(self) -> None:
        """Bring the processes together and write one file per pass; all appear at once, when all are whole."""
        self._leave()
        stop_together(running.problem for running in self._running.values())
        self.trainer.strategy.barrier("fisher parts")
        for name, running in self._running.items():
            fisher, mean = running.join(self.trainer.strategy.root_device)
            if self.trainer.is_global_zero and fisher is not None:
                write_pass(self, name, fisher, mean, ready_file(self.output, name))
                remove_joined(self.output, name)
        self.trainer.strategy.barrier("fisher files")
        if self.trainer.is_global_zero:
            publish(self.output, self.passes, self.shared_settings)
