"""What users may write shorter: names of configurations, default configurations, options without their module's name.

Each function takes a command's arguments and gives them as the parser wants them.
"""

import json
from collections.abc import Sequence
from difflib import get_close_matches
from itertools import pairwise, takewhile
from pathlib import Path

from src.data.row_source import find_file
from src.errors import InputError
from src.files import PROJECT

DEFAULT_CONFIG = {
    "fit": "expert.yaml",
    "validate": "expert.yaml",
    "fisher": "fisher.yaml",
    "merge": "merge.yaml",
    "test": "test.yaml",
    "predict": "test.yaml",
    "judge": "judge.yaml",
    "report": "report.yaml",
}
FOLDERS = {"--config": "configs", "--trainer": "trainers"}


def long_names(arguments: Sequence[str]) -> list[str]:
    """``-c FILE`` as ``--config FILE``: what follows here knows the long name."""
    return [f"--config{one[2:]}" if one == "-c" or one.startswith("-c=") else one for one in arguments]


def resolve_names(arguments: Sequence[str]) -> list[str]:
    """Replace the file names after ``--config`` and ``--trainer`` by the paths where they are found.

    Raises:
        InputError: a named file is nowhere.
    """
    resolved: list[str] = []
    waiting: str | None = None
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if waiting is not None:
            resolved.append(_found(waiting, argument))
            waiting = None
        elif flag in FOLDERS and equals:
            resolved.append(f"{flag}={_found(flag, value)}")
        else:
            resolved.append(argument)
            waiting = argument if argument in FOLDERS else None
    return resolved


def name_in_help(arguments: Sequence[str]) -> list[str]:
    """``--method Ties --method.help`` as jsonargparse wants it, ``--method.help Ties``; other arguments as they are."""
    given: dict[str, str] = {}
    for argument, following in pairwise([*arguments, "--"]):
        flag, equals, value = argument.partition("=")
        given[flag] = value if equals else "" if following.startswith("--") else following
    for flag, value in given.items():
        named = value or given.get(flag.removesuffix(".help"))
        if flag.endswith(".help") and named:
            outer = flag.removesuffix(".help").rpartition(".")[0]
            if outer and given.get(outer):
                return [*name_in_help([f"{outer}.help", given[outer]]), flag, named]
            return list(arguments) if value else [flag, named]
    return list(arguments)


ALIASES = {f"--{name}": f"--model.{name}" for name in ("adapters", "allow_code_execution", "baseline")}
"""Options of ``test`` and ``predict`` that may be written without the module's name."""


def evaluation_options(arguments: Sequence[str]) -> list[str]:
    """``--adapters a b c`` as ``--model.adapters=["a", "b", "c"]``, and the other short form."""
    found: list[str] = []
    waiting = list(arguments)
    while waiting:
        flag, equals, value = waiting.pop(0).partition("=")
        option = ALIASES.get(flag, flag)
        if option not in ALIASES.values() or equals:
            found.append(f"{option}{equals}{value}")
            continue
        values = []
        while waiting and not waiting[0].startswith("--"):
            values.append(waiting.pop(0))
        if option == ALIASES["--allow_code_execution"]:
            values = values or ["true"]
        written = values[0] if len(values) == 1 else json.dumps(values)
        found.append(f"{option}={written}" if values else option)
    return found


def _found(flag: str, name: str) -> str:
    path = find_file(name, FOLDERS[flag])
    if path is None or not path.is_file():
        known = {file.stem for root in (Path(), PROJECT) for file in (root / FOLDERS[flag]).glob("*.yaml")}
        close = get_close_matches(Path(name).stem, sorted(known), n=1)
        raise InputError(
            f"{flag} {name}: no such file here or under {FOLDERS[flag]}/"
            + (f"; did you mean {close[0]}.yaml?" if close else "")
        )
    return str(path)


def with_default_config(command: str, arguments: list[str]) -> list[str]:
    """Put the command's default configuration in front where none is named.

    Merge's default is one merge of the demo's adapters: it is left out where ``--utility`` or ``--safety`` names other
    ones, so that no method, adapter or strength of the demo gets into them; report's where results are named, so that
    their tables do not replace the demo's.

    Raises:
        InputError: report is given several folders, or experiment no study.
    """
    flags = {argument.partition("=")[0] for argument in arguments}
    folders = list(takewhile(lambda one: not one.startswith("-"), arguments)) if command == "report" else []
    if len(folders) > 1:
        raise InputError(
            f"report {' '.join(folders)}: {len(folders)} folders; expected one, of a study or an evaluation"
        )
    own = {
        "merge": bool(flags & {"--utility", "--utility+", "--safety"}),
        "report": bool(folders) or "--results" in flags,
    }
    named = "--config" in flags or own.get(command, False)
    asks_help = any(argument in ("--help", "-h") or argument.endswith(".help") for argument in arguments)
    if command == "experiment" and not (named or asks_help or "--study" in flags or "--print_config" in flags):
        raise InputError(
            "experiment: no study; expected --config, such as comparison_demo.yaml (--dry_run lists its cells)"
        )
    if named or asks_help or "--print_config" in arguments or command not in DEFAULT_CONFIG:
        return arguments
    return ["--config", DEFAULT_CONFIG[command], *arguments]
