"""The parser of the commands that have a Trainer; apart, as other commands start sooner without importing Lightning."""

from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from src.parsing import OneLineErrors


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
