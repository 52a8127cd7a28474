"""Commands on a simulated GPU (:mod:`tests.simulated_gpu`): nothing mixes devices, and all is what a CPU finds."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file

from src.adapters.peft_files import read_adapter
from src.cli import main
from src.data.batches import EncodedRows
from src.fisher.accumulate import examples
from src.fisher.diagonal import DiagonalAccumulator
from src.judges.causal import Causal
from src.judges.classifier import Classifier
from src.models.generation import greedy
from tests.commands import fisher_flags, fit_flags
from tests.conftest import random_adapter
from tests.evaluations import flags, metrics, suites_of_every_kind
from tests.simulated_gpu import GPU, GpuTensor, simulated_gpu, simulated_nccl
from tests.test_judges import ANSWERS, PROMPTS, make_classifier
from tests.test_pipeline import suites
from tests.tiny import make_model, make_tokenizer

pytestmark = pytest.mark.skipif(torch.backends.cuda.is_built(), reason="torch has CUDA and would look for a driver")
FEW = '{"path":"ROWS","answer_tokens":3}'


def both(command, folder):
    """Run a command, made from an output and a hardware file, on the CPU and on the GPU; returns both outputs."""
    assert main(command(folder / "cpu", "cpu.yaml")) == 0
    with simulated_gpu() as waits:
        assert main(command(folder / "gpu", "gpu.yaml")) == 0
    assert sum(waits.values()), "nothing ran on the GPU"
    return folder / "cpu", folder / "gpu"


def test_the_simulation_refuses_what_a_gpu_refuses():
    with simulated_gpu() as waits:
        layer = torch.nn.Linear(4, 5).to("cuda")
        x = torch.randn(3, 4)
        for mixed in (
            lambda: layer(x),
            lambda: x.cuda() + x,
            lambda: x[torch.arange(2, device=GPU)],
            lambda: x.cuda().index_select(0, torch.arange(2)),
            lambda: torch.cat([x, x.cuda()]),
            lambda: torch.zeros(()).add_(x.cuda().sum()),
            lambda: torch.stack([x.cuda().sum(), torch.ones(())]),
            lambda: torch.randn(3, generator=torch.Generator(), device=GPU),
        ):
            with pytest.raises(RuntimeError, match="device"):
                mixed()
        with pytest.raises(TypeError, match="numpy"):
            layer.weight.detach().numpy()
        assert isinstance(layer.weight, GpuTensor)
        assert layer(x.cuda()).device == GPU
        assert (x.cuda()[torch.arange(2)] * torch.tensor(2.0)).cpu().tolist() == (x[:2] * 2).tolist()
        layer(x.cuda()).square().sum().backward()
        assert layer.weight.grad.device == GPU
        for waiting in (layer.weight.grad.sum().item, x.cuda, layer.weight.cpu, layer.weight.detach().tolist):
            before = waits.total()
            waiting()
            assert waits.total() == before + 1
    assert not torch.cuda.is_available()


@pytest.mark.parametrize(
    "more",
    [
        "",
        "--model.gradient_checkpointing true --trainer.accumulate_grad_batches 2",
        "--model.regularizer AlignGuard --model.regularizer.fisher FISHER --model.regularizer.k 4",
        '--model.core SAFETY --model.beside {"UTILITY":1.0}',
    ],
)
def test_training(base, adapters, rows, tmp_path, more):
    places = {"UTILITY": str(adapters["utility"]), "SAFETY": str(adapters["safety"])}
    if "FISHER" in more:
        assert main(fisher_flags(base, adapters, rows, tmp_path / "fisher")) == 0
        places["FISHER"] = str(tmp_path / "fisher")
    for word, place in places.items():
        more = more.replace(word, place)
    cpu, gpu = both(lambda out, hardware: fit_flags(base, rows, out, *more.split(), hardware=hardware), tmp_path)
    expected, found = read_adapter(cpu), read_adapter(gpu)
    assert set(found.pairs) == set(expected.pairs)
    for name, pair in expected.pairs.items():
        torch.testing.assert_close(found.pairs[name].dense(), pair.dense(), rtol=1e-4, atol=1e-6)
    assert found.manifest["val_loss"] == pytest.approx(expected.manifest["val_loss"], rel=1e-5)


def test_a_training_goes_on(base, rows, tmp_path):
    """Two epochs of three, then the third: what three at once give, and fewer waits than they take."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    stop = ["--trainer.callbacks+", "tests.test_pipeline.StopAfter", "--trainer.callbacks.steps", "10"]
    found = []
    for folder, more in ((whole, []), (parts, stop), (parts, ["--resume", "true"])):
        with simulated_gpu() as waits:
            assert main(fit_flags(base, rows, folder, *more, hardware="gpu.yaml")) == 0
        found.append(waits.total())
        if more == stop:
            assert read_adapter(parts).sha256 != read_adapter(whole).sha256
            (parts / "adapter_config.json").unlink()  # a killed run has not written its adapter
    assert 0 < found[1] < found[0]
    assert 0 < found[2] < found[0]
    expected, resumed = read_adapter(whole).pairs, read_adapter(parts).pairs
    for name, pair in expected.items():
        torch.testing.assert_close(resumed[name].dense(), pair.dense())


