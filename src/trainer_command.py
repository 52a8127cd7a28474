"""What the commands that run a Trainer share: a LightningCLI with fixed classes, an output and uniform defaults."""

import logging
import os
from contextlib import ExitStack
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import yaml
from jsonargparse import Namespace
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger

from src.cli import COMMANDS, is_first_process, quiet_libraries
from src.data.modules import TokenizedData
from src.data.rows import learnt_sha256
from src.errors import InputError
from src.files import begin_output, check_output, end_output, has_results, held_output, is_begun
from src.judges import registry  # noqa: F401 - the subclasses of Judge are the registry
from src.models import checkpoints
from src.models.base import load_tokenizer
from src.models.checkpoint_rows import RowsRecord, other_rows
from src.models.fisher_output import remove_done
from src.models.recent_checkpoint import RecentCheckpoint
from src.models.sharding import make_patient
from src.models.speed import default_accelerator, keep_freed_memory
from src.models.stopping import StopAtSigterm
from src.processes import end_with_first, tell_of_first
from src.run_folder import (
    CHECKPOINTS,
    FINISHED,
    OF_SLURM,
    OTHER_SETTINGS,
    RECENT,
    RUN,
    SAME,
    clear_run,
    other_run,
    unfinished_checkpoints,
)
from src.trainer_checks import RunRecord, check_callbacks, check_training_length, follow_seed, making_trainer
from src.trainer_parser import TrainerParser
from src.whole_values import ConfigFile

log = logging.getLogger(__name__)

STARTED = "SST_MERGE_STARTED"
"""Environment variable: when the run began, for the processes that its first one starts."""


