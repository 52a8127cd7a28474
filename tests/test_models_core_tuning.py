"""Training an adapter's core against autograd in C, and training beside adapters that stay, through the fit command."""

import json
import shutil

import pytest
import torch
from torch.func import functional_call

from src.adapters.attach import attached
from src.adapters.basis import core_basis
from src.adapters.pairs import LowRankPair, weighted_sum
from src.adapters.peft_files import Adapter, read_adapter
from src.cli import main
from src.data.batches import EncodedRows
from src.data.chat import Encoder
from src.data.sources import load_rows
from src.models.base import BaseSpec, load_model, load_tokenizer
from src.models.core_tuning import Core
from src.models.logits import answer_logits, answer_loss, answer_targets
from tests.commands import fit_flags

ONE_STEP = ["--trainer.max_epochs", "1", "--data.batch_size", "13", "--model.warmup", "0"]
ONE_STEP += ["--model.schedule", "constant"]
PLAIN_SGD = ["--model.optimizer", "torch.optim.SGD", "--model.optimizer.init_args.lr", "0.5"]
FREE = ["--trainer.gradient_clip_val", "0", "--trainer.callbacks", "null", "--trainer.limit_val_batches", "0"]


def spec(base):
    return BaseSpec(name=str(base), dtype="float64")


def batch_of(base, path):
    tokenizer = load_tokenizer(spec(base))
    encoded = [Encoder(tokenizer, max_length=512).encode(row) for row in load_rows(str(path), need_response=True)]
    return EncodedRows(encoded, tokenizer.pad_token_id)[(list(range(len(encoded))), 1.0)]


def core_step(base, safety, batch, lr, beside=()):
    """C after one step of plain gradient descent, by autograd through ``W + U C Vᵀ``; and its basis."""
    model = load_model(spec(base))
    basis = core_basis([safety.pairs])
    start = basis.coordinates(safety.pairs).split([p * q for p, q in basis.shapes.values()])
    cores = [c.reshape(basis.shapes[n]).clone().requires_grad_() for n, c in zip(basis.modules, start, strict=True)]
    weights = {f"{n}.weight": model.get_submodule(n).weight.detach() for n in basis.modules}
    changed = {
        f"{n}.weight": weights[f"{n}.weight"] + basis.u[n] @ core @ basis.v[n].T
        for n, core in zip(basis.modules, cores, strict=True)
    }

    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self):
            return answer_loss(answer_logits(self.inner, batch, pack=False), answer_targets(batch))

    with attached(model, weighted_sum([pairs for pairs, _ in beside], [w for _, w in beside]) if beside else {}):
        loss = functional_call(Loss(), {f"inner.{name}": value for name, value in changed.items()}, ())
    gradients = torch.autograd.grad(loss, cores)
    moved = [core - lr * gradient for core, gradient in zip(cores, gradients, strict=True)]
    return basis, torch.cat([m.reshape(-1) for m in moved]).detach()


@pytest.mark.parametrize("weight", [None, 0.7])
def test_one_step_moves_the_core_as_autograd_says(base, adapters, rows, tmp_path, weight):
    out = tmp_path / "tuned"
    flags = ["--model.core", str(adapters["safety"]), *ONE_STEP, *PLAIN_SGD, *FREE]
    if weight is not None:
        flags += ["--model.beside", json.dumps({str(adapters["utility"]): weight})]
    assert main(fit_flags(base, rows, out, *flags)) == 0
    safety, utility = (read_adapter(adapters[name]) for name in ("safety", "utility"))
    beside = [] if weight is None else [(utility.pairs, weight)]
    basis, expected = core_step(base, safety, batch_of(base, rows["task"]), 0.5, beside)
    found = read_adapter(out)
    moved = basis.coordinates(found.pairs)
    assert basis.residual(found.pairs) < 1e-6  # files are float32
    assert (expected - basis.coordinates(safety.pairs)).norm() > 1e-3
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-5)
    manifest = json.loads((out / "manifest.json").read_text())
    names = [str(adapters["safety"])] + ([str(adapters["utility"])] if beside else [])
    assert [one["path"] for one in manifest["others"]] == names
    assert found.seen >= safety.seen


