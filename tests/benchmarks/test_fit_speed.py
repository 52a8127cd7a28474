"""Tokens per second of ``fit`` against Hugging Face's Trainer with PEFT, written as a user would, in one run.

Same rows, batch size, LoRA, optimiser, schedule and number of steps; both losses are measured by one piece of code.
Prints the numbers; asserts on losses, never on time.
"""

import json
import sys
import time
from pathlib import Path

import pytest
import torch

from src.adapters.attach import attached
from src.adapters.peft_files import read_adapter
from src.cli import main
from src.data.batches import EncodedRows
from src.data.chat import Encoder
from src.data.sources import RowSource, load_rows
from src.models.base import BaseSpec, load_model, load_tokenizer
from src.models.logits import answer_nll

RESEARCH = Path("../shared/data/train")
"""Public instruction data of mixed length; not part of the project."""
CASES = {
    "short tasks (shipped)": (
        ["src/data/demo/task.train.jsonl", "src/data/demo/general.train.jsonl"],
        ["src/data/demo/task.calib.jsonl"],
    ),
    "instructions and code (research data)": (
        [
            {"path": str(RESEARCH / "instruct.jsonl"), "limit": 160, "seed": 0},
            {"path": str(RESEARCH / "code.jsonl"), "limit": 80, "seed": 0},
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


def peer(train, folder):
    """Seconds of training with transformers.Trainer and PEFT."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    from src.models.base import _location

    torch.set_float32_matmul_precision("highest")
    torch.manual_seed(0)
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
    )
    collator = DataCollatorForSeq2Seq(load_tokenizer(BaseSpec()), label_pad_token_id=-100)
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collator)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    model.save_pretrained(folder)
    return seconds


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", list(CASES))
def test_fit_against_transformers_trainer(case, tmp_path, monkeypatch):
    from lightning import Trainer

    if "research" in case and not RESEARCH.is_dir():
        pytest.skip(f"{RESEARCH} is not here")
    train, val = (encoded(sources) for sources in CASES[case])
    clock: dict[str, float] = {}
    original = Trainer.fit

    def timed(self, *args, **kwargs):
        start = time.perf_counter()
        original(self, *args, **kwargs)
        clock["ours"] = time.perf_counter() - start

    monkeypatch.setattr(Trainer, "fit", timed)
    flags = ["--output", str(tmp_path / "ours"), "--trainer.max_epochs", "1", "--trainer.enable_progress_bar", "false"]
    # No validation on either side; the base is loaded inside both clocks' runs but is 1 % of them.
    quiet = ["--trainer.limit_val_batches", "0", "--trainer.callbacks", "null"]
    flags += [f"--data.{split}={json.dumps(rows)}" for split, rows in zip(("train", "val"), CASES[case], strict=True)]
    assert main(["fit", "--config", "expert.yaml", *flags, *quiet]) == 0
    clock["peer"] = peer(train, tmp_path / "peer")
    sys.stderr.write(f"\n{case}: {len(train)} rows, batch 8\n")
    tokens = sum(len(row.ids) for row in train)
    losses = {"ours": validation_loss(tmp_path / "ours", val), "peer": validation_loss(tmp_path / "peer", val)}
    for name in ("ours", "peer"):
        sys.stderr.write(f"{name}: {tokens / clock[name]:.0f} tokens/s, validation loss {losses[name]:.4f}\n")
    sys.stderr.write(f"ratio: {clock['peer'] / clock['ours']:.2f} x as fast\n")
    assert losses["ours"] <= 1.02 * losses["peer"]
