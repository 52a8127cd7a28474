"""What a step of a training is: the mean over its answer tokens, however it is put together; its seeds; its end."""

import json

import pytest
import torch

from src.adapters.peft_files import read_adapter
from src.cli import main
from src.data.batches import LengthBatches
from src.errors import InputError
from src.models.lora import LoraSpec, add_lora
from tests.commands import fit_flags, run_processes
from tests.tiny import make_model

ONE_STEP = (
    *("--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.5", "--model.schedule", "constant"),
    *("--model.warmup", "0", "--trainer.gradient_clip_val", "null", "--trainer.max_epochs", "1"),
)
SHORT_EPOCH = ("--trainer.max_epochs", "1")


@pytest.fixture(scope="module")
def uneven(tmp_path_factory, rows):
    """13 rows whose answers have one word or many."""
    path = tmp_path_factory.mktemp("uneven") / "rows.jsonl"
    answers = ("No.", "Take two steps, then stop and think about it once more, slowly.")
    lines = [{"id": str(i), "prompt": f"question {i}", "response": answers[i % 2]} for i in range(13)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return dict(rows) | {"task": path}


def update(folder):
    return {name: pair.b.double() @ pair.a.double() for name, pair in read_adapter(folder).pairs.items()}


def trained(base, rows, folder, *more):
    assert main(fit_flags(base, rows, folder, *more)) == 0
    return update(folder)


def same(one, two):
    """Whether two updates are equal but for float32's rounding."""
    distance = sum((one[name] - two[name]).square().sum() for name in one) ** 0.5
    return distance < 1e-5 * sum(value.square().sum() for value in one.values()) ** 0.5


@pytest.mark.processes
def test_a_step_is_that_of_one_batch_whatever_it_is_put_together_from(base, uneven, tmp_path):
    whole = trained(base, uneven, tmp_path / "whole", *ONE_STEP, "--data.batch_size", "13")
    parts = ("--data.batch_size", "4", "--trainer.accumulate_grad_batches")
    assert same(whole, trained(base, uneven, tmp_path / "four", *ONE_STEP, *parts, "4"))
    # Four batches, and an epoch that ends within the step.
    assert same(whole, trained(base, uneven, tmp_path / "short", *ONE_STEP, *parts, "7"))
    several = ("--data.batch_size", "8", "--data.shared_batch", "true", "--trainer.accumulate_grad_batches", "2")
    run_processes(fit_flags(base, uneven, tmp_path / "two", *ONE_STEP, *several, hardware="ddp_sim.yaml"))
    assert same(whole, update(tmp_path / "two"))
    other = trained(base, uneven, tmp_path / "first", *ONE_STEP, "--data.batch_size", "4")
    assert not same(whole, other)


@pytest.mark.parametrize(
    ("count", "size", "world", "together"), [(13, 3, 1, 4), (13, 3, 2, 2), (7, 2, 3, 1), (5, 5, 2, 3)]
)
def test_batches_weigh_by_their_tokens_in_a_step(count, size, world, together):
    answers = [1 + i * 7 % 11 for i in range(count)]
    losses = torch.rand(count, generator=torch.Generator().manual_seed(0)).double()  # of each row's tokens
    options = {"world_size": world, "seed": 0, "answers": answers, "accumulate": lambda: together}
    dealt = [list(LengthBatches(answers, size, rank=rank, **options)) for rank in range(world)]
    for start in range(0, len(dealt[0]), together):
        step = [one for part in dealt for one in part[start : start + together]]
        means = [sum(losses[i] * answers[i] for i in rows) / sum(answers[i] for i in rows) for rows, _ in step]
        found = sum(weight * mean for (_, weight), mean in zip(step, means, strict=True)) / (together * world)
        tokens = [(i, answers[i]) for rows, _ in step for i in rows]
        expected = sum(losses[i] * n for i, n in tokens) / sum(n for _, n in tokens)
        assert found == pytest.approx(expected.item(), rel=1e-12)


def test_batches_of_one_are_not_scaled_at_all():
    sampler = LengthBatches(list(range(1, 50)), 4, rank=0, world_size=1, seed=0, answers=list(range(1, 50)))
    assert {weight for _, weight in sampler} == {1.0}


def test_another_seed_is_another_training_unless_the_own_seeds_say_otherwise(base, rows, tmp_path):
    one = trained(base, rows, tmp_path / "0", *SHORT_EPOCH)
    other = trained(base, rows, tmp_path / "1", *SHORT_EPOCH, "--seed_everything", "1")
    assert not same(one, other)
    own = ("--model.seed", "0", "--data.seed", "0")
    assert same(one, trained(base, rows, tmp_path / "own", *SHORT_EPOCH, "--seed_everything", "1", *own))
    settings = json.loads((tmp_path / "1" / "manifest.json").read_text())["settings"]
    assert (settings["model"]["seed"], settings["data"]["seed"]) == (1, 1)


@pytest.mark.parametrize("targets", [["q_proj", "v_prj"], ["v_prj", "self_attn.q_proj", "no"]])
def test_a_target_that_names_no_layer_is_refused_beside_one_that_does(targets):
    with pytest.raises(InputError, match=r"^lora\.targets: this base has no layer v_prj.* \(adapted: q_proj\)"):
        add_lora(make_model(), LoraSpec(targets=targets), 0)


def test_targets_may_be_ends_of_names():
    adapted = add_lora(make_model(), LoraSpec(targets=["self_attn.q_proj", "layers.0.mlp.up_proj"]), 0)
    assert sum("lora_A" in name for name, _ in adapted.named_parameters()) == 3


def test_steps_that_epochs_cut_off_are_told(base, rows, tmp_path, capsys):
    trained(base, rows, tmp_path / "out", *SHORT_EPOCH, "--trainer.max_steps", "1000")
    assert "ended after 5 of 1000 steps (trainer.max_epochs is 1; -1 for no limit)" in capsys.readouterr().err


def test_steps_behind_the_last_validation_are_told(base, rows, tmp_path, capsys):
    trained(base, rows, tmp_path / "all")
    assert "were not validated" not in capsys.readouterr().err
    trained(base, rows, tmp_path / "out", "--trainer.check_val_every_n_epoch", "2")
    assert "the last 5 of 15 steps were not validated, so they are not in the adapter" in capsys.readouterr().err


def test_an_adapter_in_bfloat16_is_told(base, rows, tmp_path, capsys):
    trained(base, rows, tmp_path / "wide", *SHORT_EPOCH)
    assert "loses small steps" not in capsys.readouterr().err
    narrow = ("--model.base.dtype", "bfloat16", "--trainer.precision", "bf16-true")
    trained(base, rows, tmp_path / "narrow", *SHORT_EPOCH, *narrow)
    assert "trains the adapter itself in bfloat16, which loses small steps" in capsys.readouterr().err
