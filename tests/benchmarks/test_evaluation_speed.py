"""Multiple choice against lm-evaluation-harness and generation against ``transformers.generate``, in one run.

Prints seconds, rows per second and differences; asserts that choices and texts agree, never on time. The harness lives
in an environment of its own (``make oracles-lm-eval``); rows of ``../shared/data`` are not part of the project.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from src.cli import main
from src.data.batches import EncodedRows
from src.data.chat import Encoder
from src.data.schedule import budget_batches
from src.data.sources import load_rows
from src.models.base import BaseSpec, _location, load_model, load_tokenizer
from src.models.generation import greedy, left_padded_prompts
from src.models.products import fast_products
from src.models.speed import choose_matmul
from tests.evaluations import answers, flags, read_rows, write_jsonl

ROOT = Path(__file__).resolve().parents[2]
HARNESS = ROOT / ".oracles" / "lm-eval" / "bin" / "python"
EVAL = ROOT.parent / "shared" / "data" / "eval"
QUESTIONS = int(os.environ.get("BENCH_QUESTIONS", "1140"))
"""Questions of MMLU to use; the rows lie by subject, so a smaller number takes whole subjects."""
BATCH = os.environ.get("BENCH_BATCH", "8")
PEER_DTYPE = os.environ.get("BENCH_PEER_DTYPE", "float32")
"""Number format of lm-evaluation-harness; its choices are the reference in float32 only."""

needs_rows = pytest.mark.skipif(not EVAL.is_dir(), reason="the research data set ../shared/data is not here")


def rows_of(name):
    return read_rows(EVAL / name)


def harness(rows, few, shots):
    model, _ = _location(BaseSpec())
    command = [HARNESS, ROOT / "tests/benchmarks/lm_eval_mmlu.py", model, rows, few, shots, BATCH, PEER_DTYPE]
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    found = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, env=offline)
    assert "RESULT " in found.stdout, found.stderr[-3000:]
    return json.loads(found.stdout.rpartition("RESULT ")[2])


@needs_rows
@pytest.mark.skipif(not HARNESS.exists(), reason="lm-evaluation-harness is not here (make oracles-lm-eval)")
@pytest.mark.parametrize("shots", [0, 5])
def test_mmlu_choices_equal_those_of_lm_eval(tmp_path, shots, monkeypatch):
    """In float32 products alone (1e-5), and where they may round (5e-3): then close choices are settled in float32."""
    from src.models.evaluation import EvaluationModule

    seconds = []
    original = EvaluationModule._computed

    def timed(self, batch, suite, *, score):
        started = time.perf_counter()
        found = original(self, batch, suite, score=score)
        seconds.append(time.perf_counter() - started)
        return found

    monkeypatch.setattr(EvaluationModule, "_computed", timed)
    rows = write_jsonl(tmp_path / "rows.jsonl", rows_of("mc_mmlu.jsonl")[:QUESTIONS])
    few = write_jsonl(tmp_path / "few.jsonl", rows_of("mc_mmlu_dev_fewshot.jsonl"))
    theirs = harness(rows, few, shots)
    suite = {"name": "mmlu", "kind": "choice", "rows": str(rows)}
    suite |= {"few_shot": str(few), "shots": shots} if shots else {}
    count, differing = len(theirs["scores"]), []
    sys.stdout.write(
        f"\nMMLU {shots}-shot, {count} questions: lm-eval ({PEER_DTYPE}, batch {BATCH}) {theirs['seconds']:.1f} s = "
        f"{count / theirs['seconds']:.2f}/s\n"
    )
    for error in ("1e-5", "5e-3"):
        seconds.clear()
        given = flags(BaseSpec().name, tmp_path, [suite], tmp_path / error, batch_size=64, max_tokens=8192)
        given[given.index("float64")] = "float32"
        started = time.perf_counter()
        assert main([*given, "--model.max_matmul_error", error]) == 0
        whole = time.perf_counter() - started
        different, ties, exact, gap = [], 0, 0, 0.0
        for record in answers(tmp_path / error, "mmlu"):
            scores = theirs["scores"][record["id"]]
            ties += len(set(scores)) < len(scores) and scores.count(max(scores)) > 1
            furthest = max(abs(a - b) for a, b in zip(scores, record["scores"], strict=True))
            exact, gap = exact + (furthest < 1e-3), max(gap, furthest)
            if max(range(4), key=lambda i: scores[i]) != record["choice"]:
                different.append((record["id"], scores, record["scores"]))
        sys.stdout.write(
            f"  here, products within {error}: {sum(seconds):.1f} s = {count / sum(seconds):.2f}/s "
            f"({theirs['seconds'] / sum(seconds):.1f} x; {whole:.1f} s with start and tokens); {len(different)} "
            f"choices differ, {ties} exact ties; log-likelihoods within 1e-3 on {exact} questions, {gap:.1e} at most\n"
        )
        differing += different
    assert not differing or PEER_DTYPE != "float32"


def generated(model, batch, stops, pad):
    """The peer: texts of one batch as given, cut at their first stop token."""
    ids, mask = left_padded_prompts(batch, pad)
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=64, do_sample=False, eos_token_id=stops, pad_token_id=pad
    )
    rows = out[:, ids.shape[1] :].tolist()
    return [row[: min([row.index(s) for s in stops if s in row], default=len(row))] for row in rows]


@needs_rows
def test_generation_equals_transformers_generate():
    model, tokenizer = load_model(BaseSpec()), load_tokenizer(BaseSpec())
    encoder = Encoder(tokenizer, max_length=1024)
    count = int(os.environ.get("BENCH_PROMPTS", "200"))
    names = ("gen_instruct.jsonl", "overrefusal_xstest_safe.jsonl")
    rows = [row for name in names for row in load_rows(str(EVAL / name), need_response=False)[: count // 2]]
    encoded = [encoder.encode(type(row)(row.id, row.prompt)) for row in rows]
    whole, pad, stops = EncodedRows(encoded, tokenizer.pad_token_id), tokenizer.pad_token_id, encoder.stop_ids
    size = 16
    given = [list(range(first, min(first + size, len(encoded)))) for first in range(0, len(encoded), size)]
    units, lengths = [(i,) for i in range(len(encoded))], [len(e.ids) + 64 for e in encoded]
    batches = budget_batches(units, lengths, beginning=0, max_rows=256, max_tokens=16384)
    theirs, ours, seconds = {}, {}, [0.0, 0.0]
    # Turn by turn: a neighbour on this machine, or a pause, then slows both.
    turns = sorted(
        [(i / len(given), 0, rows) for i, rows in enumerate(given)]
        + [(i / len(batches), 1, rows) for i, rows in enumerate(batches)]
    )
    # As the evaluation chooses it; the peer runs as torch comes.
    mode = choose_matmul("auto", model, max_error=1e-5, rows=64)
    torch.set_float32_matmul_precision("highest")
    with torch.inference_mode():
        for _, which, indices in turns:
            batch = whole[(indices, 1.0)]
            started = time.process_time()
            if which:
                with fast_products(model, mode):
                    found = greedy(model, batch, max_new_tokens=64, stop_ids=stops, pad_id=pad)
                ours |= dict(zip(indices, found, strict=True))
            else:
                theirs |= dict(zip(indices, generated(model, batch, stops, pad), strict=True))
            seconds[which] += time.process_time() - started
    different = [i for i, text in theirs.items() if text != ours[i]]
    sys.stdout.write(
        f"\ngeneration of 64 tokens, {len(encoded)} prompts, mode {mode}, CPU time: generate (batches of {size}) "
        f"{seconds[0]:.1f} s, here {seconds[1]:.1f} s ({seconds[0] / seconds[1]:.2f} x); "
        f"{len(different)} texts differ\n"
    )
    # In float32 a near-tie may break the other way in another batch.
    assert len(different) <= len(encoded) * 0.05


def evaluated(tmp_path, name, rows, hardware):
    """Seconds of one ``test`` command with a thread per process, and its answers by suite."""
    suites = [
        {"name": "safe", "kind": "borderline", "rows": str(rows["safe"]), "max_new_tokens": 32},
        {"name": "mmlu", "kind": "choice", "rows": str(rows["mmlu"])},
    ]
    given = flags(BaseSpec().name, tmp_path, suites, tmp_path / name, hardware=hardware, batch_size=16)
    given[given.index("float64")] = "float32"
    command = [sys.executable, "-m", "src", *given]
    started = time.perf_counter()
    found = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    seconds = time.perf_counter() - started
    assert found.returncode == 0, found.stderr[-3000:]
    return seconds, {suite["name"]: answers(tmp_path / name, suite["name"]) for suite in suites}


@needs_rows
def test_two_processes_against_one(tmp_path):
    """Each process has one thread; the time of the same command on two rows (start, load, tokens) is taken off."""
    count = int(os.environ.get("BENCH_PROMPTS", "200"))
    names = {"safe": "overrefusal_xstest_safe.jsonl", "mmlu": "mc_mmlu.jsonl"}
    rows, few = (
        {key: write_jsonl(tmp_path / f"{key}{n}.jsonl", rows_of(name)[:n]) for key, name in names.items()}
        for n in (count, 2)
    )
    seconds, given = {}, {}
    for processes, hardware in ((1, "cpu.yaml"), (2, "ddp_sim.yaml")):
        empty, _ = evaluated(tmp_path, f"few{processes}", few, hardware)
        whole, given[processes] = evaluated(tmp_path, f"all{processes}", rows, hardware)
        seconds[processes] = (whole - empty, whole)
    assert given[1] == given[2]
    sys.stdout.write(
        f"\ntest of {count} prompts and {count} questions, one thread per process: one process {seconds[1][0]:.1f} s, "
        f"two {seconds[2][0]:.1f} s ({seconds[1][0] / seconds[2][0]:.2f} x; with start and load {seconds[1][1]:.1f} "
        f"and {seconds[2][1]:.1f} s); all {sum(map(len, given[1].values()))} rows identical\n"
    )
