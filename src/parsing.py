"""Parsers whose errors are one line, and typed functions as commands."""

import os
import re
import sys
from argparse import SUPPRESS
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NoReturn

from jsonargparse import ArgumentParser
from jsonargparse._actions import _ActionConfigLoad, remove_actions

from src.errors import InputError, one_line
from src.explain import choices, overview, page
from src.whole_values import ConfigFile, after_empty, files_of

NO_CLASS = re.compile(r'^Parser key "([^"]+)":.*Expected a dot import path string: ([^\n]*)', re.DOTALL)
UNMADE = re.compile(r"Problem with given class_path '(?P<name>[^']+)':\n(?P<why>(?:      .*\n?)+)")
"""What the parser says where the class of an option is there and refuses to be made."""
REASONS = re.compile(
    r"(?:Parser key \"[^\"]+\":\s+)*(?:Option '[^']+' is not accepted[^\n]*|'[^'\n]*' is no list; [^\n]+|"
    r"Problem with given class_path [^\n]+\n?[^\n]*|the following arguments are required: [^\n]+|"
    r"Expected a dot import path string: [^\n]+|\w+ is '[^']*'; expected one of [^\n]+)|"
    r"(?:Parser key \"[^\"]+\":\s+)+(?:Expected [^\n]+|[^\n]+; expected [^\n]+)"
)
WORDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
    "bool": "true or false",
    "list": "a list",
    "dict": "a mapping",
    "NoneType": "null",
}
"""What a user would call the types of options."""
OF_TYPE = re.compile(r"Expected a (?:<class '(?P<type>\w+)'>|typing\.Literal\[(?P<values>[^\]]*)\])")
ONE_TYPE = re.compile(OF_TYPE.pattern + r"\. Got value: (?P<value>.*)", re.DOTALL)
SEVERAL_TYPES = re.compile(
    r"\s*Does not validate against any of the Union subtypes\n.*?  Errors:\n(?P<errors>.*)"
    r"  Given value type: [^\n]*\n  Given value: (?P<value>.*)",
    re.DOTALL,
)
INSIDE = re.compile(r"\":\s+Parser key \"")
UNKNOWN = re.compile(r"(?:Option|Group '([^']+)' does not accept option) '([^']+)'(?: is not accepted)?")
NO_LIST = re.compile(
    r"(Parser key \"[^\"]+\":\s+)(?:Does not .*Errors:\s+- )?Expected a <class 'list'>"
    r"(?:\s+- Expected a <class 'NoneType'>\s.*Given value: |\. Got value: )([^\n{}\[\]]+)"
    r"(?:\s+- Expected a <class 'NoneType'>\s.*)?",
    re.DOTALL,
)


def _reason(message: str) -> str:
    """The option that is wrong, where a message goes through every type that a key could have had."""
    if single := NO_LIST.fullmatch(message):
        return f"{single[1]}'{single[2]}' is no list; expected '[{single[2]}]'"
    key, _, tried = message.partition(":\n")
    if plain := _in_words(tried.strip()):
        return f"{key}: {plain}"
    found = REASONS.search(tried)
    return INSIDE.sub(".", message if found is None else f"{key}: {found[0]}")


def _in_words(tried: str) -> str | None:
    """What is expected in place of a value that has none of some plain types; nothing where other types could be."""
    if one := ONE_TYPE.fullmatch(tried):
        types, value = [one], one["value"]
    elif several := SEVERAL_TYPES.fullmatch(tried):
        errors = [error.strip() for error in several["errors"].split("    - ")[1:]]
        found, value = [OF_TYPE.fullmatch(error) for error in errors], several["value"]
        # A class beside a number, such as a tensor, is nothing that a command line or a file can give.
        types = [each for each in found if each is not None]
        classes = [error for error, each in zip(errors, found, strict=True) if each is None]
        if not all(error.startswith("Expected a dot import path string") for error in classes):
            return None
        if classes and not any(each["type"] in ("int", "float") for each in types):
            return None
    else:
        return None
    names = [_word(each) for each in types]
    said = value if set(value) & set("'\"[]{}") else f"'{value}'"
    return None if None in names else f"{said}; expected {' or '.join(filter(None, names))}"


