"""Small evaluations of the tiny model: rows of every kind, a configuration, and a run in this process or in several."""

import json

import yaml

from src.cli import main
from tests.tiny import write_rows

PASSES = {
    "task_id": "T/0",
    "prompt": "def one():\n",
    "canonical_solution": "    return 1\n",
    "test": "def check(f):\n    assert f() == 1\n",
    "entry_point": "one",
}


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_rows(path):
    """Rows of a JSONL file; only a new line ends one (str.splitlines would split at others too)."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def choice_rows(count, subjects=("tiny_things", "big_things"), start=0):
    return [
        {
            "id": f"c/{i}",
            "question": f"What is {i} plus {i}?" + " really" * (i % 3),
            "choices": [str(2 * i), str(2 * i + 1), f"about {i}", "none of them"],
            "answer": i % 4,
            "subject": subjects[i % len(subjects)],
        }
        for i in range(start, start + count)
    ]


def suites_of_every_kind(folder):
    """A choice suite with examples and one of texts, code, a judged jailbreak suite, a suite of one row."""
    mc, few = (
        write_jsonl(folder / "mc.jsonl", choice_rows(9)),
        write_jsonl(folder / "few.jsonl", choice_rows(6, start=50)),
    )
    code = write_jsonl(
        folder / "code.jsonl", [PASSES, PASSES | {"task_id": "T/1", "test": "def check(f):\n    f() + x\n"}]
    )
    attack = write_rows(folder / "attack.jsonl", 7, what="attack")
    one = write_rows(folder / "one.jsonl", 1, what="one")
    refusal = {"class_path": "src.judges.refusal.Refusal", "init_args": {"phrases": "gcg"}}
    return [
        {"name": "mmlu", "kind": "choice", "rows": str(mc), "few_shot": str(few), "shots": 2},
        {"name": "arc", "kind": "choice", "rows": str(mc), "style": "question"},
        {
            "name": "code",
            "kind": "code",
            "rows": str(code),
            "max_new_tokens": 5,
            "template": "raw",
            "samples": 3,
            "temperature": 1.0,
            "k": [1, 2],
        },
        {
            "name": "attack",
            "kind": "jailbreak",
            "rows": str(attack),
            "max_new_tokens": 6,
            "judge": refusal,
            "collapse_nll": 5.0,
        },
        {"name": "one", "kind": "utility", "rows": str(one), "max_new_tokens": 3, "rouge": True},
    ]


def flags(base, folder, suites, output, *more, hardware="cpu.yaml", **data):
    config = folder / "suites.yaml"
    config.write_text(yaml.safe_dump({"data": {"suites": suites, "batch_size": 4} | data}))
    quiet = ["--trainer", hardware, "--trainer.enable_progress_bar", "false"]
    model = ["--model.base.name", str(base), "--model.base.dtype", "float64"]
    return ["test", "--config", str(config), *model, *quiet, "--output", str(output), *more]


def evaluate(base, folder, suites, *more, output="out", **data):
    """Run an evaluation; returns the suites' numbers of the first model."""
    assert main(flags(base, folder, suites, folder / output, *more, **data)) == 0
    return metrics(folder / output)[0]["suites"]


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text())["models"]


def answers(folder, suite, model="base"):
    return read_rows(folder / "answers" / model / f"{suite}.jsonl")
