"""Run by the interpreter of ``.oracles/lm-eval``: MMLU by lm-evaluation-harness on local rows, as JSON on stdout.

Arguments: model directory, rows, few-shot rows, shots, batch size, number format. The task is the harness's own
template; only where its rows come from is changed.
"""

import json
import logging
import sys
import tempfile
import time
from pathlib import Path

import yaml
from lm_eval import evaluator, tasks
from lm_eval.models.huggingface import HFLM

logging.disable(logging.WARNING)
TEMPLATE = Path(tasks.__file__).parent / "mmlu" / "default" / "_default_template_yaml"


def task(folder, subject, rows, few):
    files = {"test": folder / f"{subject}.test.jsonl", "dev": folder / f"{subject}.dev.jsonl"}
    for split, found in (("test", rows), ("dev", few)):
        files[split].write_text("".join(json.dumps(row) + "\n" for row in found if row["subject"] == subject))
    about = subject.replace("_", " ")
    return yaml.safe_load(TEMPLATE.read_text()) | {
        "task": f"local_{subject}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {split: str(path) for split, path in files.items()}},
        "description": f"The following are multiple choice questions (with answers) about {about}.\n\n",
    }


def main():
    model_dir, rows_path, few_path, shots, batch, dtype = sys.argv[1:]
    rows, few = (
        [json.loads(line) for line in Path(path).read_text().split("\n") if line] for path in (rows_path, few_path)
    )
    model = HFLM(pretrained=model_dir, device="cpu", dtype=dtype, batch_size=int(batch))
    subjects = list(dict.fromkeys(row["subject"] for row in rows))
    with tempfile.TemporaryDirectory() as folder:
        given = [task(Path(folder), subject, rows, few) for subject in subjects]
        started = time.perf_counter()
        found = evaluator.simple_evaluate(model, tasks=given, num_fewshot=int(shots), bootstrap_iters=0)
        seconds = time.perf_counter() - started
    scores = {}
    for samples in found["samples"].values():
        for sample in samples:
            scores[sample["doc"]["id"]] = [float(score) for score, _ in sample["filtered_resps"]]
    sys.stdout.write("\nRESULT " + json.dumps({"seconds": seconds, "scores": scores}) + "\n")


main()
