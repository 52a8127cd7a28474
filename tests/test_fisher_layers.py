"""Fisher passes over layers that are called in other ways: output heads, flattened tokens, GPT-2's Conv1D, embeddings.

Everything is compared with autograd, one unpadded row at a time: C enters each layer's output as ``U C Vᵀ x`` at C = 0.
"""

import json

import pytest
import torch
import transformers

from src.adapters.attach import layer_shape
from src.adapters.basis import core_basis
from src.adapters.pairs import LowRankPair
from src.adapters.peft_config import PLAIN, Layout
from src.adapters.peft_files import write_adapter
from src.cli import main
from src.data.chat import Encoder
from src.data.sources import load_rows
from src.errors import InputError
from src.fisher.files import load_fisher
from src.fisher.scores import ScoreRecorder
from src.models.logits import answer_places
from src.models.lora import LoraSpec, add_lora
from tests.commands import fisher_flags
from tests.fisher_pass import make_batch, recorded_scores
from tests.tiny import make_model, make_tokenizer

AT_BASE = ["--model.reference_safety", "base", "--model.reference_utility", "base"]
LABELS = {"data": ["--model.labels", "data"], "drawn": ["--model.draws", "3"]}
VOCABULARY, WIDTH = 258, 12


def pairs_of(model, names, rank, seed):
    """Random updates of some layers, (outputs, inputs)."""
    draw, found = torch.Generator().manual_seed(seed), {}
    for name in names:
        outputs, inputs = layer_shape(model.get_submodule(name))
        a, b = torch.randn(rank, inputs, generator=draw), torch.randn(outputs, rank, generator=draw)
        found[name] = LowRankPair(a, 0.05 * b)
    return found


def row_scores(model, batch, u, v, *, token=False):
    """Scores of every row, or of every answer token, in order; a basis of None is the identity."""
    found = []
    for row in range(len(batch.index)):
        length, start = int(batch.lengths[row]), int(batch.answer_starts[row])
        ids, cores, handles = batch.ids[row : row + 1, :length], [], []
        for name in u:
            outputs, inputs = layer_shape(model.get_submodule(name))
            left = torch.eye(outputs).double() if u[name] is None else u[name]
            right = torch.eye(inputs).double() if v[name] is None else v[name]
            core = torch.zeros(left.shape[1], right.shape[1], dtype=torch.float64, requires_grad=True)

            def add(_, args, out, core=core, left=left, right=right):
                return out + args[0] @ right @ core.T @ left.T

            cores.append(core)
            handles.append(model.get_submodule(name).register_forward_hook(add))
        log_p = model(ids).logits[0, start - 1 : -1].log_softmax(-1).gather(1, ids[0, start:, None])
        for handle in handles:
            handle.remove()
        for total in log_p if token else [log_p.sum()]:
            found.append(torch.cat([g.flatten() for g in torch.autograd.grad(total.sum(), cores, retain_graph=True)]))
    return torch.stack(found)


def written(root, model, names, layout=PLAIN):
    """A base directory, and a utility and a safety adapter of it."""
    model.save_pretrained(root / "base")
    make_tokenizer().save_pretrained(root / "base")
    adapters = {"utility": root / "utility", "safety": root / "safety"}
    for seed, folder in enumerate(adapters.values()):
        kept = {"base": str(root / "base"), "manifest": {}, "seen": frozenset(), "card": "card", "layout": layout}
        write_adapter(folder, pairs_of(model, names, 3 - seed, seed), **kept)
    return root / "base", adapters


@pytest.fixture(scope="module")
def headed(tmp_path_factory):
    """An untied tiny Llama, and adapters of its output head and of another layer."""
    model = make_model(tie_word_embeddings=False)
    return model, *written(tmp_path_factory.mktemp("headed"), model, ["lm_head", "model.layers.1.mlp.down_proj"])


