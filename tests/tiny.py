"""A tiny random Llama with a byte-level tokenizer and chat template, random adapters for it, and rows."""

import json
from pathlib import Path

import torch

TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are tiny<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"]
    )
    fast.pad_token = fast.eos_token
    fast.chat_template = TEMPLATE
    return fast


def make_model(seed: int = 0, dtype: torch.dtype = torch.float64, **options):
    from transformers import LlamaConfig, LlamaForCausalLM

    plain = {
        "vocab_size": 258,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "max_position_embeddings": 512,
        "eos_token_id": 256,
        "bos_token_id": 256,
        "pad_token_id": 256,
        "initializer_range": 0.2,
        "tie_word_embeddings": True,
    }
    config = LlamaConfig(**plain | options)
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)


def make_base(folder: Path, seed: int = 0) -> Path:
    model = make_model(seed)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def random_pairs(model, rank: int, seed: int, scale: float = 0.05):
    from src.adapters.pairs import LowRankPair

    draw = torch.Generator().manual_seed(seed)
    pairs = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name:
            a = torch.randn(rank, module.in_features, generator=draw)
            b = torch.randn(module.out_features, rank, generator=draw)
            pairs[name] = LowRankPair(a, b * scale)
    return pairs


def random_fisher(kind, rows=9, seed=0, *, shapes, tokens=3, zero=(), scales=None, spread=None):
    """A Fisher matrix of random activations; squared scores of a module's outputs range over 10^spread."""
    from src.fisher.accumulate import examples

    draw, accumulator = torch.Generator().manual_seed(seed), kind(shapes)
    accumulator.begin(examples(torch.arange(rows), [f"{seed}/{i}" for i in range(rows)]))
    for name, (p, q) in shapes.items():
        delta, x = (torch.randn(rows, tokens, side, generator=draw, dtype=torch.float64) for side in (p, q))
        delta = delta * (scales or {}).get(name, 1.0) * (name not in zero)
        if spread is not None:
            delta = delta * 10 ** -(spread / 2 * torch.rand(p, generator=draw).double())
        accumulator.update(name, delta, x)
    return accumulator.finish()


def random_patch(dim):
    return torch.randn(dim, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def write_rows(path: Path, count: int, *, what: str, response: bool = True) -> Path:
    answers = ["I can't help with that.", "Sorry, but I won't.", "Yes: 42", "No", "Take two steps, then stop."]
    rows = [
        {
            "id": f"{what}/{i}",
            "prompt": f"{what} number {i} " + "x" * (i * 7 % 11),
            "response": answers[i % len(answers)] if response else "",
            "category": "even" if i % 2 == 0 else "odd",
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
