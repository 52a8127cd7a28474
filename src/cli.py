"""Which command runs what, and what users see of its start and its end.

``fit validate test predict`` and ``fisher`` are LightningCLI commands, the others typed functions. The heavy packages
are imported once a command is chosen, so that ``--help`` answers at once.
"""

import errno
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from typing import Any

from src.arguments import evaluation_options, long_names, name_in_help, resolve_names, with_default_config
from src.errors import InputError, one_line
from src.signals import terminated_like_interrupted

COMMANDS = {
    "fit": "train a LoRA expert (utility or safety) on a frozen base model",
    "validate": "loss of a trained expert on validation rows",
    "fisher": "measure the Fisher information of safety and of benign calibration rows",
    "merge": "combine utility adapters and merge a safety adapter into them (SST, TIES, DARE, task arithmetic, ...)",
    "inspect": "ranks, norms, cosines and principal angles of adapters",
    "test": "evaluate the base model and adapters: refusal, over-refusal, collapse, accuracy, perplexity",
    "predict": "write the answers of the base model and adapters to prompts",
    "judge": "judge stored answers again, or measure a judge against human labels",
    "experiment": "compute a study (safety tax, interference, comparison, ablations) and write its report",
    "report": "table and safety/utility plot of an evaluation; of a study's FOLDER its page, written again",
}
WITHOUT_TRAINER = ("merge", "inspect", "judge", "report", "experiment")
"""Commands that are functions; Lightning has its own answer to signals."""
STOPPED = 2
OF_THE_MACHINE = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.EEXIST,
    errno.EBUSY,
)
"""System errors that a user's disk or paths cause."""
STDOUT = "standard output"
INTERRUPTED = (
    "interrupted; what was finished is kept: the same command goes on from there (fisher, test, predict, "
    "experiment, fit --resume true; judge keeps its verdicts) or starts again (the others)"
)

LESS_MEMORY = {
    "fit": "try a smaller --data.batch_size, shorter rows, or --model.gradient_checkpointing true",
    "fisher": "try a smaller --data.batch_size, shorter rows, or --model.gradient_checkpointing true",
    "test": "try a smaller --data.batch_size or shorter rows",
    "predict": "try a smaller --data.batch_size or shorter rows",
    "judge": "try a smaller --judge.batch_size or --device cpu",
}
"""What a command can do on a GPU that has no room."""

CHATTER = (
    ".*does not have many workers.*",
    ".*is smaller than the logging interval.*",
    ".*LightningCLI's args parameter is intended.*",
    ".*is_gradient_checkpointing.*",
    ".*treespec, LeafSpec.*",
    ".*The dirpath has changed from.*",
    ".*director.* exists and is not empty.*",
    ".*predict returned None.*",
    ".*ModelParallelStrategy.*experimental.*",
    ".*GPU available but not used.*",
    ".*across ranks is zero. Please make sure this was your intention.*",
)
"""Warnings of libraries that a user can do nothing about."""


def usage() -> str:
    """The page of ``python -m src --help``."""
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items())
    return f"""usage: python -m src COMMAND [--config FILE.yaml] [--trainer FILE.yaml] [options]

SST-Merge puts safety back into fine-tuned language models by merging LoRA adapters.

commands:
{lines}

Options of a command: python -m src COMMAND --help
Bare file names are looked up as given, then under configs/ (--config) or trainers/ (--trainer). Without --config a
command takes its default, such as configs/test.yaml; merge and report do where no adapters or results are named, and
experiment has none. Wrong input ends with one line and exit code 2.
"""


def runner(command: str) -> Callable[[list[str]], None]:
    """The function that runs a command with its arguments."""
    if command in WITHOUT_TRAINER:
        from src import functions

        return getattr(functions, command)  # type: ignore[no-any-return]
    from src import training

    return getattr(training, command)  # type: ignore[no-any-return]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, or 2 after one line on what was wrong."""
    with _streams():
        try:
            try:
                return _command(list(sys.argv[1:] if argv is None else argv))
            finally:
                sys.stdout.flush()
        except OSError as error:
            if error.filename != STDOUT:
                raise
            _to_nowhere(sys.stdout)
            return _stop(f"{STDOUT}: {error.strerror}")