class TrainerCommand(LightningCLI):
    """One command of this project: fixed classes, an output directory, quiet and uniform Trainer defaults."""

    def __init__(
        self, command: str, model: type[LightningModule], data: type[LightningDataModule], arguments: list[str]
    ) -> None:
        self.command = command
        self._held = ExitStack()
        end_with_first()
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
                "accelerator": default_accelerator(),
                "use_distributed_sampler": False,
                "logger": True,
                "enable_model_summary": False,
                "num_sanity_val_steps": 0,
                "callbacks": StopAtSigterm(),
            },
            save_config_kwargs={"overwrite": True},
            save_config_callback=RunRecord,
            parser_kwargs={
                "prog": f"python -m src {command}",
                "usage": f"python -m src {command} [--config FILE.yaml] [--trainer FILE.yaml] [options]",
                "description": COMMANDS[command],
            },
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser that reports errors in one line."""
        parser = TrainerParser(**kwargs)
        parser.add_argument("-c", "--config", action=ConfigFile, help="YAML file with any of the options below")
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
            text = "checkpoint of a run to go on from (fit) or to measure"
            parser.add_argument("--ckpt_path", type=str | None, default=None, help=text)
        if self.command == "fit":
            text = "go on from the newest checkpoint in the output, if there is one; replaces a finished run"
            parser.add_argument("--resume", type=bool, default=False, help=text)

    def before_instantiate_classes(self) -> None:
        """Settle and check the output before anything is loaded."""
        if self.config.output is None:
            self.config.output = str(Path("logs") / self.command / _timestamp(self.config.trainer))
        self.output = Path(self.config.output).expanduser()
        self.config.output = str(self.output)
        if self.command == "fit":
            check_training_length(self.config.trainer)
            follow_seed(self.config)
        if self.config.get("dry_run"):
            return
        if self.command == "validate" and self.config.ckpt_path is None:
            raise InputError("validate needs --ckpt_path: a checkpoint that fit wrote (…/run/checkpoints/….ckpt)")
        if self.command == "fisher" and is_first_process() and self.output.is_dir():
            with held_output(self.output):
                remove_done(self.output)
        self._check_output()
        if self.config.get("ckpt_path"):
            checkpoints.check_checkpoint(self.config.ckpt_path, goes_on=self.command == "fit")
        self.config.trainer.default_root_dir = str(self.output)
        if self.command == "fisher":
            self.config.trainer.inference_mode = False  # inference tensors cannot carry gradients

    def _check_output(self) -> None:
        """Refuse an output with results of another run, unless they may be replaced.

        Raises:
            InputError: it has such results, checkpoints of a training, or is a file.
        """
        if self.output.is_file():
            raise InputError(f"--output {self.output}: a file; name a directory")
        trained = any((self.output / CHECKPOINTS).glob("*"))
        if trained and self.command != "fit":
            raise InputError(f"--output {self.output}: checkpoints of fit lie in {RUN}/ there; name another directory")
        allowed = self.config.overwrite or self.resumes or not is_first_process()
        # What an interrupted pass leaves is no result; an interrupted training is: its checkpoints are hours of work.
        kept = self.command == "fit" and (trained or any(self.output.glob(OF_SLURM)))
        why = self._other_run() if kept and self.resumes and not self.config.overwrite else ""
        # What else may be wrong with it changes while the first process clears the output.
        if why not in ("", FINISHED) and (is_first_process() or why.startswith(OTHER_SETTINGS)):
            raise InputError(f"--output {self.output}: holds a run {why}; pass --overwrite true to replace it")
        going_on = not kept and is_begun(self.output, self.shared_settings)
        check_output(self.output, overwrite=allowed or going_on, beside=frozenset() if kept else frozenset({RUN}))
        self._own = going_on or not has_results(self.output, frozenset({RUN}))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        """Let other runs have the output."""
        self._held.close()

    @cached_property
    def shared_settings(self) -> dict[str, Any]:
        """What two runs of the same command have in common."""
        settings = self.settings
        return {"command": self.command} | {key: settings.get(key) for key in SAME}

    def begin(self) -> None:
        """Mark the output as unfinished, as this run's own where it held no result; call it before the Trainer's."""
        if is_first_process():
            begin_output(self.output, self.shared_settings if self._own else None)

    def end(self) -> None:
        """Take away the mark and the checkpoints of an unfinished run, once all results are written."""
        if is_first_process():
            end_output(self.output)
            for spare in unfinished_checkpoints(self.output):
                spare.unlink()

    @property
    def resumes(self) -> bool:
        """Whether to go on from what the output holds: as ``--resume`` says, or where SLURM has queued a job again."""
        if self.command != "fit":
            return False
        return self.config.resume or (int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0 and not self._other_run())

    @cached_property
    def checkpoint(self) -> str | None:
        """The checkpoint to go on from: the newest of the output where the run resumes, else the one named.

        Raises:
            InputError: its training had other rows, whose prompts the adapter would not name as seen.
        """
        found: str | None = (self._newest() if self.resumes else None) or self.config.get("ckpt_path")
        if self.command == "fit" and found and (name := other_rows(Path(found), self.learnt)):
            what = "expected the same, or --overwrite true (and no --ckpt_path) to start over"
            raise InputError(f"{found}: {name} has other rows than the run that is to go on; {what}")
        return found

    @cached_property
    def learnt(self) -> dict[str, str]:
        """SHA-256 of what is learnt from the rows of a training, wherever they lie, by split."""
        return {split: learnt_sha256(rows) for split, rows in self.datamodule.rows.items()}

    @property
    def _stays(self) -> bool:
        """Whether that lies in the output, so that the run goes on with its files."""
        return self.checkpoint is not None and checkpoints.lies_with(Path(self.checkpoint), self.output, self.trainer)

    def _newest(self) -> str | None:
        """The newest checkpoint of this run in the output; says where there is none."""
        folder = self.output / CHECKPOINTS
        found = [*folder.glob("last*.ckpt"), folder / RECENT, *self.output.glob(OF_SLURM)]
        overwrite, steady = self.config.overwrite, checkpoints.keeps_schedule(self.model, self.datamodule)
        if overwrite:
            found = [one for one in found if checkpoints.goes_on_with(one, self.trainer.world_size, same_steps=steady)]
        # Where there is nothing else to go on from, it is said that weights alone are none.
        newest = checkpoints.newest_checkpoint(found, weights_too=not (overwrite and self.config.ckpt_path))
        if newest is None:
            if (self.output / RUN).is_dir():
                log.info("no checkpoint in %s to go on from: starting over", self.output)
        elif why := self._other_run():
            log.info("%s is of a run %s: starting over", newest, why)
        elif overwrite and (name := other_rows(newest, self.learnt)):
            log.info("%s is of a run with other rows (%s): starting over", newest, name)
        else:
            checkpoints.check_checkpoint(str(newest), goes_on=True)
            return str(newest)
        return None

    def _other_run(self) -> str:
        """Why the run in the output is none to go on with; empty where it had this model, these data and this seed."""
        return other_run(self.output, self.settings)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A Trainer whose own files go below the output."""
        config: Namespace = self.config
        if config.trainer.logger in (None, True):
            kwargs["logger"] = CSVLogger(str(self.output), name=RUN, version="")
        with making_trainer():
            trainer = super().instantiate_trainer(**kwargs)
        make_patient(trainer.strategy)
        if trainer.strategy.launcher is not None:
            tell_of_first(trainer.num_devices * trainer.num_nodes)
        trainer.strategy.checkpoint_io = checkpoints.AtomicCheckpoints()
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str((self.output / CHECKPOINTS).resolve())
        if self.command == "fit":
            check_callbacks(trainer)
            trainer.callbacks.insert(0, RowsRecord(lambda: self.learnt))  # type: ignore[attr-defined]
        if self.command == "fit" and config.trainer.enable_checkpointing is not False:
            recent = RecentCheckpoint(self.output / CHECKPOINTS / RECENT)
            trainer.callbacks.insert(0, recent)  # type: ignore[attr-defined]
        return trainer

    @property
    def settings(self) -> dict[str, Any]:
        """The resolved configuration, as plain values."""
        plain: dict[str, Any] = yaml.safe_load(self.parser.dump(self.config, skip_none=False, skip_validation=True))
        return plain

    def prepare(self) -> Any:
        """Give the data the model's tokenizer, and make room for the run's files."""
        data: Any = self.datamodule
        if isinstance(data, TokenizedData):
            data.bind(load_tokenizer(self.model.base))  # type: ignore[arg-type]
        if self.config.get("dry_run"):
            return data
        # Only now that all input has been read: an earlier run is not lost to a mistyped name.
        if is_first_process():
            self._held.enter_context(held_output(self.output))
            self._check_output()  # a run that held it until now may have written results
            clear_run(self.output, stays=self._stays)
        if not self._stays:
            # Each process by itself: Lightning would go on from such a file, and srun starts them in no order.
            for stale in self.output.glob(OF_SLURM):
                stale.unlink(missing_ok=True)
        return data


def _timestamp(trainer: Namespace) -> str:
    """When the run began, the same in all its processes.

    Raises:
        InputError: they have not been started by the first of them, so each would say another time.
    """
    if not is_first_process() and STARTED in os.environ:
        return os.environ[STARTED]
    torchrun = TorchElasticEnvironment.detect() and int(os.environ["WORLD_SIZE"]) > 1
    slurm = SLURMEnvironment.detect() and int(os.environ["SLURM_NTASKS"]) > 1
    if torchrun or slurm or trainer.num_nodes > 1:
        raise InputError("--output: name a directory; processes that torchrun, srun or nodes start take one each else")
    os.environ[STARTED] = datetime.now().strftime("%Y-%m-%dT%H-%M-%S")
    return os.environ[STARTED]
