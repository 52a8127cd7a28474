"""The commands that run a Trainer, each a LightningCLI with its own module and data."""

import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import Namespace
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy

from src.adapters.peft_files import CONFIG, trained_weights, write_provenance
from src.cli import COMMANDS, is_first_process, quiet_libraries
from src.data.calibration import CalibrationData
from src.data.modules import ExpertData, TokenizedData
from src.data.rows import rows_sha256
from src.data.suites import EvaluationData
from src.errors import InputError
from src.files import check_output
from src.judges import causal, classifier, endpoint, refusal  # noqa: F401 - the subclasses of Judge are the registry
from src.merge.card import expert_card
from src.models.base import load_tokenizer
from src.models.checkpoints import AtomicCheckpoints, check_checkpoint
from src.models.evaluation import EvaluationModule
from src.models.expert import ExpertModule
from src.models.fisher import FisherModule
from src.models.speed import keep_freed_memory
from src.parsing import TrainerParser
from src.provenance import versions

log = logging.getLogger(__name__)

CONFIG_RECORD = "config.yaml"
RUN = "run"
"""Sub-directory of an output that holds the Trainer's own files: config.yaml, metrics.csv, checkpoints."""


class TrainerCommand(LightningCLI):
    """One command of this project: fixed classes, an output directory, quiet and uniform Trainer defaults."""

    def __init__(
        self, command: str, model: type[LightningModule], data: type[LightningDataModule], arguments: list[str]
    ) -> None:
        self.command = command
        quiet_libraries()  # again: importing Lightning has reset its loggers
        keep_freed_memory()
        super().__init__(
            model,
            data,
            run=False,
            args=arguments,
            seed_everything_default=0,
            auto_configure_optimizers=False,  # an injected optimiser would replace the schedule per step
            trainer_defaults={
                "use_distributed_sampler": False,
                "logger": True,
                "enable_model_summary": False,
                "num_sanity_val_steps": 0,
            },
            save_config_kwargs={"overwrite": True},
            save_config_callback=SaveConfigCallback,
            parser_kwargs={
                "prog": f"python -m src {command}",
                "usage": f"python -m src {command} [--config FILE.yaml] [--trainer FILE.yaml] [options]",
                "description": COMMANDS[command],
            },
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser that reports errors in one line."""
        parser = TrainerParser(**kwargs)
        parser.add_argument("-c", "--config", action="config", help="YAML file with any of the options below")
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Options that belong to the command and not to the module, the data or the Trainer."""
        parser.add_argument("--output", type=str | None, default=None, help="directory to write")
        parser.add_argument("--overwrite", type=bool, default=False, help="replace an output that exists")
        if self.command == "fisher":
            parser.add_argument(
                "--dry_run", type=bool, default=False, help="print sizes (rows, D, disk, memory) and load no weights"
            )
        if self.command in ("fit", "validate"):
            parser.add_argument(
                "--ckpt_path",
                type=str | None,
                default=None,
                help="checkpoint of a run to go on from (fit) or to measure",
            )
        if self.command == "fit":
            parser.add_argument(
                "--resume",
                type=bool,
                default=False,
                help="go on from the last checkpoint in the output, if there is one",
            )

    def before_instantiate_classes(self) -> None:
        """Settle and check the output before anything is loaded."""
        if self.config.output is None:
            self.config.output = str(Path("logs") / self.command / _timestamp())
        self.output = Path(self.config.output)
        if self.command == "fit":
            check_training_length(self.config.trainer)
        if self.config.get("dry_run"):
            return
        allowed = self.config.overwrite or (self.command == "fit" and self.config.resume) or not is_first_process()
        # What an interrupted pass leaves is no result; an interrupted training is: its checkpoints are hours of work.
        kept = self.command == "fit" and any((self.output / RUN / "checkpoints").glob("*"))
        check_output(self.output, overwrite=allowed, beside=frozenset() if kept else frozenset({RUN}))
        if self.config.get("ckpt_path"):
            check_checkpoint(self.config.ckpt_path)
        self.config.trainer.default_root_dir = str(self.output)
        if self.command == "fisher":
            self.config.trainer.inference_mode = False  # inference tensors cannot carry gradients

    def _clear_run(self) -> None:
        """Make room for the Trainer's files: a run that goes on keeps its checkpoints and sets its metrics aside."""
        run = self.output / RUN
        if self.checkpoint is None:
            shutil.rmtree(run, ignore_errors=True)
        elif (run / "metrics.csv").exists():
            before = len(list(run.glob("metrics.before-*.csv")))
            (run / "metrics.csv").rename(run / f"metrics.before-{before}.csv")

    @property
    def checkpoint(self) -> str | None:
        """The checkpoint to go on from: the one named, or with ``--resume`` the last one of the output."""
        named: str | None = self.config.get("ckpt_path")
        last = self.output / RUN / "checkpoints" / "last.ckpt"
        if named is not None or not self.config.get("resume") or not last.is_file():
            return named
        if not self._same_run():
            log.info("%s is of a run with other settings: starting over", last)
            return None
        return str(last)

    def _same_run(self) -> bool:
        """Whether the run in the output had this model, these data and this seed, and was not finished."""
        record = self.output / RUN / CONFIG_RECORD
        if (self.output / CONFIG).exists() or not record.is_file():
            return False
        before, now = yaml.safe_load(record.read_text(encoding="utf-8")), self.settings
        return all(before.get(key) == now.get(key) for key in ("model", "data", "seed_everything"))

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A Trainer whose own files go below the output."""
        config: Namespace = self.config
        if config.trainer.logger in (None, True):
            kwargs["logger"] = CSVLogger(str(self.output), name=RUN, version="")
        trainer = super().instantiate_trainer(**kwargs)
        if not isinstance(trainer.strategy, ModelParallelStrategy):
            trainer.strategy.checkpoint_io = AtomicCheckpoints()
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(self.output / RUN / "checkpoints")
        return trainer

    @property
    def settings(self) -> dict[str, Any]:
        """The resolved configuration, as plain values."""
        plain: dict[str, Any] = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        return plain

    def prepare(self) -> Any:
        """Give the data the model's tokenizer, and make room for the run's files."""
        data: Any = self.datamodule
        if isinstance(data, TokenizedData):
            data.bind(load_tokenizer(self.model.base))  # type: ignore[arg-type]
        # Only now that all input has been read: an earlier run is not lost to a mistyped name.
        if is_first_process() and not self.config.get("dry_run"):
            self._clear_run()
        return data


def check_training_length(trainer: Namespace) -> None:
    """Stop at numbers of the Trainer that train nothing or that it takes without complaint or with a traceback.

    Raises:
        InputError: ``max_epochs``, ``max_steps``, ``accumulate_grad_batches`` or ``gradient_clip_val`` is out of range.
    """
    for key in ("max_epochs", "max_steps"):
        value = trainer.get(key)
        if value is not None and value != -1 and value < 1:
            raise InputError(f"trainer.{key} is {value}; expected at least 1, or -1 for no limit")
    if trainer.get("accumulate_grad_batches", 1) < 1:
        raise InputError(f"trainer.accumulate_grad_batches is {trainer.accumulate_grad_batches}; expected at least 1")
    if (trainer.get("gradient_clip_val") or 0.0) < 0:
        raise InputError(f"trainer.gradient_clip_val is {trainer.gradient_clip_val}; expected 0 (off) or more")


def _timestamp() -> str:
    from datetime import datetime

    return datetime.now().strftime("%Y-%m-%dT%H-%M-%S")


def fit(arguments: list[str]) -> None:
    """Train an expert and write the adapter of its best checkpoint."""
    command = TrainerCommand("fit", ExpertModule, ExpertData, arguments)
    data, trainer, module = command.prepare(), command.trainer, command.model
    checkpoint = command.checkpoint
    if checkpoint is not None:
        log.info("going on from %s", checkpoint)
    trainer.fit(module, data, ckpt_path=checkpoint, weights_only=False)
    if trainer.interrupted:
        raise KeyboardInterrupt
    save_expert(trainer, module, data, command)  # type: ignore[arg-type]


def save_expert(trainer: Trainer, module: ExpertModule, data: ExpertData, command: TrainerCommand) -> None:
    """Write the adapter of the best checkpoint (of the last step without one), with manifest and card."""
    weights = _best_weights(trainer)
    if not trainer.is_global_zero:
        return
    loss = trainer.callback_metrics.get("val_loss")
    best = next((c.best_model_score for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)), None)
    measured = loss if best is None else best
    settings = command.settings
    manifest = {
        "kind": "expert",
        "method": "fit",
        "base": {"name": module.base.name, "fingerprint": module.base_fingerprint},
        "settings": {"lora": vars(module.lora)} | settings,
        "rows": {split: len(rows) for split, rows in data.rows.items()},
        "rows_sha256": {split: rows_sha256(rows) for split, rows in data.rows.items()},
        "steps": trainer.global_step,
        "val_loss": None if measured is None else float(measured),
        "versions": versions(),
    }
    folder = command.output
    (folder / CONFIG).unlink(missing_ok=True)
    write_provenance(folder, manifest=manifest, seen=data.seen, card=expert_card(manifest))
    module.write_adapter(folder, weights)
    found = "not measured" if measured is None else f"{float(measured):.4f}"
    log.info("adapter written to %s (validation loss %s)", folder, found)


def _best_weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    """LoRA weights of the best checkpoint, gathered from all shards."""
    best = next((c.best_model_path for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)), "")
    if best and Path(best).is_file():
        state = torch.load(best, map_location="cpu", weights_only=False)["state_dict"]
    elif best and isinstance(trainer.strategy, ModelParallelStrategy):
        raise InputError(f"{best}: sharded checkpoints are not joined yet; set save_distributed_checkpoint: false")
    else:
        state = trainer.strategy.lightning_module_state_dict()
    return trained_weights(state)


def validate(arguments: list[str]) -> None:
    """Loss of a checkpoint on the validation rows."""
    command = TrainerCommand("validate", ExpertModule, ExpertData, arguments)
    data = command.prepare()
    if command.config.ckpt_path is None:
        raise InputError("validate needs --ckpt_path: a checkpoint that fit wrote (…/run/checkpoints/….ckpt)")
    command.trainer.validate(command.model, data, ckpt_path=command.config.ckpt_path, weights_only=False)


def fisher(arguments: list[str]) -> None:
    """Both Fisher passes."""
    command = TrainerCommand("fisher", FisherModule, CalibrationData, arguments)
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
    command.output.mkdir(parents=True, exist_ok=True)
    command.trainer.predict(module, data, return_predictions=False)
    log.info("Fisher files written to %s", command.output)


def test(arguments: list[str]) -> None:
    """Evaluate models on suites."""
    command, data = _evaluation("test", arguments)
    command.trainer.test(command.model, data, verbose=False)
    log.info("metrics and answers written to %s", command.output)


def predict(arguments: list[str]) -> None:
    """Write answers to prompts."""
    command, data = _evaluation("predict", arguments)
    command.trainer.predict(command.model, data, return_predictions=False)
    log.info("answers written to %s", command.output / "answers")


def _evaluation(name: str, arguments: list[str]) -> tuple[TrainerCommand, Any]:
    command = TrainerCommand(name, EvaluationModule, EvaluationData, arguments)
    data: Any = command.prepare()
    module: Any = command.model
    module.output, module.settings = command.output, command.settings
    return command, data