def _word(found: re.Match[str]) -> str | None:
    if found["values"] is not None:
        return f"one of {found['values'].replace(chr(39), '')}"
    return WORDS.get(found["type"])


def _kinds(action: Any) -> tuple[Any, ...]:
    """The base classes that an option for help is about; none for other options."""
    return getattr(action, "_help_types", ())


def _apart(argument: str) -> list[str]:
    """``--method.help=Ties`` as two arguments, others as they are."""
    flag, equals, value = argument.partition("=")
    return [flag, value] if equals and flag.endswith(".help") else [argument]


def _named(name: str, kinds: Sequence[Any], option: str) -> type:
    """The class of a name, or of the path that a class of a user's own is imported from.

    Raises:
        InputError: there is none.
    """
    names, why = choices(kinds), ""
    found: Any = names.get(name)
    if "." in name:
        module, _, own = name.rpartition(".")
        try:
            found = getattr(import_module(module), own)
        except (ImportError, AttributeError, ValueError) as error:
            why = f" ({one_line(error)})"
    if not (isinstance(found, type) and issubclass(found, tuple(kind for kind in kinds if isinstance(kind, type)))):
        raise InputError(f"{option.lstrip('-')} is {name!r}{why}; expected one of {', '.join(names)}")
    return found


def _holds(settings: Any, keys: Sequence[str]) -> bool:
    """Whether nested settings have a key."""
    for key in keys:
        if not isinstance(settings, dict) or key not in settings:
            return False
        settings = settings[key]
    return True