def test_an_adapter_beside_changes_what_is_trained_and_is_no_part_of_it(base, adapters, rows, tmp_path):
    found = {}
    for name, weight in (("without", 0.0), ("with", 1.0)):
        beside = json.dumps({str(adapters["utility"]): weight})
        flags = ["--model.beside", beside, "--trainer.max_epochs", "1"]
        assert main(fit_flags(base, rows, tmp_path / name, *flags)) == 0
        found[name] = read_adapter(tmp_path / name).pairs
    assert main(fit_flags(base, rows, tmp_path / "plain", "--trainer.max_epochs", "1")) == 0
    plain = read_adapter(tmp_path / "plain").pairs
    for name, pair in plain.items():
        assert pair.rank == found["with"][name].rank == 2
        torch.testing.assert_close(found["without"][name].dense(), pair.dense())
    assert any((found["with"][n].dense() - plain[n].dense()).norm() > 1e-3 for n in plain)


def test_a_core_of_mixed_ranks_reloads_and_resumes(base, adapters, rows, tmp_path):
    """A module without an update has no core, one of smaller rank a smaller one; two halves of a run make the whole."""
    from safetensors.torch import load_file, save_file

    mixed = shutil.copytree(adapters["safety"], tmp_path / "mixed")
    tensors = load_file(mixed / "adapter_model.safetensors")
    names = sorted(key for key in tensors if "lora_B" in key)
    tensors[names[0]].zero_()
    tensors[names[1]][:, 1:].zero_()
    save_file(tensors, mixed / "adapter_model.safetensors")
    flags = ["--model.core", str(mixed), "--trainer.max_epochs", "2"]
    assert main(fit_flags(base, rows, tmp_path / "whole", *flags)) == 0
    whole = read_adapter(tmp_path / "whole").pairs
    assert len(whole) == len(names) - 1
    assert sorted({pair.rank for pair in whole.values()}) == [1, 2]
    last = tmp_path / "whole" / "run" / "checkpoints" / "last.ckpt"
    again = ["--model.core", str(mixed), "--trainer.max_epochs", "3", "--ckpt_path", str(last)]
    assert main(fit_flags(base, rows, tmp_path / "longer", *again)) == 0
    assert set(read_adapter(tmp_path / "longer").pairs) == set(whole)


def test_a_module_whose_name_ends_anothers_has_a_rank_of_its_own():
    inner = torch.nn.ModuleDict({"q": torch.nn.Linear(6, 5)})
    model = torch.nn.ModuleDict({"q": torch.nn.Linear(6, 5), "inner": inner})
    model.prepare_inputs_for_generation = None
    pairs = {n: LowRankPair(torch.randn(r, 6), torch.randn(5, r)) for n, r in (("q", 1), ("inner.q", 2))}
    tuned = Core(Adapter("a", pairs, "", "")).add_to(model).get_base_model()
    for name, pair in pairs.items():
        layer = tuned.get_submodule(name)
        assert layer.r["default"] == pair.rank
        torch.testing.assert_close(layer.get_delta_weight("default"), pair.dense().float())


def test_what_cannot_be_trained_is_one_line(base, adapters, rows, tmp_path, capsys):
    core = ["--model.core", str(adapters["safety"])]
    guard = ["--model.regularizer", "AlignGuard", "--model.regularizer.fisher", "nowhere"]
    assert main(fit_flags(base, rows, tmp_path / "a", *core, *guard)) == 2
    assert "one at a time" in capsys.readouterr().err
    assert main(fit_flags(base, rows, tmp_path / "b", "--model.core", "nowhere")) == 2
    assert "nowhere: no such directory" in capsys.readouterr().err
    assert main(fit_flags(base, rows, tmp_path / "d", "--model.beside", f"{{{adapters['utility']}: .inf}}")) == 2
    assert "expected a finite number" in capsys.readouterr().err
    other = shutil.copytree(adapters["safety"], tmp_path / "other")
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "another"}))
    (other / "manifest.json").unlink(missing_ok=True)
    assert main(fit_flags(base, rows, tmp_path / "c", "--model.beside", json.dumps({str(other): 1.0}))) == 2
    assert "trained on the base 'another'" in capsys.readouterr().err
    assert not (tmp_path / "c" / "adapter_config.json").exists()
