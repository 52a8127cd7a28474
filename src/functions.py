"""The commands that need no Trainer: typed functions, parsed by jsonargparse.

Each imports what it runs once it is chosen: Lightning, torchmetrics and transformers take most of a start.
"""

import json
from pathlib import Path

from src.cli import COMMANDS
from src.errors import InputError
from src.parsing import run_function


def merge(arguments: list[str]) -> None:
    """Run ``python -m src merge``."""
    from src.merge import registry  # noqa: F401 - the subclasses of MergeMethod are the registry
    from src.merge.stage import merge as merge_adapters

    run_function(merge_adapters, "merge", COMMANDS["merge"], arguments)


def inspect(arguments: list[str]) -> None:
    """Run ``python -m src inspect``: adapters may be given without their flag."""
    from src.merge.inspect_stage import inspect_stage

    named = next((i for i, argument in enumerate(arguments) if argument.startswith("-")), len(arguments))
    given = [f"--adapters={json.dumps(arguments[:named])}"] if named else []
    run_function(inspect_stage, "inspect", COMMANDS["inspect"], [*given, *arguments[named:]])


def report(arguments: list[str]) -> None:
    """Run ``python -m src report``: of a study's folder named without a flag, or of an evaluation.

    Raises:
        InputError: options stand beside a study's folder.
    """
    from src.report.html import SOURCE
    from src.report.html import write_report as write_study_report
    from src.report.stage import report as write_report

    front = 2 if arguments[:1] == ["--config"] else 0
    if len(arguments) > front and not arguments[front].startswith("-"):
        folder, others = Path(arguments[front]), [*arguments[:front], *arguments[front + 1 :]]
        if (folder / SOURCE).is_file() and not {"--help", "-h"} & set(others):
            if others:
                raise InputError(
                    f"report {folder}: {others[0]} is for evaluations; expected a study's folder alone, where its page "
                    "is written"
                )
            write_study_report(folder)
            return
        arguments = [*others, "--results", str(folder)]  # last, so that it holds whatever a configuration names
    run_function(write_report, "report", COMMANDS["report"], arguments)


def judge(arguments: list[str]) -> None:
    """Run ``python -m src judge``."""
    from src.judges import registry  # noqa: F401 - the subclasses of Judge are the registry
    from src.judges.stage import judge as judge_answers

    run_function(judge_answers, "judge", COMMANDS["judge"], arguments)


def experiment(arguments: list[str]) -> None:
    """Run ``python -m src experiment``."""
    from src.experiments.stage import experiment as compute_study
    from src.single_values import StudyParser

    run_function(compute_study, "experiment", COMMANDS["experiment"], arguments, StudyParser)
