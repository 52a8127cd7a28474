"""The commands that run a Trainer: fit, validate, fisher, test, predict."""

import logging
import sys
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy

from src.adapters.peft_files import CONFIG, trained_weights, write_provenance
from src.data.calibration import CalibrationData
from src.data.modules import ExpertData
from src.data.rows import rows_sha256
from src.data.suites import EvaluationData
from src.errors import InputError
from src.merge.card import expert_card
from src.models.evaluation import EvaluationModule
from src.models.expert import ExpertModule
from src.models.fisher import FisherModule
from src.provenance import versions
from src.signals import terminated_like_interrupted
from src.trainer_checks import fitting, warn_of_early_end, warn_of_narrow_adapter, warn_of_unmeasured_steps
from src.trainer_command import TrainerCommand

log = logging.getLogger(__name__)


def fit(arguments: list[str]) -> None:
    """Train an expert and write the adapter of its best checkpoint."""
    with TrainerCommand("fit", ExpertModule, ExpertData, arguments) as command:
        data, trainer, module = command.prepare(), command.trainer, command.model
        checkpoint = command.checkpoint
        if checkpoint is not None:
            log.info("going on from %s", checkpoint)
        command.begin()
        warn_of_narrow_adapter(trainer)
        with fitting():
            trainer.fit(module, data, ckpt_path=checkpoint, weights_only=False)
        if trainer.interrupted:
            raise KeyboardInterrupt
        warn_of_early_end(trainer)
        save_expert(trainer, module, data, command)  # type: ignore[arg-type]
        command.end()


def save_expert(trainer: Trainer, module: ExpertModule, data: ExpertData, command: TrainerCommand) -> None:
    """Write the adapter of the best checkpoint (of the last step without one), with manifest and card.

    Raises:
        InputError: its weights or its loss are not finite.
    """
    weights, measured, step = _kept(trainer, module)
    if not trainer.is_global_zero:
        return
    warn_of_unmeasured_steps(trainer, step)
    if not (isfinite(measured or 0.0) and all(tensor.isfinite().all() for tensor in weights.values())):
        raise InputError(
            "training diverged: the adapter or its validation loss is not finite, and no adapter was written; "
            "lower model.optimizer.lr or set trainer.gradient_clip_val"
        )
    settings = command.settings
    manifest = {
        "kind": "expert",
        "method": "fit",
        "base": {"name": module.base.name, "fingerprint": module.base_fingerprint},
        "settings": {"lora": vars(module.lora)} | settings,
        "rows": {split: len(rows) for split, rows in data.rows.items()},
        "rows_sha256": {split: rows_sha256(rows) for split, rows in data.rows.items()},
        "steps": trainer.global_step,
        "step": step,
        "val_loss": measured,
        "others": [{"path": one.name, "sha256": one.sha256} for one in module.others],
        "regularizer": list(module.regularizer.sources) if module.regularizer is not None else [],
        "versions": versions(),
    }
    held = [] if module.regularizer is None else [module.regularizer.seen]
    seen = frozenset(data.seen).union(*(one.seen for one in module.others), *held)
    folder = command.output
    with terminated_like_interrupted():
        (folder / CONFIG).unlink(missing_ok=True)
        write_provenance(folder, manifest=manifest, seen=seen, card=expert_card(manifest))
        module.write_adapter(folder, weights)
    found = "not measured" if measured is None else f"{measured:.4f}"
    log.info("adapter written to %s (validation loss %s)", folder, found)


def _kept(trainer: Trainer, module: ExpertModule) -> tuple[dict[str, torch.Tensor], float | None, int]:
    """LoRA weights of the best checkpoint (of the last step without one), gathered from all shards; their loss, step.

    The loss is that of a validation at their step: nothing where there was none, or where the checkpoint was chosen by
    something else.
    """
    chosen = next((c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)), None)
    best, step, by_loss = "" if chosen is None else chosen.best_model_path, trainer.global_step, True
    if chosen is not None and best and Path(best).is_file():
        found = torch.load(best, map_location="cpu", weights_only=False)
        state, step, by_loss = found["state_dict"], found["global_step"], chosen.monitor in (None, "val_loss")
    elif best and isinstance(trainer.strategy, ModelParallelStrategy):
        raise InputError(f"{best}: sharded checkpoints are not joined yet; set save_distributed_checkpoint: false")
    else:
        if best:
            log.warning("%s is not there any more: the adapter is that of the last step", best)
        state = trainer.strategy.lightning_module_state_dict()
    return trained_weights(state), module.validated.get(step) if by_loss else None, step


def validate(arguments: list[str]) -> None:
    """Loss of a checkpoint on the validation rows."""
    with TrainerCommand("validate", ExpertModule, ExpertData, arguments) as command:
        data = command.prepare()
        command.trainer.validate(command.model, data, ckpt_path=command.config.ckpt_path, weights_only=False)


def fisher(arguments: list[str]) -> None:
    """Both Fisher passes."""
    with TrainerCommand("fisher", FisherModule, CalibrationData, arguments) as command:
        data: Any = command.prepare()
        module: Any = command.model
        data.bind_passes(module.passes, module.random_passes)
        data.setup("predict")
        lines = module.estimate(data, command.trainer).lines()
        if command.config.dry_run:
            sys.stdout.write("\n".join(lines) + "\n")
            return
        for line in lines:
            log.info("%s", line)
        module.output, module.settings = command.output, command.settings
        module.shared_settings = command.shared_settings
        command.output.mkdir(parents=True, exist_ok=True)
        command.begin()
        command.trainer.predict(module, data, return_predictions=False)
        log.info("Fisher files written to %s", command.output)


def test(arguments: list[str]) -> None:
    """Evaluate models on suites."""
    with TrainerCommand("test", EvaluationModule, EvaluationData, arguments) as command:
        data = _prepared(command)
        command.begin()
        command.trainer.test(command.model, data, verbose=False)
        command.end()
    log.info("metrics and answers written to %s", command.output)


def predict(arguments: list[str]) -> None:
    """Write answers to prompts."""
    with TrainerCommand("predict", EvaluationModule, EvaluationData, arguments) as command:
        data = _prepared(command)
        command.begin()
        command.trainer.predict(command.model, data, return_predictions=False)
        command.end()
    log.info("answers written to %s", command.output / "answers")


def _prepared(command: TrainerCommand) -> Any:
    """The data of an evaluation, and the module told where to write."""
    data: Any = command.prepare()
    module: Any = command.model
    module.output, module.settings = command.output, command.settings
    return data
