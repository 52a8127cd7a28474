"""Rows per second of a Fisher pass against per-example gradients, ``vmap(grad)``, curvlinops and a LoRA training step.

SmolLM2-135M, all linear layers, r = 8, in float32 or with ``BENCH_DTYPE=bfloat16`` in bfloat16 (without vmap and
curvlinops, which do not run there), the same rows and the same matrix-multiply mode for all, in one run. The peers'
scores must equal ours; times are printed, never asserted. curvlinops (``make oracles``) has no pass that gives the
matrix: its empirical Fisher is an operator, of which one product with one vector is measured.
"""

import os
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.func import functional_call, grad, vmap

from src.adapters.basis import core_basis
from src.data.batches import EncodedRows, LengthBatches
from src.data.chat import Encoder
from src.data.row_source import RowSource
from src.data.sources import load_rows
from src.fisher.lowrank_accumulator import LowRankAccumulator
from src.fisher.scores import ScoreRecorder
from src.fisher.shards import Shards
from src.models.base import BaseSpec, load_model, load_tokenizer
from src.models.fisher_jobs import backward_jobs
from src.models.fisher_pass import FisherPass
from src.models.fused_lora import fuse
from src.models.logits import answer_logits, answer_loss, answer_targets, leaf_embeddings
from src.models.speed import choose_matmul, keep_freed_memory
from tests.tiny import random_pairs

RESEARCH = Path("../shared/data/calib")
SOURCES = {
    "demo": [f"src/data/demo/{name}.calib.jsonl" for name in ("harmful", "task", "general", "borderline")],
    "research": [str(RESEARCH / f"{name}.jsonl") for name in ("refusal", "benign")],
}
ROWS, BATCH = int(os.environ.get("BENCH_ROWS", "64")), 8
DTYPE = os.environ.get("BENCH_DTYPE", "float32")
SPEC = BaseSpec(attention="eager", dtype=DTYPE)
CLOSE = 1e-3 if DTYPE == "float32" else 0.1
"""Largest relative distance of a peer's scores from ours."""


class Core(torch.nn.Module):
    """A linear layer with the core's coordinates as a parameter: ``W x + U C Vᵀ x``."""

    def __init__(self, layer, u, v):
        super().__init__()
        self.layer, self.weight_shape = layer, (u.shape[1], v.shape[1])
        self.register_buffer("u", u)
        self.register_buffer("v", v)
        self.core = torch.nn.Parameter(torch.zeros(*self.weight_shape, dtype=u.dtype))

    def forward(self, x):
        return self.layer(x) + ((x @ self.v) @ self.core.T) @ self.u.T


def with_cores(model, u, v):
    for name in u:
        parent, _, leaf = name.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, leaf, Core(getattr(owner, leaf), u[name].to(model.dtype), v[name].to(model.dtype)))
    return model


def clocked(work, repeats=3):
    """Seconds of the fastest of some runs."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        result = work()
        best = min(best, time.perf_counter() - start)
    return best, result


def load(rows):
    """Encoded rows of several kinds, and their batches as a pass makes them."""
    encoder = Encoder(load_tokenizer(SPEC), max_length=512)
    share = ROWS // len(SOURCES[rows])
    sources = [RowSource(path=path, limit=share, seed=0) for path in SOURCES[rows]]
    encoded = [encoder.encode(row) for row in load_rows(sources, need_response=True)]
    data = EncodedRows(encoded, encoder.tokenizer.pad_token_id)
    order = LengthBatches([len(row.ids) for row in encoded], BATCH, rank=0, world_size=1)
    return data, [data[key] for key in order]


def fisher_pass(model, basis, batches, count, folder, granularity="sequence"):
    """Scores (count or answer tokens, D), as the fisher command takes them."""
    recorder = ScoreRecorder(model, basis.u, basis.v)
    running = FisherPass(
        name="bench",
        rows=count,
        weights=dict.fromkeys(("sequence", "token"), torch.ones(count, dtype=torch.float64)),
        make=lambda: (LowRankAccumulator(basis.shapes), None),
        shards=Shards(folder, "bench"),
        rank=0,
        steps_per_shard=len(batches),
        finished=frozenset(),
    )
    for batch in batches:
        ids = [str(i) for i in batch.index.tolist()]
        options = {"labels": "data", "draws": 1, "granularity": granularity, "seed": 0}
        with recorder.recording(), leaf_embeddings(model) as leaves:
            for job in backward_jobs(running, batch, answer_logits(model, batch), ids, **options):
                running.fisher.begin(job.examples)
                recorder.sink = running.fisher.update
                torch.autograd.grad(job.total, leaves[0], retain_graph=granularity == "token")
                recorder.complete()
    return running.fisher.finish()


def training_steps(trained, batches):
    for batch in batches:
        answer_loss(answer_logits(trained, batch), answer_targets(batch)).backward()


def one_by_one(cored, cores, data):
    """Scores by autograd, batch 1."""
    found = []
    for i in range(len(data)):
        batch = data[([i], 1.0)]
        log_p = answer_logits(cored, batch).log_softmax(-1)
        total = log_p.gather(1, answer_targets(batch)[:, None]).sum()
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(total, list(cores.values()))]))
    return torch.stack(found)


def as_a_user_would(cored, cores, data):
    """The same loop with the model's own loss and torch's own precision."""
    torch.set_float32_matmul_precision("highest")
    found = []
    for i in range(len(data)):
        batch = data[([i], 1.0)]
        labels = batch.ids.masked_fill(~batch.answer_mask, -100)
        loss = cored(input_ids=batch.ids, labels=labels).loss
        loss.backward()
        found.append(torch.cat([core.grad.flatten() for core in cores.values()]) * -int((labels != -100).sum()))
        cored.zero_grad()
    return torch.stack(found)


def vectorised(cored, cores, batch):
    """Scores of one batch by ``vmap(grad)``."""
    labels = batch.ids[:, 1:].masked_fill(~batch.answer_mask[:, 1:], -100)

    def total(parameters, ids, own):
        logits = functional_call(cored, parameters, (ids[None],), {"use_cache": False}).logits[0, :-1]
        return -torch.nn.functional.cross_entropy(logits, own, ignore_index=-100, reduction="sum")

    found = vmap(grad(total), in_dims=(None, 0, 0))({k: p.detach() for k, p in cores.items()}, batch.ids, labels)
    return torch.cat([found[name].flatten(1) for name in cores], dim=1)


class AnswerLogits(torch.nn.Module):
    """A model that curvlinops can differentiate: (answer tokens, vocabulary) logits of the rows of one batch."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, data):
        return answer_logits(self.model, data["batch"])


