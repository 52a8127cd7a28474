"""The module that trains a LoRA expert: loss on answer tokens only, logits computed only there.

loss = −(1/M) Σ log p_θ(y_t | x, y_<t)   over the M answer tokens of a batch
"""

import logging
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable

from src.adapters.attach import attach, check_fits
from src.adapters.base_weights import on_hub
from src.adapters.pairs import weighted_sum
from src.adapters.peft_files import Adapter, is_trained, read_adapter, write_trained
from src.data.batches import Batch
from src.errors import InputError
from src.models.base import BaseSpec, check_trained_on, fingerprint, load_model
from src.models.checkpointing import checkpoint_layers
from src.models.checkpoints import ADAPTER, bring_home, check_adapter, check_processes, keeps_schedule, rewind_to_step
from src.models.core_tuning import Core
from src.models.fused_lora import fuse
from src.models.kept_buffers import KeptBuffers
from src.models.logits import answer_logits, answer_loss, answer_targets, can_pack
from src.models.lora import LoraSpec, add_lora
from src.models.regularizers import Regularizer
from src.models.sharding import shard
from src.models.speed import TrainingMode, check_matmul_error, choose_matmul

log = logging.getLogger(__name__)


class ExpertModule(KeptBuffers):
    """Fine-tunes LoRA on a frozen base model.

    Args:
        base: The base model.
        lora: The adapter to train.
        optimizer: Optimiser of the adapter's weights.
        schedule: Learning rate after the warm-up.
        warmup: Share of all steps over which the learning rate rises from 0.
        pack: Compute the tokens that all rows of a batch begin with once (the chat template's system prompt); the same
            loss and gradients from fewer tokens. On a CPU alone, as a GPU's fused attention takes less memory; falls
            back by itself where a model cannot.
        regularizer: Term added to the loss in training, such as ``AlignGuard``; unset adds none.
        core: Adapter whose core is trained in place of a new adapter: C in U C Vᵀ, its bases and its start being
            those of this adapter; ``lora`` then says nothing.
        beside: Weight of each adapter that is there during training and stays as it is. It is no part of the result.
        seed: Seed of the adapter's initial weights; unset is ``seed_everything``.
        gradient_checkpointing: Compute activations again in the backward pass: less memory, more time, nothing packed.
        matmul: How float32 matrices are multiplied on this processor; ``auto`` takes ``bfloat16`` where the processor
            has instructions for it, and measures on other CPUs; on a GPU it takes TF32 where the error below admits
            1e-3. ``bfloat16`` multiplies by bfloat16 copies of the frozen weights, and within attention; residuals,
            norms, the adapter and the logits stay float32.
        max_matmul_error: Largest relative error of a product that ``auto`` accepts (bfloat16 rounding is 0.003).
    """

    def __init__(
        self,
        base: BaseSpec,
        lora: LoraSpec,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(
            parameters, lr=5e-4, weight_decay=0.0, fused=True
        ),
        schedule: Literal["cosine", "linear", "constant"] = "cosine",
        warmup: float = 0.05,
        pack: bool = True,
        regularizer: Regularizer | None = None,
        core: str | None = None,
        beside: dict[str, float] | None = None,
        seed: int | None = None,
        gradient_checkpointing: bool = False,
        matmul: TrainingMode = "auto",
        max_matmul_error: float = 5e-3,
    ) -> None:
        super().__init__()
        if not 0 <= warmup < 1:
            raise InputError(f"model.warmup is {warmup}; expected a share in [0, 1)")
        check_matmul_error(max_matmul_error)
        self.base, self.lora, self.optimizer_of = base, lora, optimizer
        self.schedule, self.warmup, self.seed = schedule, warmup, seed or 0
        # Layers that are computed again in the backward pass meet the packed attention no more.
        self.pack = pack and not gradient_checkpointing
        self.regularizer, self.gradient_checkpointing = regularizer, gradient_checkpointing
        self.core = None if core is None else Core(read_adapter(core))
        for name, weight in (beside or {}).items():
            if not isfinite(weight):
                raise InputError(f"model.beside: the weight of {name} is {weight}; expected a finite number")
        self.beside = [(read_adapter(name), weight) for name, weight in (beside or {}).items()]
        check_trained_on(self.others, base)
        if self.core is not None and regularizer is not None:
            raise InputError("model.core and model.regularizer: one at a time; the regulariser takes a new adapter")
        self._can_pack: bool | None = None
        self._narrow = self.strict_loading = False
        self.validated: dict[int, float] = {}  # loss after so many optimiser steps
        self.matmul, self.max_matmul_error = matmul, max_matmul_error
        self.model: Any = None
        self.base_fingerprint = ""

    def configure_model(self) -> None:
        """Load the base, add LoRA, shard where the strategy asks for it."""
        if self.model is not None:
            return
        model = load_model(self.base)
        if self.sharded and (self.core is not None or self.beside):
            raise InputError("model.core and model.beside need the whole model on each process; use ddp.yaml")
        plain = model.dtype == torch.float32 and self.trainer.precision == "32-true"
        device = self.trainer.strategy.root_device.type
        copies = not self.sharded and plain and device == "cpu"
        if self.matmul == "bfloat16" and not copies:
            raise InputError(
                "model.matmul bfloat16 is for an unsharded float32 base on a CPU; elsewhere set trainer.precision"
            )
        mode = choose_matmul(self.matmul, model, max_error=self.max_matmul_error, copies=copies, device=device)
        self.base_fingerprint = fingerprint(model)
        check_trained_on(self.others, self.base, self.base_fingerprint)
        self.model = add_lora(model, self.lora, self.seed) if self.core is None else self.core.add_to(model)
        # PEFT records where the weights lie on this machine; name and revision are what finds them on another.
        config = self.model.peft_config["default"]
        config.base_model_name_or_path = self.base.name
        config.revision = self.base.revision if on_hub(self.base.name) else None
        self._narrow = mode == "bfloat16"
        fuse(self.model, narrow=self._narrow)
        for adapter, weight in self.beside:
            check_fits(self.model.get_base_model(), adapter.pairs, adapter.name)
            attach(self.model.get_base_model(), weighted_sum([adapter.pairs], [weight]))
        self.model.train()
        if self.gradient_checkpointing:
            checkpoint_layers(self.model.get_base_model())
        trainable, total = self.model.get_nb_trainable_parameters()
        log.info("training %s of %s parameters (%s)", f"{trainable:,}", f"{total:,}", self._trained())
        if self.regularizer is not None:
            if self.sharded:
                raise InputError("model.regularizer reads whole weights; a sharding strategy has none")
            self.regularizer.bind(self.model, self.base_fingerprint)
        if self.sharded:
            shard(self.model, self.device_mesh)

    @property
    def others(self) -> list[Adapter]:
        """Adapters that go into the training, or stand beside it."""
        own = [] if self.core is None else [self.core.adapter]
        return own + [adapter for adapter, _ in self.beside]

    def _trained(self) -> str:
        return f"LoRA rank {self.lora.rank}" if self.core is None else f"the core of {self.core.adapter.name}"

    def _loss(self, batch: Batch) -> torch.Tensor:
        logits = answer_logits(self.model, batch, pack=self._packs(batch), narrow=self._narrow)
        return answer_loss(logits, answer_targets(batch))

    def _packs(self, batch: Batch) -> bool:
        """Whether to pack this batch; tried out once per run, on the first batch that has a common prefix."""
        if not self.pack or self.device.type != "cpu" or self.sharded:
            return False
        if self._can_pack is None and batch.common_prefix:
            self._can_pack = can_pack(self.model, next(batch.split(2)), narrow=self._narrow)
        return bool(self._can_pack)

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        """Mean loss of the batch's answer tokens, in nats, by its weight in the step, and what the regulariser adds."""
        loss = self._loss(batch)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(batch.index))
        loss = loss * batch.weight
        if self.regularizer is not None:
            penalty = self.regularizer.penalty()
            self.log("penalty", penalty, batch_size=len(batch.index))
            loss = loss + penalty
        self.log("lr", self.optimizers().param_groups[0]["lr"])  # type: ignore[union-attr]
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Mean loss over all answer tokens of the validation rows, in nats."""
        tokens = int(batch.answer_mask[:, 1:].sum()) if batch.weight else 0
        # Lightning takes the mean of the processes' numbers of tokens in whole numbers.
        weight = tokens * self.trainer.world_size
        self.log("val_loss", self._loss(batch), prog_bar=True, batch_size=weight, sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        """Note whose loss it is, before a checkpoint is written."""
        if not self.trainer.sanity_checking:
            self.validated[self.trainer.global_step] = float(self.trainer.callback_metrics["val_loss"])

    def configure_optimizers(self) -> Any:
        """The optimiser, with warm-up and schedule stepped after every optimiser step."""
        from transformers import get_scheduler

        parameters: Sequence[torch.nn.Parameter] = [p for p in self.model.parameters() if p.requires_grad]
        try:
            optimizer = self.optimizer_of(parameters)
        except ValueError as error:
            raise InputError(f"model.optimizer: {error}") from None
        # A fused optimiser offers to divide by the loss's scale itself, after clipping; as for any, it is done before.
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
        steps = int(self.trainer.estimated_stepping_batches)
        name = "constant_with_warmup" if self.schedule == "constant" else self.schedule
        scheduler = get_scheduler(name, optimizer, num_warmup_steps=int(self.warmup * steps), num_training_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def write_adapter(self, folder: Path, weights: dict[str, torch.Tensor]) -> None:
        """Write LoRA weights as a PEFT adapter directory."""
        config = self.model.peft_config["default"]
        config.inference_mode = True
        write_trained(folder, config, weights if self.core is None else self.core.factors(weights))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that it is of this adapter; a training goes on from the last optimiser step."""
        trainer: Any = self.trainer
        check_adapter(trainer.ckpt_path, checkpoint, self._facts)
        if trainer.training and "loops" in checkpoint:
            rewind_to_step(checkpoint, trainer.accumulate_grad_batches, limited=trainer.max_steps != -1)
            same_steps = keeps_schedule(self, trainer.datamodule)
            check_processes(trainer.ckpt_path, checkpoint, trainer.world_size, same_steps=same_steps)
            if bring_home(checkpoint, trainer):
                self.validated = dict(checkpoint.get("validated", {}))

    @property
    def _facts(self) -> dict[str, Any]:
        """What a checkpoint and the model that takes it agree in: shapes by name, scaling and what they stand on."""
        config = self.model.peft_config["default"]
        shapes = {key: list(value.shape) for key, value in self.state_dict().items() if is_trained(key)}
        core = None if self.core is None else self.core.adapter.identity
        scaling = {"lora_alpha": config.lora_alpha, "use_rslora": config.use_rslora}
        return shapes | scaling | {"core": core, "fingerprint of the base": self.base_fingerprint}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the adapter's weights only: the base is not ours to store."""
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if is_trained(k)}
        checkpoint |= {ADAPTER: self._facts, "world_size": self.trainer.world_size, "validated": dict(self.validated)}
