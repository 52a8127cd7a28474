"""The fisher command on the tiny model: every representation, killed and damaged passes, any number of processes."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from lightning import Callback
from safetensors.torch import load_file, save_file

from src.adapters.attach import attached
from src.adapters.pairs import weighted_sum
from src.adapters.peft_files import read_adapter
from src.cli import main
from src.data.batches import EncodedRows
from src.data.chat import Encoder
from src.data.sources import load_rows
from src.fisher.files import load_fisher
from src.models.fisher import FisherModule
from tests.commands import ROOT, clean_environment, fisher_flags, launch, run_processes
from tests.oracles import autograd_scores
from tests.tiny import make_model

PASSES = ("safety", "utility")
DATA = ["--model.labels", "data"]


class KillAt(Callback):
    """Ends the process as SIGKILL does, in the middle of the second pass."""

    signal = signal.SIGKILL

    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        if (dataloader_idx, batch_idx) == (1, 4):
            os.kill(os.getpid(), self.signal)


class TerminateAt(KillAt):
    """Sends SIGTERM there, as ``kill``, a container's stop and SLURM do."""

    signal = signal.SIGTERM


def encode(tokenizer, path):
    encoder = Encoder(tokenizer, max_length=512)
    encoded = [encoder.encode(row) for row in load_rows([str(p) for p in path], need_response=True)]
    return EncodedRows(encoded, 256)[(list(range(len(encoded))), 1.0)]


def expected_scores(adapters, reference, batch, u, v):
    """Scores by autograd, one example at a time, with the reference point in the weights."""
    model = make_model()
    for module, pair in weighted_sum([read_adapter(adapters[n]).pairs for n in reference], reference.values()).items():
        model.get_submodule(module).weight += pair.dense()
    with attached(model, {}):
        return autograd_scores(model, batch, u, v)


def run(base, adapters, rows, folder, *more):
    assert main(fisher_flags(base, adapters, rows, folder, *more)) == 0
    return {path.stem: load_fisher(path) for path in sorted(folder.glob("*.safetensors"))}


@pytest.mark.parametrize("representation", ["block", "diagonal", "kronecker"])
def test_every_representation_is_that_of_the_exact_scores(base, adapters, rows, tmp_path, representation):
    exact = run(base, adapters, rows, tmp_path / "exact", *DATA)
    found = run(base, adapters, rows, tmp_path / "found", *DATA, "--model.representation", representation)
    for name in PASSES:
        scores, fisher = exact[name].fisher.scores, found[name].fisher
        dense = scores.T @ scores / len(scores)
        assert fisher.count == len(scores)
        assert found[name].record["representation"] == representation
        if representation == "diagonal":
            torch.testing.assert_close(fisher.dense().diagonal(), dense.diagonal())
        if representation == "block":
            sizes = [p * q for p, q in found[name].shapes.values()]
            mask = torch.block_diag(*(torch.ones(n, n, dtype=torch.float64) for n in sizes))
            torch.testing.assert_close(fisher.dense(), dense * mask)
        # K-FAC is no function of the scores; its parts are tested in test_fisher_representations.
        assert fisher.trace() > 0
        first, second = fisher.halves(0)
        assert first.count + second.count == fisher.count


def test_weight_coordinates_hold_every_entry(base, adapters, rows, tmp_path, tokenizer):
    flags = [*DATA, "--model.representation", "diagonal", "--model.coordinates", "weight"]
    found = run(base, adapters, rows, tmp_path / "out", *flags)["utility"]
    batch = encode(tokenizer, [rows["benign"], rows["task"]])
    identity = {name: torch.eye(o, dtype=torch.float64) for name, (o, _) in found.shapes.items()}
    inputs = {name: torch.eye(i, dtype=torch.float64) for name, (_, i) in found.shapes.items()}
    scores = expected_scores(adapters, {"utility": 1.0}, batch, identity, inputs)
    torch.testing.assert_close(found.fisher.dense().diagonal(), scores.square().mean(0))
    assert found.record["coordinates"] == "weight"
    assert found.u == {}