class _Output:
    """Standard output that goes nowhere once its reader has gone, and that names itself in other errors."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, call: Callable[..., object], *given: str) -> None:
        try:
            call(*given)
        except BrokenPipeError:
            _to_nowhere(self._stream)
        except OSError as error:
            error.filename = STDOUT
            raise


def _to_nowhere(stream: Any) -> None:
    """Drop what a stream holds and what is still to come: Python flushes it at its end."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


@contextmanager
def _streams() -> Iterator[None]:
    """Standard output and error that are there, after ``>&-`` too, and that take every character."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        output: Any = _Output(sys.stdout or nowhere)
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        with redirect_stdout(output), redirect_stderr(sys.stderr or nowhere):
            yield


def _command(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("--help", "-h"):
        sys.stdout.write(usage())
        return 0
    command = arguments[0]
    if command not in COMMANDS:
        return _stop(f"unknown command {command!r}; expected one of {', '.join(COMMANDS)}")
    for argument in arguments:
        if argument.encode(errors="replace").decode() != argument:
            return _stop(f"{argument!a}: a name with bytes that are no UTF-8; rename it (or set PYTHONUTF8=1)")
    start_logging()
    quiet_libraries()
    return _run(command, arguments[1:])


def _run(command: str, arguments: list[str]) -> int:
    """Run a command; returns its exit code."""
    arguments = long_names(arguments)
    try:
        if command in ("test", "predict"):
            arguments = evaluation_options(arguments)
        with terminated_like_interrupted() if command in WITHOUT_TRAINER else nullcontext():
            runner(command)(resolve_names(with_default_config(command, name_in_help(arguments))))
    except InputError as error:
        return _stop(str(error))
    except KeyboardInterrupt:
        return _stop(INTERRUPTED)
    except SystemExit as stop:
        # Lightning turns Ctrl-C into an exit of its own, and SIGTERM into one that looks like success.
        if not isinstance(stop.__context__, KeyboardInterrupt) and type(stop).__name__ != "SIGTERMException":
            raise
        return _stop(INTERRUPTED)
    except (OSError, RuntimeError) as error:
        problem = _of_the_machine(error, command)
        if problem is None:
            raise
        return _stop(problem, everywhere=True)
    except _misconfigured() as error:
        return _stop(f"trainer: {error}")
    return 0


def _of_the_machine(error: OSError | RuntimeError, command: str) -> str | None:
    """What the machine has not enough of, in a sentence; None where the error is another."""
    if type(error).__name__ == "OutOfMemoryError":
        return "; ".join([one_line(error), *([LESS_MEMORY[command]] if command in LESS_MEMORY else [])])
    if isinstance(error, RuntimeError) or error.errno not in OF_THE_MACHINE or error.filename == STDOUT:
        return None
    return f"{error.filename or 'output'}: {error.strerror}; nothing is half-written"


def _misconfigured() -> type[Exception]:
    """What Lightning raises for hardware and settings that do not go together here; asked for once something failed."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    return MisconfigurationException


def _stop(message: str, *, everywhere: bool = False) -> int:
    """Say why a command ends: in the first process, or in whichever it happens, as where one alone has no room."""
    if everywhere or is_first_process():
        who = "error" if is_first_process() else f"error in process {_process()}"
        sys.stderr.write(f"{who}: {' '.join(message.split())}\n")
    return STOPPED


def start_logging() -> None:
    """Messages of this project to standard error, from the first process only."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    ours = logging.getLogger("src")
    ours.handlers = [handler]
    ours.propagate = False
    ours.setLevel(logging.INFO if is_first_process() else logging.ERROR)


def is_first_process() -> bool:
    """False in the processes that a launcher (Lightning, torchrun, SLURM) started beside the first one."""
    return all(os.environ.get(key, "0") == "0" for key in ("LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID"))


def _process() -> str:
    """The number that a launcher has given this process."""
    return next((os.environ[key] for key in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if key in os.environ), "?")


def quiet_libraries() -> None:
    """Keep what a user can act on: drop the libraries' start-up chatter."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning_utilities"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Imported with PEFT, it warns of CPU kernels that this package switches off.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    for message in CHATTER:
        warnings.filterwarnings("ignore", message=message)