def tiny_gpt2():
    torch.manual_seed(0)
    shape = {"n_embd": WIDTH, "n_layer": 2, "n_head": 2, "n_positions": 512, "initializer_range": 0.3}
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, bos_token_id=256, eos_token_id=256, pad_token_id=256, **shape
    )
    return transformers.GPT2LMHeadModel(config).double().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A tiny GPT-2, and adapters of its Conv1D layers, one of them square."""
    model = tiny_gpt2()
    names = [f"transformer.h.{i}.{part}" for i in range(2) for part in ("attn.c_attn", "attn.c_proj", "mlp.c_proj")]
    return model, *written(tmp_path_factory.mktemp("gpt2"), model, names, Layout(transposed=True))


def measured(made, rows, folder, *flags):
    _, base, adapters = made
    assert main(fisher_flags(base, adapters, rows, folder, *AT_BASE, *flags)) == 0
    return {name: load_fisher(folder / f"{name}.safetensors") for name in ("safety", "utility")}


def calibration(*paths):
    encoder = Encoder(make_tokenizer(), max_length=512)
    encoded = [encoder.encode(row) for row in load_rows([str(path) for path in paths], need_response=True)]
    return make_batch(encoded, range(len(encoded)))


def close(found, expected, error=1e-9):
    torch.testing.assert_close(found, expected, rtol=error, atol=error * expected.abs().max().item())


@pytest.mark.parametrize("size", ["1", "3", "9"])
@pytest.mark.parametrize("unit", ["sequence", "token"])
def test_scores_of_an_output_head_are_autograds_at_any_batch_size(headed, rows, tmp_path, unit, size):
    flags = ["--model.granularity", unit, "--data.batch_size", size, *LABELS["data"]]
    found = measured(headed, rows, tmp_path / "out", *flags)
    for name, paths in {"safety": [rows["harmful"]], "utility": [rows["benign"], rows["task"]]}.items():
        file = found[name]
        close(file.fisher.scores, row_scores(headed[0], calibration(*paths), file.u, file.v, token=unit == "token"))


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("unit", ["sequence", "token"])
@pytest.mark.parametrize("form", ["lowrank", "block", "kronecker", "diagonal"])
def test_an_output_head_has_one_fisher_matrix_whatever_the_batch_size(headed, rows, tmp_path, form, unit, labels):
    heavy = json.dumps([{"path": str(rows["benign"]), "weight": 8}, str(rows["task"])])
    flags = ["--model.representation", form, "--model.granularity", unit, *LABELS[labels], f"--data.utility={heavy}"]
    one, many = (measured(headed, rows, tmp_path / n, *flags, "--data.batch_size", n) for n in ("1", "5"))
    for name in one:
        close(many[name].fisher.dense(), one[name].fisher.dense())


@pytest.mark.parametrize("form", ["kronecker", "diagonal", "magnitude"])
def test_weights_of_an_output_head_have_a_fisher_pass_too(headed, rows, tmp_path, form):
    flags = ["--model.representation", form, "--model.coordinates", "weight", *LABELS["data"]]
    one, many = (measured(headed, rows, tmp_path / n, *flags, "--data.batch_size", n) for n in ("1", "5"))
    batch, names = calibration(rows["harmful"]), dict.fromkeys(many["safety"].shapes)
    scores = row_scores(headed[0], batch, names, names)
    exact = {"diagonal": scores.square().mean(0), "magnitude": scores.abs().mean(0)}
    if form in exact:
        found = [many["safety"].fisher.mean(name) for name in names]
        close(torch.cat(found), exact[form])
    for key, tensor in one["safety"].fisher.tensors().items():
        close(many["safety"].fisher.tensors()[key], tensor)


def test_mean_scores_of_an_output_head_are_autograds(headed, rows, tmp_path):
    found = measured(headed, rows, tmp_path / "out", "--model.relearn", "true", *LABELS["data"])["safety"]
    close(found.mean, row_scores(headed[0], calibration(rows["harmful"]), found.u, found.v).mean(0))


def tiny(model, config, **sizes):
    """A tiny random model with two layers of two heads."""
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    plain = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "initializer_range": 0.3, "pad_token_id": 256}
    torch.manual_seed(0)
    return model(config(**plain | heads | sizes)).double().eval().requires_grad_(False)


def tiny_qwen_moe():
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"}
    sizes = {"intermediate_size": 16, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
    return tiny(transformers.Qwen2MoeForCausalLM, transformers.Qwen2MoeConfig, **experts, **sizes)


def tiny_llama4():
    sizes = {"intermediate_size": 8, "intermediate_size_mlp": 8, "head_dim": 6, "num_local_experts": 2}
    return tiny(transformers.Llama4ForCausalLM, transformers.Llama4TextConfig, **sizes, attn_implementation="eager")


SHARED = {"mlp.shared_expert.gate_proj": tiny_qwen_moe, "feed_forward.shared_expert.down_proj": tiny_llama4}


@pytest.mark.parametrize("size", [1, 4, 7])
@pytest.mark.parametrize("part", SHARED)
def test_layers_that_see_all_tokens_in_one_row_give_autograds_scores(encoded, part, size):
    model = SHARED[part]()
    names = [f"model.layers.{i}.{part}" for i in range(2)] + ["lm_head"]
    core = core_basis([pairs_of(model, names, 2, 0)])
    parts = [make_batch(encoded, range(start, min(7, start + size))) for start in range(0, 7, size)]
    found = [recorded_scores(model, batch, core, answer_places(batch)) for batch in parts]
    # Experts are weighed by a softmax in float32, which rounds otherwise beside other rows.
    close(torch.cat(found), row_scores(model, make_batch(encoded, range(7)), core.u, core.v), error=1e-5)


def tiny_mixtral():
    experts = {"num_local_experts": 2, "intermediate_size": 8}
    return tiny(transformers.MixtralForCausalLM, transformers.MixtralConfig, **experts)


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "w1", "w2", "w3"]])
def test_training_of_experts_that_are_bare_parameters_is_refused_before_it_begins(targets):
    with pytest.raises(InputError, match=r"^lora\.targets .* bare parameters, .*expected attention layers"):
        add_lora(tiny_mixtral(), LoraSpec(rank=2, targets=targets), 0)


def test_attention_layers_beside_experts_are_trained():
    adapted = add_lora(tiny_mixtral(), LoraSpec(rank=2, targets=["q_proj"]), 0)
    assert sum("lora_A" in name for name, _ in adapted.named_parameters()) == 2


class Routed(torch.nn.Module):
    """A routed expert: it sees some of the tokens, one after the other."""

    def __init__(self):
        super().__init__()
        self.experts = torch.nn.ModuleList([torch.nn.Linear(4, 4).requires_grad_(False)])

    def forward(self, x):
        flat = x.flatten(0, 1)
        return torch.cat([self.experts[0](flat[::2]), flat[1::2]])


def test_a_layer_that_sees_some_of_the_tokens_is_refused_in_one_line():
    model = Routed()
    recorder = ScoreRecorder(model, {"experts.0": None}, {"experts.0": None})
    said = r"experts\.0: sees \(5, 4\) .* 2 rows of 5 tokens.*routed expert.*expected adapters that leave it out$"
    with recorder.recording(torch.ones(2, 5, dtype=torch.bool)), pytest.raises(InputError, match=said):
        model(torch.ones(2, 5, 4, requires_grad=True))


@pytest.mark.parametrize("unit", ["sequence", "token"])
def test_scores_of_conv1d_layers_are_autograds(gpt2, rows, tmp_path, unit):
    found = measured(gpt2, rows, tmp_path / "out", "--model.granularity", unit, *LABELS["data"])["safety"]
    close(
        found.fisher.scores,
        row_scores(gpt2[0], calibration(rows["harmful"]), found.u, found.v, token=unit == "token"),
    )


@pytest.mark.parametrize("form", ["kronecker", "diagonal", "magnitude"])
def test_weights_of_conv1d_layers_count_outputs_by_inputs(gpt2, rows, tmp_path, form):
    flags = ["--model.representation", form, "--model.coordinates", "weight", *LABELS["data"]]
    found = measured(gpt2, rows, tmp_path / "out", *flags)["safety"]
    assert found.shapes["transformer.h.0.attn.c_attn"] == (3 * WIDTH, WIDTH)
    names = dict.fromkeys(found.shapes)
    scores = row_scores(gpt2[0], calibration(rows["harmful"]), names, names)
    exact = {"diagonal": scores.square().mean(0), "magnitude": scores.abs().mean(0)}
    if form in exact:
        close(torch.cat([found.fisher.mean(name) for name in names]), exact[form])
    else:
        sides = [tuple(len(factor) for factor in found.fisher.factors(name)) for name in names]
        assert sides == list(found.shapes.values())


def test_a_merge_of_conv1d_adapters_by_their_fisher_files_is_written(gpt2, rows, tmp_path):
    _, _, adapters = gpt2
    measured(gpt2, rows, tmp_path / "fisher")
    given = ["--utility", str(adapters["utility"]), "--safety", str(adapters["safety"])]
    flags = ["--fisher", str(tmp_path / "fisher"), "--method", "Sst", "--output", str(tmp_path / "out")]
    assert main(["merge", *given, *flags]) == 0
    assert main(["inspect", str(tmp_path / "out"), str(adapters["safety"])]) == 0


def test_a_dry_run_counts_conv1d_layers(gpt2, rows, tmp_path, capfd):
    _, base, adapters = gpt2
    assert main(fisher_flags(base, adapters, rows, tmp_path / "out", "--dry_run", "true")) == 0
    assert "activations 0 B" not in "".join(capfd.readouterr())


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """A tiny Llama, a utility adapter that updates its embedding too, and a safety adapter that does not."""
    root, model = tmp_path_factory.mktemp("embedded"), make_model()
    base, adapters = written(root, model, ["model.layers.0.mlp.down_proj"])
    both = pairs_of(model, ["model.embed_tokens", "model.layers.0.mlp.down_proj"], 2, 3)
    kept = {"base": str(base), "manifest": {}, "seen": frozenset(), "card": "card"}
    layout = Layout(embeddings=frozenset({"model.embed_tokens"}))
    write_adapter(root / "tokens", both, **kept, layout=layout)
    return base, adapters | {"tokens": root / "tokens"}


@pytest.mark.parametrize("where", ["utility", "safety"])
def test_embeddings_have_no_fisher_pass(embedded, rows, tmp_path, monkeypatch, capsys, where):
    monkeypatch.setattr("src.models.fisher.load_model", lambda _: pytest.fail("the base was loaded"))
    base, adapters = embedded
    flags = ["--model.basis", "union"] if where == "utility" else []
    given = adapters | {where: adapters["tokens"]}
    for more in ([], ["--dry_run", "true"]):
        assert main(fisher_flags(base, given, rows, tmp_path / "out", *flags, *more)) == 2
        line = capsys.readouterr().err.strip()
        assert f"{adapters['tokens']}: updates the embedding model.embed_tokens" in line
        assert "no Fisher pass" in line
        assert "\n" not in line
        assert ("--model.basis safety" in line) == (where == "utility")


def test_a_utility_expert_with_an_embedding_is_a_reference_point(embedded, rows, tmp_path):
    base, adapters = embedded
    given = adapters | {"utility": adapters["tokens"]}
    assert main(fisher_flags(base, given, rows, tmp_path / "out")) == 0
