"""Runs commands in forks of one warm process, as ranks or killed (SIGKILL): ``python -m tests.forked``.

A process of its own, so that it can fork: what takes long, imports, is done once. It serves
:func:`tests.commands.run_processes`. A line of JSON on standard input asks for a command: its ``arguments``, how many
``ranks`` it has (None for a process that is none), the ``folder`` for what they write, and perhaps a call in place of
which they ``kill`` themselves (``module:object.function`` and how many calls are let through). A line on standard
output answers with their exit codes, a signal as its negative.
"""

import importlib
import json
import os
import signal
import socket
import sys
import time
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


def forked(arguments, errors, environment, kill):
    """The number of a process that runs a command; what it writes goes to a file."""
    child = os.fork()
    if child:
        return child
    with open(errors, "w") as handle:
        os.dup2(handle.fileno(), 2)
        os.dup2(handle.fileno(), 1)
    try:
        os.environ |= environment
        if kill is not None:
            kill_at(*kill)
        from src.cli import main

        os._exit(main(arguments))
    finally:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(99)


def run(arguments, folder, ranks, kill):
    """Exit codes of the processes of one run, each of which writes to ``folder/rankR``."""
    places = [{}]
    if ranks is not None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        places = [address | {"LOCAL_RANK": str(rank)} for rank in range(ranks)]
    children = [forked(arguments, folder / f"rank{rank}", place, kill) for rank, place in enumerate(places)]
    running, codes, patience = set(children), {}, None
    while running:
        time.sleep(0.02)
        for child in list(running):
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                running.remove(child)
                codes[child] = os.waitstatus_to_exitcode(status)
                patience = patience or time.monotonic() + 60 if codes[child] else patience
        if patience and time.monotonic() > patience:  # one has failed, and the others wait for it
            for child in running:
                os.kill(child, signal.SIGKILL)
    return [codes[child] for child in children]


def serve():
    answers, requests = os.fdopen(os.dup(1), "w"), os.fdopen(os.dup(0))
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    for line in iter(requests.readline, ""):
        asked = json.loads(line)
        codes = run(asked["arguments"], Path(asked["folder"]), asked["ranks"], asked["kill"])
        print(json.dumps(codes), file=answers, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    from src import functions, training  # noqa: F401 - imported before any fork

    serve()
