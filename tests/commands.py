"""Command lines on the tiny model, and their run in processes of their own."""

import os
import subprocess
import sys
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


def run_processes(arguments, code=0):
    """Run a command in its own interpreter: Lightning's launcher starts the other process from ``sys.argv``.

    Returns what it wrote to standard error.
    """
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PL_", "LOCAL_", "NODE_", "WORLD_", "MASTER_"))}
    command = [sys.executable, "-m", "src", *arguments]
    found = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
        check=False,
        env=clean | {"OMP_NUM_THREADS": "1"},
    )
    assert found.returncode == code, found.stderr[-3000:]
    return found.stderr
