"""Decoding in batches: padding is never seen, and logits that are no numbers are an error and not an answer."""

import re

import pytest
import torch

from src.cli import main
from src.data.batches import EncodedRows
from src.data.chat import Encoded, Encoder
from src.data.rows import Row
from src.models.generation import NotFinite, check_finite, finite, greedy
from tests.commands import ROOT, run_processes
from tests.evaluations import PASSES, answers, evaluate, flags, metrics, write_jsonl
from tests.tiny import make_model, make_tokenizer

PROMPTS = [f"{chr(97 + i)} asks {'x' * (i * 5 % 13)}" for i in range(6)]
"""Prompts that differ from their first token on, and in length."""
TINY = {
    "vocab_size": 100,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 99,
}


def suite(folder):
    rows = write_jsonl(folder / "rows.jsonl", [{"id": p[0], "prompt": p} for p in PROMPTS])
    return {"name": "asks", "kind": "harmful", "rows": str(rows), "max_new_tokens": 6, "template": "raw"}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_every_attention_answers_a_batch_as_it_answers_each_prompt_alone(base, tmp_path, attention):
    how = ["--model.base.attention", attention]
    for size in (1, 4):
        evaluate(base, tmp_path, [suite(tmp_path)], *how, output=str(size), batch_size=size)
    alone, together = ([row["answer"] for row in answers(tmp_path / name, "asks")] for name in ("1", "4"))
    assert together == alone
    assert len(set(alone)) > 1


def hand_written(kind):
    """A tiny model in float64 whose attention is written out."""
    import transformers as hf

    torch.manual_seed(1)
    if kind == "bloom":
        sizes = {"vocab_size": 100, "hidden_size": 16, "n_layer": 3, "n_head": 4, "initializer_range": 0.3}
        model = hf.BloomForCausalLM(hf.BloomConfig(**sizes))
    elif kind == "gemma2":
        model = hf.Gemma2ForCausalLM(hf.Gemma2Config(**TINY, sliding_window=8))
    else:
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**TINY))
    model.set_attn_implementation("eager")
    return model.double().eval().requires_grad_(False)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "bloom"])
def test_padding_is_not_seen_where_attention_is_written_out(kind):
    model, draw = hand_written(kind), torch.Generator().manual_seed(0)
    prompts = [torch.randint(99, (n,), generator=draw).tolist() for n in (3, 9, 1, 6)]
    batch = EncodedRows([Encoded(Row(str(i), "x"), ids, len(ids)) for i, ids in enumerate(prompts)], 99)[
        (list(range(4)), 1.0)
    ]
    found = greedy(model, batch, max_new_tokens=8, stop_ids=[99], pad_id=99)
    for ids, answer in zip(prompts, found, strict=True):
        for token in answer:
            assert int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()) == token
            ids.append(token)
    assert min(map(len, found)) > 0


def test_a_window_that_only_masks_know_counts_no_padding():
    """GPT-Neo's local layers, in prompts with a common beginning, against each token computed anew."""
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    torch.manual_seed(1)
    sizes = {"vocab_size": 100, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "max_position_embeddings": 64}
    kinds = {"attention_types": [[["global", "local"], 1]], "window_size": 8, "bos_token_id": 0, "eos_token_id": 0}
    more = {"initializer_range": 1.0, "tie_word_embeddings": False}
    model = GPTNeoForCausalLM(GPTNeoConfig(**sizes, **kinds, **more)).double().eval()
    draw = torch.Generator().manual_seed(0)
    prompts = [[*range(5, 13), 20 + n, *torch.randint(99, (n,), generator=draw).tolist()] for n in (3, 9, 1, 6)]
    encoded = [Encoded(Row(str(i), "x"), ids, len(ids)) for i, ids in enumerate(prompts)]
    batch = EncodedRows(encoded, 99)[(list(range(4)), 1.0)]
    assert batch.common_prefix == 8
    with torch.inference_mode():
        for ids, answer in zip(prompts, greedy(model, batch, max_new_tokens=8, stop_ids=[], pad_id=99), strict=True):
            for token in answer:
                assert int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()) == token
                ids.append(token)


def test_logits_that_are_no_numbers_are_one_line_and_no_answer(tmp_path, capsys):
    model, broken = make_model(), tmp_path / "broken"
    model.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    model.save_pretrained(broken)
    make_tokenizer().save_pretrained(broken)
    assert main(flags(broken, tmp_path, [suite(tmp_path)], tmp_path / "out")) == 2
    (line,) = [one for one in capsys.readouterr().err.splitlines() if one.startswith("error: ")]
    assert line.startswith("error: suite asks: base gives ")
    assert "logits that are not numbers; look for NaN in its weights, or set base.dtype to a wider type" in line
    assert not (tmp_path / "out" / "metrics.json").exists()


@pytest.mark.parametrize("row", [[0.0, float("nan")], [0.0, float("inf")], [-float("inf"), -float("inf")]])
def test_a_row_without_a_likeliest_token_is_named(row):
    with pytest.raises(NotFinite) as error:
        check_finite(finite(torch.tensor([[0.0, -float("inf")], row])).tolist(), [4, 7])
    assert error.value.place == 7


