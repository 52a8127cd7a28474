"""A base in 8 or 4 bits, by bitsandbytes itself on the CPU (``make oracles`` installs it)."""

from importlib.util import find_spec

import pytest
import torch

from src.adapters.attach import attached
from src.adapters.pairs import weighted_sum
from src.adapters.peft_files import read_adapter
from src.cli import main
from src.errors import InputError
from src.fisher.files import load_fisher
from src.models.base import BaseSpec, fingerprint, load_model, weights_digest
from tests.commands import fisher_flags, fit_flags
from tests.conftest import random_adapter
from tests.test_fisher_command import encode
from tests.tiny import make_model

needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes: make oracles")
pytestmark = [
    pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*quantization:UserWarning"),
]
BITS = ("8bit", "4bit")


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer):
    """A tiny base whose rows are a block of NF4 each: 64 weights."""
    folder = tmp_path_factory.mktemp("base of quantisable sizes")
    make_model(hidden_size=64, intermediate_size=128, head_dim=16, initializer_range=0.1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, base):
    root, model = tmp_path_factory.mktemp("adapters"), load_model(BaseSpec(str(base), dtype="float64"))
    return {
        name: random_adapter(root / name, base, rank, seed, model)
        for seed, (name, rank) in enumerate((("utility", 3), ("safety", 2)))
    }


def float32(flags, bits):
    flags[flags.index("--model.base.dtype") + 1] = "float32"
    return [*flags, "--model.base.quantization", bits]


def scores_one_by_one(model, batch, u, v):
    """(N, D) by autograd through bitsandbytes' own layers, with C as a parameter beside each."""
    found = []
    for row in range(len(batch.index)):
        length, start = int(batch.lengths[row]), int(batch.answer_starts[row])
        ids = batch.ids[row : row + 1, :length]
        cores = {n: torch.zeros(u[n].shape[1], v[n].shape[1], requires_grad=True) for n in u}

        def hook(name, cores=cores):
            def add(_, args, out):
                return out + args[0] @ v[name].float() @ cores[name].T @ u[name].float().T

            return add

        handles = [model.get_submodule(n).register_forward_hook(hook(n)) for n in u]
        log_p = model(ids).logits[0, start - 1 : -1].log_softmax(-1)
        total = log_p.gather(1, ids[0, start:, None]).sum()
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(total, list(cores.values()))]))
        for handle in handles:
            handle.remove()
    return torch.stack(found)


@needs_bitsandbytes
@pytest.mark.parametrize("bits", BITS)
def test_fisher_of_a_quantised_base_is_that_of_its_own_gradients(base, adapters, rows, tmp_path, tokenizer, bits):
    flags = fisher_flags(base, adapters, rows, tmp_path, "--model.labels", "data", "--data.batch_size", "1")
    assert main(float32(flags, bits)) == 0
    file = load_fisher(tmp_path / "safety.safetensors")
    model = load_model(BaseSpec(str(base), dtype="float32", quantization=bits))
    assert type(model.get_submodule(next(iter(file.u)))).__module__.startswith("bitsandbytes")
    pairs = weighted_sum([read_adapter(adapters[name]).pairs for name in ("utility", "safety")], [1.0, 1.0])
    with attached(model, pairs):
        expected = scores_one_by_one(model, encode(tokenizer, [rows["harmful"]]), file.u, file.v)
    torch.testing.assert_close(file.fisher.scores.float(), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
    plain = fisher_flags(base, adapters, rows, tmp_path / "plain", "--model.labels", "data")
    assert main(plain) == 0
    exact = load_fisher(tmp_path / "plain" / "safety.safetensors").fisher.scores
    # Not the same numbers: the base was quantised indeed.
    assert 1e-4 < (file.fisher.scores - exact).norm() / exact.norm() < 1


@needs_bitsandbytes
@pytest.mark.parametrize("bits", BITS)
def test_gradients_pass_through_a_quantised_base_that_ran_without_them_before(base, bits):
    model = load_model(BaseSpec(str(base), dtype="float32", quantization=bits))
    ids = torch.randint(0, 250, (2, 9))

    def gradient():
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=embedded).logits.logsumexp(-1).sum().backward()
        return embedded.grad

    before = gradient()
    with torch.no_grad():
        model(ids)
    torch.testing.assert_close(gradient(), before)


@needs_bitsandbytes
def test_an_adapter_of_the_whole_base_is_used_with_the_quantised_one(base, rows, tmp_path):
    assert main(fit_flags(base, rows, tmp_path / "whole")) == 0
    assert main(float32(fit_flags(base, rows, tmp_path / "quantised"), "4bit")) == 0
    both = {"utility": tmp_path / "whole", "safety": tmp_path / "quantised"}
    assert main(float32(fisher_flags(base, both, rows, tmp_path / "fisher"), "4bit")) == 0
    assert main(fisher_flags(base, both, rows, tmp_path / "fisher of the whole")) == 0


@needs_bitsandbytes
def test_two_quantised_bases_are_told_apart_where_results_are_kept(base):
    eight, four = (load_model(BaseSpec(str(base), quantization=bits)) for bits in BITS)
    assert fingerprint(eight) == fingerprint(four) == ""
    assert weights_digest(eight) != weights_digest(four)


def test_quantisation_without_bitsandbytes_is_one_line(base, monkeypatch):
    monkeypatch.setattr("src.models.base.importlib.util.find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"base\.quantization 4bit: needs bitsandbytes"):
        load_model(BaseSpec(str(base), quantization="4bit"))
