"""Command lines on the tiny model, and their run in processes of their own or in forks of a warm one."""

import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from src.cli import main

ROOT = Path(__file__).resolve().parents[1]


def base_flags(base, hardware="cpu.yaml"):
    quiet = ["--trainer", hardware, "--trainer.enable_progress_bar", "false"]
    return ["--model.base.name", str(base), "--model.base.dtype", "float64", *quiet]


def fit_flags(base, rows, output, *more, hardware="cpu.yaml"):
    data = ["--data.train", str(rows["task"]), "--data.val", str(rows["val"]), "--data.batch_size", "3"]
    lora = ["--model.lora.rank", "2", "--model.optimizer.lr", "0.01", "--trainer.max_epochs", "3"]
    flags = [*base_flags(base, hardware), *data, *lora, "--output", str(output)]
    return ["fit", "--config", "expert.yaml", *flags, *more]


def fisher_flags(base, adapters, rows, output, *more, hardware="cpu.yaml"):
    models = ["--model.utility", str(adapters["utility"]), "--model.safety", str(adapters["safety"])]
    data = ["--data.safety", str(rows["harmful"]), "--data.utility", f"[{rows['benign']},{rows['task']}]"]
    flags = [*base_flags(base, hardware), *models, *data, "--data.batch_size", "2", "--output", str(output)]
    return ["fisher", "--config", "fisher.yaml", *flags, *more]


def measured_once(root, base, adapters, rows):
    """A function that measures Fisher files into ``root/NAME`` by flags, each name once, and returns the directory."""
    made = {}

    def measure(name, *flags):
        if name not in made:
            made[name] = root / name
            assert main(fisher_flags(base, adapters, rows, made[name], *flags)) == 0
        return made[name]

    return measure


def clean_environment():
    """This process's environment without what makes it a rank of another run, with a thread for each process."""
    others = ("PL_", "LOCAL_", "NODE_", "WORLD_", "MASTER_")
    return {k: v for k, v in os.environ.items() if not k.startswith(others)} | {"OMP_NUM_THREADS": "1"}


def launch(arguments, code=0):
    """Run a command in its own interpreter: Lightning's launcher starts the other process from ``sys.argv``.

    Returns what it wrote to standard error.
    """
    command = [sys.executable, "-m", "src", *arguments]
    options = {"capture_output": True, "text": True, "cwd": ROOT, "env": clean_environment()}
    found = subprocess.run(command, timeout=300, check=False, **options)
    assert found.returncode == code, found.stderr[-3000:]
    return found.stderr


@cache
def server():
    """The warm process of :mod:`tests.forked`: to import everything takes longer than most runs."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "-W", "ignore", "-m", "tests.forked"]
    process = subprocess.Popen(command, cwd=ROOT, env=clean_environment(), **pipes)
    atexit.register(process.communicate)
    return process


def run_processes(arguments, code=0, ranks=2, kill=None):
    """Run a command as the ranks of one run, which a launcher has started, and compare the exit code of each.

    With None for ranks it is a process on its own. ``kill`` is a call in place of which it kills itself
    (:func:`tests.forked.kill_at`). Returns what they wrote.
    """
    process = server()
    with tempfile.TemporaryDirectory() as folder:
        asked = {"arguments": list(map(str, arguments)), "ranks": ranks, "folder": folder, "kill": kill}
        print(json.dumps(asked), file=process.stdin, flush=True)
        answer = process.stdout.readline()
        assert answer, "the server of tests.forked has ended"
        written = [(Path(folder) / f"rank{rank}").read_text() for rank in range(ranks or 1)]
    code = -signal.SIGKILL if kill else code
    assert json.loads(answer) == [code] * (ranks or 1), "\n".join(text[-3000:] for text in written)
    return "".join(written)