def test_lowrank_has_no_weight_coordinates(base, adapters, rows, tmp_path, capsys):
    flags = fisher_flags(base, adapters, rows, tmp_path / "out", "--model.coordinates", "weight")
    assert main(flags) == 2
    assert "expected kronecker or diagonal" in capsys.readouterr().err


def test_any_weighted_sum_of_adapters_is_a_reference_point(base, adapters, rows, tmp_path, tokenizer):
    reference = {"utility": 0.5, "safety": -0.25, str(adapters["safety"]): 1.0}
    flags = [*DATA, f"--model.reference_safety={json.dumps(reference)}"]
    found = run(base, adapters, rows, tmp_path / "out", *flags)["safety"]
    batch = encode(tokenizer, [rows["harmful"]])
    expected = expected_scores(adapters, {"utility": 0.5, "safety": 0.75}, batch, found.u, found.v)
    # The factors of adapters are scaled in their own format, float32.
    assert (found.fisher.scores - expected).norm() / expected.norm() < 1e-6


def test_weighted_sources_give_the_weighted_mean(base, adapters, rows, tmp_path):
    plain = run(base, adapters, rows, tmp_path / "plain", *DATA)["utility"].fisher.scores
    flags = [*DATA, "--data.utility_weights", "[3,1]"]
    found = run(base, adapters, rows, tmp_path / "out", *flags)["utility"].fisher
    benign, task = plain[:9], plain[9:]
    expected = (3 * benign.T @ benign / 9 + task.T @ task / 13) / 4
    torch.testing.assert_close(found.dense(), expected)


def test_rows_of_a_source_may_count_more_than_others(base, adapters, rows, tmp_path):
    plain = run(base, adapters, rows, tmp_path / "plain", *DATA)["utility"].fisher.scores
    heavy = json.dumps([{"path": str(rows["benign"]), "weight": 8}, str(rows["task"])])
    found = run(base, adapters, rows, tmp_path / "out", *DATA, f"--data.utility={heavy}")["utility"].fisher
    benign, task = plain[:9], plain[9:]
    expected = (8 * benign.T @ benign + task.T @ task) / (8 * 9 + 13)
    torch.testing.assert_close(found.dense(), expected)


def test_token_scores_sum_to_those_of_their_row(base, adapters, rows, tmp_path):
    whole = run(base, adapters, rows, tmp_path / "whole", *DATA)["safety"].fisher
    parts = run(base, adapters, rows, tmp_path / "parts", *DATA, "--model.granularity", "token")["safety"].fisher
    summed = torch.zeros_like(whole.scores).index_add_(0, parts.groups, parts.scores)
    torch.testing.assert_close(summed, whole.scores)
    assert parts.count > whole.count


def test_a_score_of_the_first_tokens_is_the_sum_of_theirs(base, adapters, rows, tmp_path):
    by_token = [*DATA, "--model.granularity", "token"]
    parts = run(base, adapters, rows, tmp_path / "parts", *by_token)["safety"].fisher
    source = json.dumps({"path": str(rows["harmful"]), "answer_tokens": 2})
    found = run(base, adapters, rows, tmp_path / "out", *DATA, f"--data.safety={source}")["safety"].fisher
    place = torch.tensor([int((parts.groups[:i] == group).sum()) for i, group in enumerate(parts.groups)])
    first = place < 2
    summed = torch.zeros_like(found.scores).index_add_(0, parts.groups[first], parts.scores[first])
    torch.testing.assert_close(found.scores, summed)
    assert first.sum() < parts.count


def test_random_tokens_need_no_data(base, adapters, rows, tmp_path):
    flags = ["--model.labels", "random_tokens", "--data.safety", "null", "--data.utility", "null"]
    sizes = ["--data.random_rows", "6", "--data.random_prompt", "[2,5]", "--data.random_answer", "[1,4]"]
    found = run(base, adapters, rows, tmp_path / "out", *flags, *sizes)
    assert found["utility"].fisher.count == 6
    assert found["utility"].record["labels"] == "random_tokens"
    assert found["utility"].record["rows"][0] == "random/0/0"
    again = run(base, adapters, rows, tmp_path / "again", *flags, *sizes, "--data.batch_size", "5")
    torch.testing.assert_close(found["safety"].fisher.scores, again["safety"].fisher.scores)


