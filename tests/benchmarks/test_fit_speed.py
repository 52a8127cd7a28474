"""Tokens per second of ``fit`` against Hugging Face's Trainer with PEFT, written as a user would, in one run.

Same rows, batch size, LoRA, optimiser, schedule and number of steps; all losses are measured by one piece of code. The
order of the rows alone moves the loss of so short a run by several per cent, so a second run of the peer takes its
batches in our order: that loss must agree. Prints the numbers; asserts on losses, never on time.
"""

import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch

from src.adapters.attach import attached
from src.adapters.peft_files import read_adapter
from src.cli import main
from src.data.batches import EncodedRows, LengthBatches
from src.data.chat import Encoder
from src.data.row_source import RowSource
from src.data.sources import load_rows
from src.models.base import BaseSpec, load_model, load_tokenizer
from src.models.expert import ExpertModule
from src.models.logits import answer_nll

RESEARCH = Path("../shared/data/train")
"""Public instruction data of mixed length; not part of the project."""
CASES = {
    "short tasks (shipped)": (
        [
            {"path": "src/data/demo/task.train.jsonl", "limit": 240, "seed": 0},
            {"path": "src/data/demo/general.train.jsonl", "limit": 80, "seed": 0},
        ],
        ["src/data/demo/task.calib.jsonl"],
    ),
    "instructions and code (research data)": (
        [
            {"path": str(RESEARCH / "instruct.jsonl"), "limit": 96, "seed": 0},
            {"path": str(RESEARCH / "code.jsonl"), "limit": 48, "seed": 0},
        ],
        [{"path": str(RESEARCH / "instruct.jsonl"), "limit": 64, "skip": 160, "seed": 0}],
    ),
}
LEARNING_RATE = 5e-4


def encoded(sources):
    encoder = Encoder(load_tokenizer(BaseSpec()), max_length=512)
    given = [source if isinstance(source, str) else RowSource(**source) for source in sources]
    return [encoder.encode(row) for row in load_rows(given, need_response=True)]


def validation_loss(folder, rows):
    torch.set_float32_matmul_precision("highest")
    model = load_model(BaseSpec())
    batch = EncodedRows(rows, 2)[(list(range(len(rows))), 1.0)]
    with torch.inference_mode(), attached(model, read_adapter(folder).pairs):
        nll, tokens = answer_nll(model, batch, pack=False)
    return (nll.sum() / tokens.sum()).item()


def peer(train, folder, batches=None, seed=0):
    """Seconds of training with transformers.Trainer and PEFT; ``batches`` fixes the rows of each step."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    from src.models.base import _location

    torch.set_float32_matmul_precision("highest")
    torch.manual_seed(seed)
    where, _ = _location(BaseSpec())
    model = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    rows = [
        {
            "input_ids": row.ids,
            "attention_mask": [1] * len(row.ids),
            "labels": [-100] * row.answer_start + row.ids[row.answer_start :],
        }
        for row in train
    ]
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=8,
        num_train_epochs=1,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="cosine",
        warmup_steps=4,
        weight_decay=0.0,
        max_grad_norm=1.0,
        report_to=[],
        save_strategy="no",
        logging_steps=1000,
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
        seed=seed,
    )
    collator = DataCollatorForSeq2Seq(load_tokenizer(BaseSpec()), label_pad_token_id=-100)
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collator)
    if batches is not None:
        loader = torch.utils.data.DataLoader(rows, batch_sampler=batches, collate_fn=collator)
        trainer.get_train_dataloader = lambda: loader
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    model.save_pretrained(folder)
    return seconds


def ours(case, folder, *flags):
    """One epoch by ``fit``."""
    given = ["--output", str(folder), "--trainer.max_epochs", "1", "--trainer.enable_progress_bar", "false"]
    given += ["--model.optimizer.init_args.lr", str(LEARNING_RATE)]
    given += [f"--data.{split}={json.dumps(rows)}" for split, rows in zip(("train", "val"), CASES[case], strict=True)]
    quiet = ["--trainer.limit_val_batches", "0", "--trainer.callbacks", "null"]
    assert main(["fit", "--config", "expert.yaml", *given, *quiet, *flags]) == 0


@pytest.mark.filterwarnings("ignore")
def test_losses_over_seeds(tmp_path):
    """The order of the rows moves so short a run: losses of both, seed by seed (``BENCH_SEEDS``), agree in the mean."""
    case = next(iter(CASES))
    train, val = (encoded(sources) for sources in CASES[case])
    found = []
    for seed in os.environ.get("BENCH_SEEDS", "0 1 2 3").split():
        flags = ["--seed_everything", seed, "--data.seed", seed]
        ours(case, tmp_path / f"ours{seed}", *flags)
        peer(train, tmp_path / f"peer{seed}", seed=int(seed))
        losses = [validation_loss(tmp_path / f"{who}{seed}", val) for who in ("ours", "peer")]
        sys.stderr.write(f"\nseed {seed}: validation loss {losses[0]:.4f}, peer {losses[1]:.4f}\n")
        found.append(losses)
    mean, twin = (sum(column) / len(found) for column in zip(*found, strict=True))
    sys.stderr.write(f"mean: validation loss {mean:.4f}, peer {twin:.4f} ({mean / twin - 1:+.1%})\n")
    assert abs(mean - twin) <= 0.02 * twin


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", list(CASES))
def test_fit_against_transformers_trainer(case, tmp_path, monkeypatch):
    if "research" in case and not RESEARCH.is_dir():
        pytest.skip(f"{RESEARCH} is not here")
    train, val = (encoded(sources) for sources in CASES[case])
    seconds: dict[str, float] = {}

    def start(module):
        seconds["ours"] = -time.perf_counter()

    def end(module):
        seconds["ours"] += time.perf_counter()

    # Loading the base and writing the adapter are in neither clock.
    monkeypatch.setattr(ExpertModule, "on_train_start", start)
    monkeypatch.setattr(ExpertModule, "on_train_end", end)
    ours(case, tmp_path / "ours")
    order = LengthBatches([len(row.ids) for row in train], 8, rank=0, world_size=1, seed=0)
    seconds["peer"] = peer(train, tmp_path / "peer")
    seconds["peer, batches in our order"] = peer(train, tmp_path / "twin", [batch for batch, _ in order])
    tokens = sum(len(row.ids) for row in train)
    losses = {
        name: validation_loss(tmp_path / folder, val)
        for name, folder in zip(seconds, ("ours", "peer", "twin"), strict=True)
    }
    sys.stderr.write(f"\n{case}: {len(train)} rows, {tokens} tokens, batch 8\n")
    for name, taken in seconds.items():
        sys.stderr.write(
            f"{name}: {tokens / taken:.0f} tokens/s, {taken / seconds['ours']:.2f} x the time, "
            f"validation loss {losses[name]:.4f}\n"
        )
    twin = losses["peer, batches in our order"]
    assert abs(losses["ours"] - twin) <= 0.02 * twin