class OneLineErrors(ArgumentParser):
    """An argument parser that raises :class:`InputError` where the original prints its usage and exits."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the message as one line."""
        unknown = NO_CLASS.match(message)
        if unknown and (names := self._names(unknown[1].partition("[")[0].rpartition(".")[2], message)):
            message = f"{unknown[1]} is {unknown[2].strip()!r}; expected one of {', '.join(names)}"
        raise InputError(" ".join(self._unknown(_reason(message)).split()))

    def _unknown(self, message: str) -> str:
        """An option that there is not, down to its first unknown part, with those that there are in its place."""
        found = UNKNOWN.fullmatch(message)
        if found is None:
            return message
        given = ".".join(filter(None, found.groups())).split(".")
        keys = [action.dest.split(".") for action in self._actions if not isinstance(action, ConfigFile)]
        depth = 0
        while depth < len(given) - 1 and any(key[: depth + 1] == given[: depth + 1] for key in keys):
            depth += 1
        beside = dict.fromkeys(key[depth] for key in keys if key[:depth] == given[:depth] and len(key) > depth)
        names = [name for name in beside if name not in ("help", "print_config", "print_shtab")]
        expected = f"one of {', '.join(names)}" if names else "none, as there are no options"
        where = next((f"{name}: " for name, text in files_of(self) if _holds(text, given[: depth + 1])), "")
        return f"{where}Option '{'.'.join(given[: depth + 1])}' is not accepted; expected {expected}"

    def _check_value_key(self, action: Any, value: Any, key: str, *args: Any, **kwargs: Any) -> Any:
        """Check a value; what is wrong with an item of a list is told with its number and its name."""
        check = super()._check_value_key
        try:
            return check(action, value, key, *args, **kwargs)
        except TypeError as error:
            for end in range(len(value) + 1) if isinstance(value, list) else ():
                try:
                    check(action, value[:end], key, *args, **kwargs)
                except TypeError:
                    if not end:
                        break
                    item = value[end - 1]
                    name = item.get("name") if hasattr(item, "get") else None
                    place = f"{action.dest}[{end - 1}]" + (f" ({name})" if name else "")
                    raise TypeError(str(error).replace(f'"{action.dest}', f'"{place}', 1)) from error
            raise

    def _names(self, key: str, message: str) -> list[str]:
        """Names that an option may have, by the base classes in a message, or else by the option's own."""
        kinds = set(re.findall(r"<class '(src\.[\w.]+)'>", message))
        known = [kind for action in self._actions for kind in _kinds(action)]
        own = [kind for action in self._actions if action.dest == f"{key}.help" for kind in _kinds(action)]
        return list(choices([kind for kind in known if f"{kind.__module__}.{kind.__qualname__}" in kinds] or own))

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """Parse; a flag of type bool alone is true: ``--dry_run`` is ``--dry_run true``."""
        for action in self._actions:
            if getattr(action, "_typehint", None) is bool:
                action.nargs, action.const = "?", True
        given = list((args[0] if args else None) or [])
        self._explain([part for argument in given for part in _apart(argument)])
        return super().parse_args(*([after_empty(given), *args[1:]] if given else args), **kwargs)

    def _explain(self, arguments: list[str]) -> None:
        """Print what is asked for by ``--OPTION.help NAME`` and end, where the option takes classes of this project.

        Raises:
            InputError: there is no such name.
        """
        for action in self._actions:
            kinds = _kinds(action)
            flag = next((flag for flag in action.option_strings if flag in arguments), None)
            if flag is None or action.nargs == 0 or not choices(kinds):
                continue
            option, given = flag.removesuffix(".help"), arguments[arguments.index(flag) + 1 :]
            name = given[0] if given and not given[0].startswith("--") else None
            if name is None:
                text = f"usage: {self.prog} {option} NAME …\n\n{overview(kinds)}\n\noptions of one: {flag} NAME\n"
            else:
                text = self._page(option, name, _named(name, kinds, option), given[1:])
            sys.stdout.write(text)
            self.exit()

    def _page(self, option: str, name: str, cls: type, more: list[str]) -> str:
        """The page of one class; ``more`` may ask for that of a class that one of its own options names."""
        inner = type(self)(prog=f"{self.prog} {option} {name}", usage=SUPPRESS, add_help=False)
        inner.add_class_arguments(cls, option.lstrip("-"))
        remove_actions(inner, (_ActionConfigLoad,))
        inner._explain(more)
        for group in inner._action_groups:
            group.title = "options" if group._group_actions else None
        return page(inner.prog, option, cls, inner.format_help())

    def instantiate(self, *args: Any, **kwargs: Any) -> Any:
        """Make the classes of a configuration; what makes one refuse its settings is not lost among other types."""
        try:
            return super().instantiate(*args, **kwargs)
        except ValueError as error:
            raise _of_the_user(error) from None


def run_function(
    function: Callable[..., None],
    name: str,
    summary: str,
    arguments: list[str],
    parser_class: type[OneLineErrors] = OneLineErrors,
) -> None:
    """Parse a function's keyword arguments from flags and YAML, then call it."""
    parser = parser_class(prog=f"python -m src {name}", description=summary)
    parser.add_argument("--config", action=ConfigFile, help="YAML file with any of the options below")
    parser.add_function_arguments(function, fail_untyped=True)
    config: Any = parser.parse_args(arguments)
    config.pop("config", None)
    ready = parser.instantiate(config)
    given = ready.as_dict() if hasattr(ready, "as_dict") else vars(ready)
    function(**{name: _at_home(value) for name, value in given.items()})


def _at_home(value: Any) -> Any:
    """A path, or a list of them, with the user's home for ``~``, which a shell leaves alone in quotes and in YAML."""
    if isinstance(value, list):
        return [_at_home(one) for one in value]
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value


def _of_the_user(error: BaseException) -> BaseException:
    """The input error that made a class refuse its settings; the parser wraps it where the class is optional.

    Where a class that an option names could not be made at all, the parser tells of every type that the option has.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, InputError):
        cause = cause.__cause__
    if cause is None and (found := UNMADE.search(str(error))):
        return InputError(f"{found['name']}: {' '.join(found['why'].split())}")
    return cause or error