def test_relearning_has_a_third_pass_and_mean_scores(base, adapters, rows, tmp_path):
    found = run(base, adapters, rows, tmp_path / "out", "--model.relearn", "true")
    exact = run(base, adapters, rows, tmp_path / "exact", *DATA, "--model.reference_utility", "patched")
    assert list(found) == ["benign", "safety", "utility"]
    assert found["utility"].mean is None
    torch.testing.assert_close(found["safety"].mean, exact["safety"].fisher.scores.mean(0))
    torch.testing.assert_close(found["benign"].mean, exact["utility"].fisher.scores.mean(0))


def tensors(folder):
    return {name: load_file(folder / f"{name}.safetensors") for name in PASSES}


@pytest.mark.processes
@pytest.mark.parametrize("representation", ["lowrank", "block", "magnitude"])
def test_a_killed_pass_goes_on_from_its_last_shard(base, adapters, rows, tmp_path, capsys, representation):
    flags = ["--model.representation", representation, "--model.shard_rows", "4"]
    flags += ["--model.coordinates", "weight"] if representation == "magnitude" else []
    assert main(fisher_flags(base, adapters, rows, tmp_path / "whole", *flags)) == 0
    command = fisher_flags(base, adapters, rows, tmp_path / "cut", *flags)
    kill = ["--trainer.callbacks+=tests.test_fisher_command.KillAt"]
    run_processes([*command, *kill], code=-signal.SIGKILL, ranks=None)
    shards = sorted((tmp_path / "cut" / ".parts").rglob("*.safetensors"))
    assert len(shards) == 2 + 2
    assert not list((tmp_path / "cut").glob("*.safetensors"))
    damaged = bytearray(shards[0].read_bytes())
    damaged[-3] ^= 1
    shards[0].write_bytes(damaged)
    kept = shards[1].stat().st_mtime_ns
    os.utime(shards[1], ns=(kept, kept))
    capsys.readouterr()
    assert main(command) == 0
    output = " ".join(capsys.readouterr().err.split())
    assert "does not match its checksum" in output
    assert "F_safety: 1 parts of an interrupted pass are kept" in output
    assert "F_utility: 2 parts of an interrupted pass are kept" in output
    for name, whole in tensors(tmp_path / "whole").items():
        cut = tensors(tmp_path / "cut")[name]
        assert list(whole) == list(cut)
        assert all(torch.equal(whole[key], cut[key]) for key in whole)
    assert not (tmp_path / "cut" / ".parts").exists()


@pytest.mark.processes
@pytest.mark.parametrize("hardware", ["cpu.yaml", "ddp_sim.yaml"])
def test_a_terminated_pass_stops_after_its_batch_and_goes_on_later(base, adapters, rows, tmp_path, capsys, hardware):
    flags = ["--model.shard_rows", "4", "--data.batch_size", "1"]
    command = fisher_flags(base, adapters, rows, tmp_path / "cut", *flags, hardware=hardware)
    stop = ["--trainer.callbacks+=tests.test_fisher_command.TerminateAt"]
    one = hardware == "cpu.yaml"
    said = run_processes([*command, *stop], 2, ranks=None) if one else launch([*command, *stop], 2)
    assert "error: interrupted; what was finished is kept" in said
    assert not list((tmp_path / "cut").glob("*.safetensors"))
    assert list((tmp_path / "cut" / ".parts").rglob("*.safetensors"))
    if one:
        assert main(command) == 0
        assert "parts of an interrupted pass are kept" in " ".join(capsys.readouterr().err.split())
        assert main(fisher_flags(base, adapters, rows, tmp_path / "whole", *flags)) == 0
        for name, whole in tensors(tmp_path / "whole").items():
            assert all(torch.equal(value, tensors(tmp_path / "cut")[name][key]) for key, value in whole.items())