@pytest.mark.processes
@pytest.mark.parametrize("hardware", ["ddp_sim.yaml", "fsdp_sim.yaml"])
def test_a_row_of_one_process_without_numbers_stops_both(tmp_path, hardware):
    model, tokenizer = make_model(tie_word_embeddings=False), make_tokenizer()
    model.get_input_embeddings().weight[tokenizer("~").input_ids[0]] = float("nan")
    for one in (model, tokenizer):
        one.save_pretrained(tmp_path / "base")
    prompts = [f"{p} ~" if p[0] == "e" else p for p in PROMPTS]
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"id": p[0], "prompt": p} for p in prompts])
    one = {"name": "asks", "kind": "harmful", "rows": str(rows), "max_new_tokens": 3, "score": False}
    trainer = str(ROOT / "trainers" / hardware)
    arguments = flags(tmp_path / "base", tmp_path, [one], tmp_path / "out", "--trainer", trainer, batch_size=1)
    said = " ".join(run_processes(arguments, code=2).split())
    assert "suite asks: base gives e logits that are not numbers" in said
    assert "Traceback" not in said
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_code_goes_on_with_the_space_that_many_tokenizers_drop(base, tmp_path):
    """Llama 2's and Mistral's decoders take a space off the beginning of a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "</s>", "\u2581", *map(chr, range(33, 127)), "\n"]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    encoder = Encoder(fast, template="raw")
    body = fast("    return 1\n", add_special_tokens=False).input_ids
    assert fast.decode(body) == "   return 1\n"
    for prompt in ("def one():", "x"):
        encoded = encoder.encode(Row("a", prompt))
        assert encoder.continuation(encoded.prompt_ids, body) == "    return 1\n"
    assert encoder.decode(body) == "return 1"


@pytest.mark.processes
def test_sharded_decoding_ignores_what_the_model_asks_generate_for(tmp_path):
    from transformers import GenerationConfig

    model = make_model()
    model.generation_config = GenerationConfig(repetition_penalty=1.5, no_repeat_ngram_size=2)
    for one in (model, make_tokenizer()):
        one.save_pretrained(tmp_path / "base")
    evaluate(tmp_path / "base", tmp_path, [suite(tmp_path)], output="whole", batch_size=2)
    sharded, out = ["--trainer", str(ROOT / "trainers" / "fsdp_sim.yaml")], tmp_path / "sharded"
    run_processes(flags(tmp_path / "base", tmp_path, [suite(tmp_path)], out, *sharded, batch_size=2))
    assert [row["answer"] for row in answers(out, "asks")] == [
        row["answer"] for row in answers(tmp_path / "whole", "asks")
    ]


def test_a_model_with_states_in_place_of_keys_and_values_answers_in_batches_as_alone():
    """LFM2 mixes attention with short convolutions, whose states have no places that could be shared."""
    from transformers import Lfm2Config, Lfm2ForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    layers = ["conv", "full_attention", "conv"]
    torch.manual_seed(0)
    config = Lfm2Config(vocab_size=258, num_hidden_layers=3, layer_types=layers, initializer_range=0.4, **sizes)
    model = Lfm2ForCausalLM(config).double().eval().requires_grad_(False)
    encoder = Encoder(make_tokenizer())
    encoded = [encoder.encode(Row(str(i), prompt)) for i, prompt in enumerate(PROMPTS)]
    options = {"max_new_tokens": 12, "stop_ids": list(range(0, 258, 9)), "pad_id": 256}

    def answered(rows):
        return greedy(model, EncodedRows(rows, 256)[(list(range(len(rows))), 1.0)], **options)

    together = answered(encoded)
    assert together == [answered([one])[0] for one in encoded]
    assert len({len(one) for one in together}) > 1  # rows end apart, and the batch shrinks


@pytest.mark.parametrize("command", ["test", "predict"])
def test_answers_that_were_cut_are_counted(base, rows, tmp_path, monkeypatch, capsys, command):
    """Of three tokens at most: an answer of three was cut, one of two had its end behind it."""

    def said(model, batch, **options):
        return [[65, 66, 67][: 3 - i % 2] for i in batch.index.tolist()]

    monkeypatch.setattr("src.models.computation.greedy", said)
    code = write_jsonl(tmp_path / "code.jsonl", [PASSES])
    suites = [
        {"name": "task", "kind": "utility", "rows": str(rows["eval_task"]), "max_new_tokens": 3},
        {"name": "bad", "kind": "harmful", "rows": str(rows["eval_harmful"]), "max_new_tokens": 3},
        {"name": "code", "kind": "code", "rows": str(code), "max_new_tokens": 3, "samples": 3, "temperature": 1.0},
    ]
    arguments = flags(base, tmp_path, suites, tmp_path / "out", "--model.allow_code_execution", "true")
    assert main([command, *arguments[1:]]) == 0
    each = [row["unfinished"] for row in answers(tmp_path / "out", "task")]
    assert each == [i % 2 == 0 for i in range(9)]
    assert answers(tmp_path / "out", "code")[0]["unfinished"] == [True, False, True]
    shown = capsys.readouterr().err
    if command == "predict":
        return
    (found,) = metrics(tmp_path / "out")
    assert [found["suites"][name]["unfinished"] for name in ("task", "bad", "code")] == [5, 4, 2]
    (line,) = [line for line in shown.splitlines() if "not judged" in line]
    assert re.search(r"not judged, exact match on task \d\.\d\d \(n = 9\)", line)
    # Of harmful prompts only the first words count.
    assert line.endswith("; answers cut at max_new_tokens: task 5 of 9, code 2 of 3")
