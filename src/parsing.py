"""Parsers whose errors are one line, and typed functions as commands."""

import re
from collections.abc import Callable
from typing import Any, NoReturn

from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningArgumentParser

from src.errors import InputError


def _reason(message: str) -> str:
    """The option that is wrong, where a message goes through every type that a key could have had."""
    key, _, tried = message.partition(":\n")
    found = re.search(r"Option '[^']+' is not accepted|Parser key \"[^\"]+\": Expected [^\n]+", tried)
    return message if found is None else f"{key}: {found[0]}"


class OneLineErrors(ArgumentParser):
    """An argument parser that raises :class:`InputError` where the original prints its usage and exits."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the message as one line."""
        raise InputError(" ".join(_reason(message).split()))

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """Parse; a flag of type bool alone is true: ``--dry_run`` is ``--dry_run true``."""
        for action in self._actions:
            if getattr(action, "_typehint", None) is bool:
                action.nargs, action.const = "?", True
        return super().parse_args(*args, **kwargs)


class TrainerParser(OneLineErrors, LightningArgumentParser):
    """LightningCLI's parser with one-line errors, where the name of a file stands for itself."""

    def add_class_arguments(self, *args: Any, **kwargs: Any) -> list[str]:
        """Add a class's options; Lightning would have the file that a string names read in place of the string."""
        return super().add_class_arguments(*args, **kwargs | {"sub_configs": False})

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """Our own options first: the Trainer's hundreds of lines stand behind them."""
        of_trainer = [group for group in self._action_groups if _is_of_trainer(group)]
        others = [group for group in self._action_groups if not _is_of_trainer(group)]
        for group in of_trainer:
            group.title = "Lightning's Trainer (the files under trainers/ set these for kinds of hardware)"
        self._action_groups = others + of_trainer
        return super().format_help(*args, **kwargs)


def _is_of_trainer(group: Any) -> bool:
    return any(action.dest.startswith("trainer.") for action in group._group_actions)


def run_function(function: Callable[..., None], name: str, summary: str, arguments: list[str]) -> None:
    """Parse a function's keyword arguments from flags and YAML, then call it."""
    parser = OneLineErrors(prog=f"python -m src {name}", description=summary)
    parser.add_argument("--config", action="config", help="YAML file with any of the options below")
    parser.add_function_arguments(function, fail_untyped=True)
    config: Any = parser.parse_args(arguments)
    config.pop("config", None)
    try:
        ready = parser.instantiate(config)
    except ValueError as error:
        raise _of_the_user(error) from None
    function(**ready.as_dict() if hasattr(ready, "as_dict") else vars(ready))


def _of_the_user(error: BaseException) -> BaseException:
    """The input error that made a class refuse its settings; the parser wraps it where the class is optional."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, InputError):
        cause = cause.__cause__
    return cause or error