@pytest.mark.processes
def test_parts_of_a_pass_with_other_settings_are_not_read(base, adapters, rows, tmp_path):
    command = fisher_flags(base, adapters, rows, tmp_path / "cut", "--model.shard_rows", "4")
    kill = ["--trainer.callbacks+=tests.test_fisher_command.KillAt"]
    run_processes([*command, *kill], code=-signal.SIGKILL, ranks=None)
    other = ["--model.shard_rows", "4", "--model.seed", "5"]
    assert main(fisher_flags(base, adapters, rows, tmp_path / "cut", *other)) == 0
    assert main(fisher_flags(base, adapters, rows, tmp_path / "whole", *other)) == 0
    for name, whole in tensors(tmp_path / "whole").items():
        assert all(torch.equal(value, tensors(tmp_path / "cut")[name][key]) for key, value in whole.items())


@pytest.mark.processes
@pytest.mark.parametrize("representation", ["lowrank", "kronecker"])
def test_three_processes_of_which_one_has_no_row(base, adapters, rows, tmp_path, representation):
    # Batches of 4: 7 harmful rows make two batches for three processes.
    flags = ["--model.representation", representation, "--data.batch_size", "4", "--model.relearn", "true"]
    assert main(fisher_flags(base, adapters, rows, tmp_path / "one", *flags)) == 0
    three = ["--trainer.devices", "3"]
    command = fisher_flags(base, adapters, rows, tmp_path / "three", *flags, *three, hardware="ddp_sim.yaml")
    run_processes(command, ranks=3)
    for name in (*PASSES, "benign"):
        one, other = (load_file(tmp_path / count / f"{name}.safetensors") for count in ("one", "three"))
        for key, value in one.items():
            torch.testing.assert_close(other[key], value, rtol=1e-10, atol=1e-12)


