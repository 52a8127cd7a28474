"""Single values of nested settings: ``--recipe.utility.settings.trainer.max_epochs 2``.

jsonargparse replaces all of ``trainer`` there, by ``{max_epochs: "2"}``: what stands beside the value is lost, and it
is a text. Here such a flag changes one value, which is read as YAML; texts that a file quotes stay texts.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from jsonargparse._loaders_dumpers import get_loader_exceptions, load_value
from jsonargparse._typehints import ActionTypeHint

from src.parsing import OneLineErrors

NESTED = (dict[str, Any], dict[str, Any] | None)
"""Types of options that are nested as a user likes."""


class SingleValue(ActionTypeHint):
    """An option of nested settings of which a flag with a longer name sets one value."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Set the option to its mapping with that value in it."""
        option = self.get_option_string_base(args[3]) if args else None
        if option is not None:
            parser, config, text, flag = args
            value = changed(config.get(self.dest), flag.removeprefix(f"{option}.").split("."), _loaded(text))
            args = (parser, config, value, option)
        return super().__call__(*args, **kwargs)


class StudyParser(OneLineErrors):
    """A parser, also of the classes and methods of a study, whose nested settings can be changed one by one."""

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """Parse."""
        for action in self._actions:
            if getattr(action, "_typehint", None) in NESTED:
                action.__class__ = SingleValue
        return super().parse_args(*args, **kwargs)


def changed(known: Any, path: Sequence[str], value: Any) -> dict[str, Any]:
    """A mapping with another value at a path; what is no mapping there is replaced by one."""
    head, *rest = path
    found = dict(known) if isinstance(known, Mapping) else {}
    found[head] = changed(found.get(head), rest, value) if rest else value
    return found


def _loaded(text: str) -> Any:
    """A text as a YAML file of this project has it, where 1e-3 is a number; one that is no YAML stays."""
    with suppress(*get_loader_exceptions()):
        return load_value(text, simple_types=True)
    return text