def operator_product(cored, cores, batches, vector):
    """curvlinops' empirical Fisher, one term per answer token, times one vector: seconds and (D,) product."""
    from curvlinops import EFLinearOperator

    data = [({"batch": batch}, answer_targets(batch)) for batch in batches]
    operator = EFLinearOperator(
        AnswerLogits(cored),
        torch.nn.CrossEntropyLoss(reduction="sum"),
        list(cores.values()),
        data,
        num_data=sum(len(batch.index) for batch in batches),
        batch_size_fn=lambda x: len(x["batch"].index),
        check_deterministic=False,
    )
    return clocked(lambda: operator @ vector, repeats=1)


def distance(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rows", list(SOURCES))
def test_fisher_pass(rows, tmp_path):
    from peft import LoraConfig, get_peft_model

    if rows == "research" and not RESEARCH.is_dir():
        pytest.skip(f"{RESEARCH} is not here")
    keep_freed_memory()
    data, batches = load(rows)
    model = load_model(SPEC)
    mode = choose_matmul("auto", model, max_error=1e-5)
    basis = core_basis([random_pairs(model, 8, 1)])
    seconds = {}
    seconds["Fisher pass"], fisher = clocked(lambda: fisher_pass(model, basis, batches, len(data), tmp_path))
    scores = fisher.scores
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    trained = get_peft_model(load_model(SPEC), config)
    seconds["LoRA step, PEFT"], _ = clocked(lambda: training_steps(trained, batches))
    if DTYPE == "float32":
        fuse(trained)
        seconds["LoRA step, fused layers"], _ = clocked(lambda: training_steps(trained, batches))

    cored = with_cores(load_model(SPEC), basis.u, basis.v)
    cores = {name: parameter for name, parameter in cored.named_parameters() if name.endswith(".core")}
    seconds["autograd, one row at a time"], peer = clocked(lambda: one_by_one(cored, cores, data), repeats=1)
    assert distance(peer, scores) < CLOSE
    precision = torch.get_float32_matmul_precision()
    name = "autograd, one row at a time, torch's precision and the model's loss"
    seconds[name], peer = clocked(lambda: as_a_user_would(cored, cores, data), repeats=1)
    torch.set_float32_matmul_precision(precision)
    assert distance(peer, scores) < CLOSE
    if DTYPE != "float32":
        report(rows, mode, model, batches, seconds)
        return
    shortest = batches[-1]
    taken, peer = clocked(lambda: vectorised(cored, cores, shortest), repeats=1)
    assert distance(peer, scores[shortest.index]) < CLOSE
    # Of the batch of the shortest rows only, scaled by tokens: in the peers' favour.
    scale = sum(len(row.ids) for row in data.rows) / int(shortest.lengths.sum())
    seconds["vmap(grad)"] = taken * scale
    if find_spec("curvlinops"):
        vector = torch.randn(scores.shape[1], generator=torch.Generator().manual_seed(0))
        taken, peer = operator_product(cored, cores, [shortest], vector)
        by_token = fisher_pass(model, basis, [shortest], len(data), tmp_path, "token")
        assert distance(peer, by_token.matvec(vector.double()) * by_token.count) < CLOSE
        seconds["curvlinops' empirical Fisher, one product with a vector"] = taken * scale
    report(rows, mode, model, batches, seconds)


def report(rows, mode, model, batches, seconds):
    padded, answers = sum(b.ids.numel() for b in batches), sum(len(answer_targets(b)) for b in batches)
    head = model.get_output_embeddings().weight
    layers = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear) and m.weight is not head]
    work = 4 * (sum(weight.numel() for weight in layers) * padded + head.numel() * answers)
    a, b = torch.randn(512, 576).to(model.dtype), torch.randn(1536, 576).to(model.dtype)
    best, _ = clocked(lambda: [torch.nn.functional.linear(a, b) for _ in range(50)], repeats=5)
    rate = 50 * 2 * 512 * 576 * 1536 / best
    ours, count = seconds["Fisher pass"], sum(len(b.index) for b in batches)
    say = sys.stderr.write
    say(f"\n{rows}: {count} rows, {padded} tokens with padding, {answers} answer tokens, mode {mode}\n")
    for name, taken in seconds.items():
        say(f"{name}: {count / taken:.2f} rows/s, {taken / ours:.2f} x the time of the Fisher pass\n")
    say(f"arithmetic: {work / 1e9:.0f} GFLOP forward and activation-backward, {work / ours / 1e9:.0f} GFLOP/s, ")
    say(f"{work / ours / rate:.0%} of the measured product rate of {rate / 1e9:.0f} GFLOP/s\n")