@pytest.mark.processes
def test_two_nodes_joined_by_torchrun(base, adapters, rows, tmp_path):
    import socket

    assert main(fisher_flags(base, adapters, rows, tmp_path / "one")) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = ["--trainer.num_nodes", "2", "--trainer.devices", "1", "--trainer.strategy", "ddp"]
    command = fisher_flags(base, adapters, rows, tmp_path / "two", *nodes)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
    rendezvous = ["--master_addr", "127.0.0.1", "--master_port", str(port)]
    processes = [
        subprocess.Popen(
            [*launch, "--node_rank", str(rank), *rendezvous, "-m", "src", *command],
            cwd=ROOT,
            env=clean_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs[0][-2000:] + outputs[1][-2000:]
    for name in PASSES:
        one, two = (load_fisher(tmp_path / count / f"{name}.safetensors") for count in ("one", "two"))
        assert (one.fisher.scores - two.fisher.scores).norm() / one.fisher.scores.norm() < 1e-10
        assert one.record["rows"] == two.record["rows"]


def test_a_full_disk_is_one_line_and_keeps_the_parts(base, adapters, rows, tmp_path, capsys, monkeypatch):
    def full(descriptor, start, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert main(fisher_flags(base, adapters, rows, tmp_path / "out")) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "No space left" in errors[0]
    assert not list((tmp_path / "out").glob("*.safetensors"))
    monkeypatch.undo()
    assert main(fisher_flags(base, adapters, rows, tmp_path / "out")) == 0
    assert "1 parts of an interrupted pass are kept" in capsys.readouterr().err


def test_a_dry_run_prints_sizes_and_loads_no_weights(base, adapters, rows, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("src.models.fisher.load_model", None)
    assert main(fisher_flags(base, adapters, rows, tmp_path / "out", "--dry_run", "true")) == 0
    output = capsys.readouterr().out
    assert "F_safety 7, F_utility 22" in output
    assert "D = 56" in output
    assert not (tmp_path / "out").exists()


def test_the_estimate_of_a_70b_model_is_its_arithmetic(tmp_path, rows, tokenizer):
    from transformers import LlamaConfig

    from src.data.calibration import CalibrationData
    from src.models.base import BaseSpec
    from src.models.estimate import Hardware, Kept, estimate

    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    config = LlamaConfig(**sizes, num_key_value_heads=8, vocab_size=128256)
    config.save_pretrained(tmp_path / "llama-70b")
    layers = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    shapes = {f"model.layers.{i}.{layer}": (16, 16) for i in range(80) for layer in layers}
    data = CalibrationData(safety=str(rows["harmful"]), utility=[str(rows["benign"]), str(rows["val"])], batch_size=2)
    data.bind(tokenizer)
    data.bind_passes({"safety": "safety", "utility": "utility"}, [])
    data.setup("predict")
    spec = BaseSpec(name=str(tmp_path / "llama-70b"), dtype="bfloat16")
    options = {"draws": 1, "halves": True, "shard_rows": 4, "weight_coordinates": False}
    found = estimate(spec, shapes, data, Kept("lowrank", **options), Hardware())
    assert found.dim == 560 * 256
    assert found.shards == (7 + 9 + 5) * 4 * found.dim
    assert found.sums == 4 * 4 * found.dim
    assert found.weights == pytest.approx(2 * 70.55e9, rel=1e-3)
    per_layer = 2 * (8192 + 8192) + 2 * (1024 + 8192) + 3 * (8192 + 28672)
    assert found.disk - found.shards == 2 * 8 * 16 * 80 * per_layer
    blocks = estimate(spec, shapes, data, Kept("block", **options), Hardware())
    assert blocks.sums == 2 * 8 * 560 * 256**2
    weights = estimate(spec, shapes, data, Kept("magnitude", **options | {"weight_coordinates": True}), Hardware())
    assert weights.sums == 2 * 8 * weights.dim == weights.disk // 2
    assert weights.dim == 80 * (2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672)
    sharded = estimate(spec, shapes, data, Kept("lowrank", **options), Hardware(processes=8, shards=8))
    assert sharded.weights == found.weights // 8


def tokens_of(tokenizer, path):
    encoder = Encoder(tokenizer, max_length=512)
    encoded = [encoder.encode(row) for row in load_rows([str(path)], need_response=True)]
    return sum(len(row.ids) - row.answer_start for row in encoded)


def test_weighted_sources_at_token_granularity_give_the_weighted_mean(base, adapters, rows, tmp_path, tokenizer):
    flags = [*DATA, "--model.granularity", "token"]
    plain = run(base, adapters, rows, tmp_path / "plain", *flags)["utility"].fisher
    benign, task = plain.scores[plain.groups < 9], plain.scores[plain.groups >= 9]
    expected = (3 * benign.T @ benign / len(benign) + task.T @ task / len(task)) / 4
    assert len(benign) == tokens_of(tokenizer, rows["benign"])
    weights = ["--data.utility_weights", "[3,1]"]
    exact = run(base, adapters, rows, tmp_path / "exact", *flags, *weights)["utility"].fisher
    torch.testing.assert_close(exact.dense(), expected)
    diagonal = ["--model.representation", "diagonal"]
    found = run(base, adapters, rows, tmp_path / "found", *flags, *weights, *diagonal)["utility"].fisher
    torch.testing.assert_close(found.diagonal(), expected.diagonal())
    assert exact.count == found.count == len(plain.scores)


@pytest.mark.parametrize("limit", ["1", "2", "0.5"])
def test_a_part_of_the_batches_is_refused(base, adapters, rows, tmp_path, capsys, limit):
    flags = fisher_flags(base, adapters, rows, tmp_path / "out", "--trainer.limit_predict_batches", limit)
    assert main(flags) == 2
    assert f"trainer.limit_predict_batches is {limit}" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def full_at(monkeypatch, name):
    """A disk that is full when the file of a pass is written."""
    from src.models import fisher

    write = fisher.write_pass

    def failing(module, written, *rest):
        if written == name:
            raise OSError(28, "No space left on device")
        write(module, written, *rest)

    monkeypatch.setattr(fisher, "write_pass", failing)


def test_files_appear_together_and_nothing_is_left_beside_them(base, adapters, rows, tmp_path, monkeypatch, capsys):
    command, out = fisher_flags(base, adapters, rows, tmp_path / "out"), tmp_path / "out"
    full_at(monkeypatch, "utility")
    assert main(command) == 2
    assert not list(out.glob("*.safetensors"))
    monkeypatch.undo()
    stale = out / ".parts" / "utility" / ".00000-000000.safetensors.x.tmp"
    stale.write_bytes(b"what SIGKILL leaves")
    capsys.readouterr()
    full_at(monkeypatch, "safety")
    assert main(command) == 2
    assert (stale.parent.exists(), stale.exists()) == (True, False)
    monkeypatch.undo()
    assert main(command) == 0
    assert not (out / ".parts").exists()
    assert "parts of an interrupted pass are kept" in capsys.readouterr().err
    assert sorted(path.name for path in out.glob("*.safetensors")) == ["safety.safetensors", "utility.safetensors"]


@pytest.mark.parametrize(
    ("flags", "chosen"),
    [([], "highest"), (["--model.max_matmul_error", "1e-4"], "highest"), ([], "medium")],
)
def test_parts_of_another_arithmetic_are_not_read(
    base, adapters, rows, tmp_path, capsys, monkeypatch, request, flags, chosen
):
    request.addfinalizer(lambda: torch.set_float32_matmul_precision("highest"))
    command = fisher_flags(base, adapters, rows, tmp_path / "out")
    full_at(monkeypatch, "safety")
    assert main(command) == 2
    monkeypatch.undo()
    monkeypatch.setattr("src.models.fisher.choose_matmul", lambda *_, **__: chosen)
    capsys.readouterr()
    assert main([*command, *flags]) == 0
    same = not flags and chosen == "highest"
    assert ("parts of an interrupted pass are kept" in capsys.readouterr().err) == same


def test_a_part_that_is_damaged_before_the_end_is_measured_again(base, adapters, rows, tmp_path, capsys, monkeypatch):
    from src.models.fisher import FisherModule

    flags = [*DATA, "--model.representation", "block", "--model.shard_rows", "4"]
    assert main(fisher_flags(base, adapters, rows, tmp_path / "whole", *flags)) == 0
    part = tmp_path / "out" / ".parts" / "utility" / "00000-000000.safetensors"
    leave = FisherModule._leave

    def damaging(self):
        leave(self)
        if part.exists():
            damaged = bytearray(part.read_bytes())
            damaged[-3] ^= 1
            part.write_bytes(damaged)

    monkeypatch.setattr(FisherModule, "_leave", damaging)
    command = fisher_flags(base, adapters, rows, tmp_path / "out", *flags)
    assert main(command) == 2
    assert "F_utility hold 18 of 22 rows" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(command) == 0
    assert "F_utility: 5 parts of an interrupted pass are kept" in capsys.readouterr().err
    for name, whole in tensors(tmp_path / "whole").items():
        assert all(torch.equal(value, tensors(tmp_path / "out")[name][key]) for key, value in whole.items())


def test_the_estimate_counts_answer_tokens_and_every_part(base, rows, tokenizer):
    from src.data.calibration import CalibrationData
    from src.models.base import BaseSpec
    from src.models.estimate import Hardware, Kept, estimate

    data = CalibrationData(safety=str(rows["harmful"]), batch_size=2)
    data.bind(tokenizer)
    data.bind_passes({"safety": "safety"}, [])
    data.setup("predict")
    shapes = {"model.layers.0.self_attn.q_proj": (2, 3)}
    options = {"draws": 1, "halves": True, "shard_rows": 4, "weight_coordinates": False}

    def of(representation, processes=1, **more):
        spec = BaseSpec(name=str(base), dtype="float32")
        return estimate(spec, shapes, data, Kept(representation, **options | more), Hardware(processes))

    tokens = of("lowrank", granularity="token")
    assert tokens.shards == 4 * 6 * tokens_of(tokenizer, rows["harmful"])
    assert of("lowrank").sums < tokens.sums < tokens.shards
    # 7 rows are 4 batches: 2 parts of one process, 3 of three with a batch or two each.
    assert of("diagonal").shards == 2 * (2 * 8 * 6)
    assert of("diagonal", processes=3).shards == 3 * (2 * 8 * 6)
    weights = of("diagonal", weight_coordinates=True)
    assert weights.shards == 3 * weights.sums
    assert weights.peak == weights.weights + weights.activations


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.utility_weights", "[.nan]"], "model.utility_weights is [nan]; expected 1 finite numbers"),
        (["--model.utility_weights", "[1,2]"], "model.utility_weights is [1.0, 2.0]; expected 1 finite numbers"),
        (["--model.utility", "[]"], "model.utility names no adapter"),
        (
            ["--model.reference_utility", '{"utility":.inf}'],
            "the weight of utility is inf times [1.0]; expected finite",
        ),
        (["--model.utility_weights", "[1e200]"], "NaN or infinite; see whether the base with the adapters"),
        (["--data.utility_weights", "[.inf,1]"], "expected 2 numbers above 0, finite"),
        (["--model.max_matmul_error", "-1"], "model.max_matmul_error is -1.0; expected a number above 0"),
        (["--model.relearn", "true", "--model.labels", "random_tokens"], "model.relearn: rows of random tokens"),
        (
            ["--model.relearn", "true", "--model.coordinates", "weight", "--model.representation", "diagonal"],
            "model.relearn: re-learned coefficients are of cores",
        ),
    ],
)
def test_settings_that_measure_nothing_are_refused(base, adapters, rows, tmp_path, capsys, flags, message):
    assert main(fisher_flags(base, adapters, rows, tmp_path / "out", *flags)) == 2
    errors = capsys.readouterr().err
    assert message in " ".join(errors.split())
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_an_adapter_without_updates_is_refused(base, adapters, rows, tmp_path, capsys):
    zero = tmp_path / "zero"
    shutil.copytree(adapters["safety"], zero)
    tensors = load_file(zero / "adapter_model.safetensors")
    save_file({name: tensor * 0 for name, tensor in tensors.items()}, zero / "adapter_model.safetensors")
    assert main(fisher_flags(base, adapters | {"safety": zero}, rows, tmp_path / "out")) == 2
    assert f"{zero}: the adapters update no module" in " ".join(capsys.readouterr().err.split())


def test_another_scaling_of_a_reference_adapter_is_another_pass(base, adapters, rows, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(adapters["utility"], other)
    point = ["--model.reference_safety", json.dumps({"utility": 1.0, str(other): 1.0}), *DATA]
    before = run(base, adapters, rows, tmp_path / "one", *point)["safety"].record
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 4 * config["lora_alpha"]}))
    after = run(base, adapters, rows, tmp_path / "two", *point)["safety"].record
    assert before["reference_identity"] != after["reference_identity"]
    assert before["trace"] != after["trace"]


