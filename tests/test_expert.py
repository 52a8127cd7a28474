"""The module that trains an expert: its first weights and its validation loss, whatever it runs on."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.trainer.connectors.logger_connector.result import _Metadata, _ResultMetric, _Sync
from peft import LoraConfig, TaskType, get_peft_model

from src.models.base import BaseSpec
from src.models.expert import ExpertModule
from src.models.lora import LoraSpec, add_lora
from tests.tiny import make_model


def first_weights(model):
    return {name: tensor for name, tensor in model.named_parameters() if "lora_" in name}


def test_an_adapter_starts_from_the_cpus_draw_on_every_device_and_seeds_no_gpu(monkeypatch):
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type=TaskType.CAUSAL_LM)
    other, model = make_model(), make_model()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        expected = first_weights(get_peft_model(other, config))
    seeded, before = [], torch.get_rng_state()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    module = ExpertModule(BaseSpec("tiny"), LoraSpec(), seed=3)
    with torch.device("meta"):  # as Lightning has a GPU there
        found = first_weights(add_lora(model, module.lora, module.seed))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert not seeded
    assert torch.equal(torch.get_rng_state(), before)


def test_the_validation_loss_of_two_processes_is_the_mean_over_all_tokens():
    """Lightning adds up each process's losses and tokens and takes the means of both, that of tokens truncated."""
    metrics = []

    def mean(value, **_):
        name = "value" if value.is_floating_point() else "cumulated_batch_size"
        total = sum(getattr(metric, name) for metric in metrics)
        return value.copy_(total / 2)

    # The second process has a batch less and repeats one, which must not count.
    for batches in ([(3, 2.0, 1.0), (4, 2.0, 1.0)], [(4, 5.0, 1.0), (9, 99.0, 0.0)]):
        meta = _Metadata("validation_step", "val_loss")
        meta.sync = _Sync(fn=mean, _should=True)
        metrics.append(_ResultMetric(meta, is_tensor=True))

        def log(name, value, *, batch_size, **_):
            metrics[-1].update(value, batch_size)

        process = SimpleNamespace(trainer=SimpleNamespace(world_size=2), log=log)
        for tokens, loss, weight in batches:
            process._loss = lambda _, loss=loss: torch.tensor(loss)
            batch = SimpleNamespace(weight=weight, answer_mask=torch.ones(1, tokens + 1, dtype=torch.bool))
            ExpertModule.validation_step(process, batch, 0)
    assert metrics[0].compute().item() == torch.tensor((7 * 2.0 + 4 * 5.0) / 11).item()


def test_the_adapter_is_the_one_that_is_asked_for():
    lora = LoraSpec(3, 5.0, ["q_proj", "down_proj"], dropout=0.1, rslora=True)
    config = add_lora(make_model(), lora, 0).peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_rslora) == (3, 5.0, 0.1, True)
    assert set(config.target_modules) == {"q_proj", "down_proj"}


@pytest.mark.parametrize(
    ("schedule", "quarter", "end"), [("cosine", 0.853553, 0), ("linear", 0.75, 0), ("constant", 1, 1)]
)
def test_the_learning_rate_rises_and_falls_with_optimiser_steps(schedule, quarter, end):
    module = ExpertModule(
        BaseSpec("tiny"), LoraSpec(), lambda parameters: torch.optim.SGD(parameters, lr=1.0), schedule, warmup=0.2
    )
    module.model = torch.nn.Linear(1, 1)
    module._trainer = SimpleNamespace(estimated_stepping_batches=20)
    found = module.configure_optimizers()
    assert found["lr_scheduler"]["interval"] == "step"
    rates = []
    for _ in range(21):
        rates.append(found["optimizer"].param_groups[0]["lr"])
        found["optimizer"].step()
        found["lr_scheduler"]["scheduler"].step()
    assert rates[:5] == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert (rates[8], rates[20]) == pytest.approx((quarter, end), abs=1e-5)