@pytest.mark.parametrize(
    "more",
    [
        "",
        '--model.relearn true --model.basis union --model.reference_safety {"utility":1.0,"safety":0.5}',
        f"--model.granularity token --data.safety {FEW} --data.utility {FEW}",
        "--model.labels random_tokens --data.random_rows 8",
        "--model.gradient_checkpointing true --model.draws 2",
        "--model.representation block",
        "--model.representation kronecker",
        "--model.representation diagonal --model.coordinates weight",
        "--model.representation kronecker --model.coordinates weight --model.halves false",
        "--model.representation magnitude --model.coordinates weight --model.labels data",
    ],
)
def test_fisher_passes(base, adapters, rows, tmp_path, more):
    given = more.replace("ROWS", str(rows["harmful"])).split()
    cpu, gpu = both(lambda out, hardware: fisher_flags(base, adapters, rows, out, *given, hardware=hardware), tmp_path)
    check_same_fishers(cpu, gpu)


def check_same_fishers(cpu, gpu):
    """Compare everything in the files of two directories: matrices, mean scores, bases."""
    files = sorted(path.name for path in cpu.glob("*.safetensors"))
    assert files == sorted(path.name for path in gpu.glob("*.safetensors"))
    assert files
    for name in files:
        expected, found = load_file(cpu / name), load_file(gpu / name)
        assert set(found) == set(expected)
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-4, atol=1e-6)


def test_the_host_waits_for_no_single_module_of_a_fisher_pass(rows, tmp_path):
    deep = make_model(num_hidden_layers=6)
    deep.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    own = {name: random_adapter(tmp_path / name, tmp_path / "base", 2, 1, deep) for name in ("utility", "safety")}
    found = {}
    for size in (1, 30):
        more = ["--data.batch_size", str(size), "--model.relearn", "true", "--data.utility", str(rows["val"])]
        with simulated_gpu() as waits:
            command = fisher_flags(tmp_path / "base", own, rows, tmp_path / str(size), *more, hardware="gpu.yaml")
            assert main(command) == 0
        found[size] = waits.total()
    batches, modules = 7 + 5 + 5 - 3, 6 * 7  # of harmful rows, and of benign ones at two points
    assert 0 < (found[1] - found[30]) / batches < modules / 2


def test_rows_of_a_large_module_are_added_up_on_the_gpu_and_copied_once(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    sides = [torch.rand(6, 2, side, generator=draw) for side in (3, 5)]

    def measured(*sides):
        accumulator = DiagonalAccumulator({"m": (3, 5)})
        accumulator.begin(examples(torch.arange(6), list("abcdef")))
        accumulator.update("m", *sides)
        return accumulator.finish().sums["m"]

    monkeypatch.setattr("src.fisher.diagonal.ENTRIES", 1)
    expected = measured(*sides)
    with simulated_gpu() as waits:
        given = [side.to(GPU) for side in sides]
        before = waits.total()
        found = measured(*given)
        halves, places_and_weights = 2, 2 * 2
        assert waits.total() - before == halves + places_and_weights
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0.0)


