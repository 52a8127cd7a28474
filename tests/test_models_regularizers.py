"""AlignGuard's training penalty against a slow dense twin, and through the fit command."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model

from src.adapters.peft_files import read_adapter
from src.cli import main
from src.errors import InputError
from src.files import sha256_file
from src.fisher.files import FisherFile, load_fisher
from src.models.regularizers import AlignGuard, trained_layers
from tests.commands import fit_flags
from tests.merging import write_fishers
from tests.tiny import make_model

BOTH = {"align": 0.7, "task": 0.3, "collision": 0.2, "blend": 0.4, "k": 4}


@pytest.fixture(scope="module")
def fisher(adapters, base, tmp_path_factory):
    return write_fishers(tmp_path_factory.mktemp("fisher"), adapters, base)


@pytest.fixture
def peft():
    """A PEFT model whose update is not zero."""
    torch.manual_seed(0)
    model = get_peft_model(make_model(), LoraConfig(r=3, lora_alpha=6, target_modules="all-linear")).double()
    for layer in trained_layers(model).values():
        torch.nn.init.normal_(layer.b, std=0.3)
    return model


def dense_penalty(model, file, *, align, task, collision, blend, k):
    """The penalty from whole matrices, one entry of the Fisher matrix at a time."""
    values, vectors = torch.linalg.eigh(file.fisher.dense())
    values, vectors = values[-k:], vectors[:, -k:]
    deltas = {name: layer.scale * layer.b @ layer.a for name, layer in trained_layers(model).items()}
    c = torch.cat([(file.u[n].T @ deltas[n] @ file.v[n]).reshape(-1) for n in file.u])
    critical = vectors @ vectors.T @ c
    parts = dict(zip(file.u, critical.split([p * q for p, q in file.shapes.values()]), strict=True))
    inside = {n: file.u[n] @ parts[n].view(file.shapes[n]) @ file.v[n].T for n in parts}
    rest = {n: delta - inside.get(n, torch.zeros_like(delta)) for n, delta in deltas.items()}
    total = align * critical @ (vectors @ values.diag() @ vectors.T) @ critical
    total = total + task * sum(r.square().sum() for r in rest.values())
    for name, part in inside.items():
        overlap = (part.abs() * rest[name].abs()).sum()
        cosine = (part * rest[name]).sum() / (part.norm() * rest[name].norm())
        total = total + collision * (blend * overlap + (1 - blend) * cosine**2)
    return total


@pytest.mark.parametrize("off", [{}, {"align": 0.0}, {"task": 0.0}, {"collision": 0.0}, {"blend": 0.0}])
def test_the_penalty_and_its_gradient_are_the_dense_twins(peft, fisher, off):
    options = BOTH | off
    guard = AlignGuard(str(fisher), **options)
    guard.bind(peft, "")
    file = load_fisher(fisher / "safety.safetensors")
    weights = [w for layer in trained_layers(peft).values() for w in (layer.a, layer.b)]
    found, expected = guard.penalty(), dense_penalty(peft, file, **options)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
    gradients = torch.autograd.grad(found, weights), torch.autograd.grad(expected, weights)
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-9)


def test_an_update_of_zero_costs_nothing(fisher):
    model = get_peft_model(make_model(), LoraConfig(r=2, target_modules="all-linear"))
    guard = AlignGuard(str(fisher), **BOTH)
    guard.bind(model, "")
    penalty = guard.penalty()
    assert penalty.item() == 0.0
    penalty.backward()
    assert all(torch.isfinite(layer.b.grad).all() for layer in trained_layers(model).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_are_read_on_the_cpu_wherever_and_in_whatever_format_modules_are_built(peft, fisher, dtype):
    expected = AlignGuard(str(fisher), **BOTH)
    expected.bind(peft.to(dtype), "")
    guard = AlignGuard(str(fisher), **BOTH)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):  # as on a GPU: Lightning builds modules there
            guard.bind(peft.float(), "")
    finally:
        torch.set_default_dtype(torch.float32)
    peft.to(dtype)  # as the Trainer does afterwards
    assert guard.penalty().dtype == torch.float32
    torch.testing.assert_close(guard.penalty(), expected.penalty())


def fit(base, rows, output, fisher, align):
    flags = ["--model.regularizer", "AlignGuard", "--model.regularizer.fisher", str(fisher)]
    return main(fit_flags(base, rows, output, *flags, "--model.regularizer.k", "4", "--model.regularizer.align", align))


def critical_energy(folder, fisher):
    """Safety energy of a trained update in the file's metric."""
    file = load_fisher(fisher / "safety.safetensors")
    pairs = read_adapter(folder).pairs
    return file.fisher.energy(torch.cat([(file.u[n].T @ pairs[n].dense() @ file.v[n]).reshape(-1) for n in file.u]))


def test_fit_keeps_the_update_out_of_the_critical_directions(base, rows, fisher, tmp_path):
    assert fit(base, rows, tmp_path / "free", fisher, "0.0") == 0
    assert fit(base, rows, tmp_path / "held", fisher, "10.0") == 0
    free, held = (critical_energy(tmp_path / name, fisher) for name in ("free", "held"))
    assert held < 0.7 * free
    recorded = json.loads((tmp_path / "held" / "manifest.json").read_text())["settings"]["model"]["regularizer"]
    assert recorded["init_args"]["align"] == 10.0
    # Its Fisher file was measured on rows, and the expert has seen them through it.
    assert "safety-prompt" in read_adapter(tmp_path / "held").seen
    files = json.loads((tmp_path / "held" / "manifest.json").read_text())["regularizer"]
    assert files == [{"path": f"{fisher}/safety.safetensors", "sha256": sha256_file(fisher / "safety.safetensors")}]
    assert "penalty" in (tmp_path / "held" / "run" / "metrics.csv").read_text().splitlines()[0]


def test_files_that_do_not_fit_are_refused(peft, fisher, tmp_path):
    with pytest.raises(InputError, match="no such file"):
        AlignGuard(str(tmp_path)).bind(peft, "")
    shutil.copy(fisher / "safety.safetensors", tmp_path)
    file = load_fisher(tmp_path / "safety.safetensors")
    other = file.record | {"base": {"name": "x", "fingerprint": "one"}}
    FisherFile(file.fisher, file.u, file.v, other).save(tmp_path / "safety.safetensors")
    with pytest.raises(InputError, match="other weights of the base"):
        AlignGuard(str(tmp_path), k=4).bind(peft, "two")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"align": -1.0}, "regularizer.align is -1.0"), ({"k": 0}, "k 0"), ({"blend": 2.0}, "blend 2.0")],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        AlignGuard("x", **options)