def estimates(monkeypatch):
    """What the command estimates from now on."""
    found = []
    original = FisherModule.estimate

    def kept(self, *given):
        found.append(original(self, *given))
        return found[-1]

    monkeypatch.setattr(FisherModule, "estimate", kept)
    return found


@pytest.mark.parametrize(
    "flags",
    [
        ["--model.relearn", "true"],
        ["--model.relearn", "true", "--model.reference_safety", "{utility: 1.0, safety: 0.5}"],
        ["--model.representation", "diagonal", "--model.relearn", "true", "--model.halves", "false"],
        ["--model.draws", "3", "--model.labels_utility", "data"],
        ["--model.base.dtype", "float32", "--trainer.precision", "64-true"],
        ["--model.base.dtype", "float32", "--model.representation", "block"],
    ],
)
def test_the_estimate_of_the_disk_is_what_the_files_hold(base, adapters, rows, tmp_path, monkeypatch, flags):
    found = estimates(monkeypatch)
    assert main(fisher_flags(base, adapters, rows, tmp_path / "out", *flags)) == 0
    tensors = [load_file(path) for path in (tmp_path / "out").glob("*.safetensors")]
    held = sum(t.numel() * t.itemsize for own in tensors for name, t in own.items() if name != "counts")
    assert found[0].disk == held
    if "--model.labels_utility" in flags:
        labels = {path.stem: load_fisher(path).record["labels"] for path in (tmp_path / "out").glob("*.safetensors")}
        assert labels == {"safety": "model", "utility": "data"}


def test_recomputed_activations_take_less_memory(base, adapters, rows, tmp_path, monkeypatch):
    found = estimates(monkeypatch)
    for given in ("false", "true"):
        flags = ["--dry_run", "true", "--model.gradient_checkpointing", given]
        assert main(fisher_flags(base, adapters, rows, tmp_path / "out", *flags)) == 0
    assert found[1].activations < found[0].activations