def test_the_host_is_told_of_a_step_of_decoding_once(model, encoded):
    found = {}
    for steps in (4, 24):
        with simulated_gpu() as waits, torch.inference_mode():
            gpu = copy.deepcopy(model).to(GPU)
            batch = EncodedRows(encoded, 256)[(list(range(len(encoded))), 1.0)].to(GPU)
            greedy(gpu, batch, max_new_tokens=steps, stop_ids=[], pad_id=256)
        found[steps] = waits["tolist"], waits.total()
    told, waited = ((many - few) / 20 for few, many in zip(found[4], found[24], strict=True))
    of_transformers = 1  # it looks whether anything is masked
    assert told == 1
    assert waited <= told + of_transformers


def test_evaluation(base, adapters, rows, tmp_path):
    every = suites(rows)[2:] + suites_of_every_kind(tmp_path)
    more = ["--adapters", str(adapters["utility"]), "--model.allow_code_execution", "true"]

    def command(out, hardware):
        return flags(base, tmp_path, every, out, *more, hardware=hardware)

    cpu, gpu = both(command, tmp_path)
    close(metrics(gpu), metrics(cpu))
    for path in sorted((cpu / "answers").rglob("*.jsonl")):
        expected, found = (
            [json.loads(line) for line in (folder / path.relative_to(cpu)).read_text().splitlines()]
            for folder in (cpu, gpu)
        )
        close(found, expected)


def close(found, expected):
    """Compare what JSON holds; floats up to rounding."""
    if isinstance(expected, dict):
        assert set(found) == set(expected)
        for key in expected:
            close(found[key], expected[key])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            close(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6, nan_ok=True)
    else:
        assert found == expected


def test_processes_talk_by_tensors_of_the_gpu(base, adapters, rows, tmp_path):
    """NCCL takes no others. A training's gradients are torch's to reduce: DistributedDataParallel is not simulated."""
    suite = {"name": "safe", "kind": "borderline", "rows": str(rows["eval_safe"]), "max_new_tokens": 2}

    def fisher(out, hardware):
        return fisher_flags(base, adapters, rows, out, "--model.relearn", "true", hardware=hardware)

    def test(out, hardware):
        return flags(base, tmp_path, [suite], out, hardware=hardware)

    for name, command in (("fisher", fisher), ("test", test)):
        assert main(command(tmp_path / name / "cpu", "cpu.yaml")) == 0
        with simulated_gpu(), simulated_nccl() as collectives:
            assert main(command(tmp_path / name / "gpu", "ddp.yaml")) == 0
        assert collectives["allreduce_.default"]
        assert collectives["allgather_.default"]
    check_same_fishers(tmp_path / "fisher" / "cpu", tmp_path / "fisher" / "gpu")
    close(metrics(tmp_path / "test" / "gpu"), metrics(tmp_path / "test" / "cpu"))


def test_judges(base, tmp_path):
    kinds = [
        lambda: Causal(str(base), yes="yes", no="no", dtype="float64"),
        lambda: Classifier(str(make_classifier(tmp_path)), positive="harmful"),
    ]
    for kind in kinds:
        found = {}
        with simulated_gpu():
            for device in ("cpu", "cuda"):
                judge = kind()
                with GPU:  # Lightning loads models there; a judge is tried on the CPU all the same
                    judge.load(device)
                assert judge._model.device.type == ("cpu" if device == "cpu" else "cuda")
                found[device] = [one.score for one in judge.judge(PROMPTS, ANSWERS)]
                judge.unload()
        assert found["cuda"] == pytest.approx(found["cpu"], rel=1e-5)
