"""Runs commands in forks of one warm process, killed (SIGKILL) or as ranks: ``python -m tests.forked JOBS ANSWER``.

A process of its own, so that it can fork: what takes long, imports, is done once, by a run that is left alone. A job is
a command's ``arguments``, in which OUT stands for the directory of a run:

* ``whole``: the run that is left alone;
* for each of its ``kills``, by number: a run that kills itself at a call (``module:object.function`` and how many calls
  are let through), and the same command again. The answer is the signal that ended the first, the exit code of the
  second, and what that wrote to standard error;
* ``ranks``: with ``sharded`` arguments besides, two processes of one run.
"""

import importlib
import json
import os
import signal
import socket
import sys
import traceback
from functools import reduce
from pathlib import Path

import torch


def kill_at(point, calls):
    """Let so many calls of a function through, and end the process in place of the next."""
    module, _, path = point.partition(":")
    *owners, name = path.split(".")
    owner = reduce(getattr, owners, importlib.import_module(module))
    original, seen = getattr(owner, name), []

    def counted(*args, **kwargs):
        seen.append(None)
        if len(seen) > calls:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, counted)


def forked(arguments, errors, kill=None, environment=None):
    """The number of a process that runs a command; what it writes goes to a file."""
    child = os.fork()
    if child:
        return child
    with open(errors, "w") as handle:
        os.dup2(handle.fileno(), 2)
        os.dup2(handle.fileno(), 1)
    try:
        os.environ |= environment or {}
        if kill is not None:
            kill_at(*kill)
        os._exit(run_command(arguments))
    finally:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(99)


def run_command(arguments):
    from src.cli import main

    return main(arguments)


def ended(*children):
    """Exit codes of processes, a signal as its negative."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def run(job, folder):
    def arguments(place):
        return [text.replace("OUT", str(folder / place)) for text in job["arguments"]]

    if run_command(arguments("whole")) != 0:
        raise SystemExit("the run that is left alone failed")
    found = []
    for number, kill in enumerate(job.get("kills", [])):
        again = folder / f"{number}.errors"
        (first,) = ended(forked(arguments(str(number)), folder / f"{number}.killed", kill))
        (second,) = ended(forked(arguments(str(number)), again))
        found.append([-first, second, " ".join(again.read_text().split())])
    if "sharded" in job:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        given, ranks = [*arguments("ranks"), *job["sharded"]], (0, 1)
        parts = [forked(given, folder / f"rank{r}", environment=address | {"LOCAL_RANK": str(r)}) for r in ranks]
        found.append([*ended(*parts), *((folder / f"rank{r}").read_text()[-2000:] for r in ranks)])
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    from src import training  # noqa: F401 - imported before any fork

    answers = []
    for position, each in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        place = Path(sys.argv[1]).parent / str(position)
        place.mkdir()
        answers.append(run(each, place))
    Path(sys.argv[2]).write_text(json.dumps(answers))
