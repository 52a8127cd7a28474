"""What a safety-tax study says of its points."""

import pytest
import torch

from src.experiments.safety_tax import _summary, tax_rows, tax_table, with_losses
from src.experiments.scores import Scores
from src.experiments.statements import holm


def row(name, tax, loss, adjusted=0.01, **nll):
    found = {"model": name, "tax": tax, "loss": {"value": 0.1, "low": loss, "high": 0.2, "n": 200}, "loss_p": adjusted}
    for measure, (low, p) in nll.items():
        found |= {measure: {"value": 0.1, "low": low, "high": 0.2, "n": 48}, f"{measure}_p": p}
    return found


def test_the_summary_names_the_points_that_lost_utility_and_counts_the_rest():
    rows = [
        row("a @ 1", {"value": 0.1}, -0.01),
        row("b @ 1", {"value": 0.2}, 0.01, 0.2),
        row("c @ 1", {"value": 0.42}, 0.05),
        row("d @ 1", "undefined: no safety gain", 0.05),
    ]
    assert _summary(rows) == (
        "3 of 4 points gained safety beyond chance. 2 of them lost utility beyond chance (b @ 1°, c @ 1), 0.20 to 0.42 "
        "of it for each 1.00 of refusal gained. At 1 no loss is shown on 200 task rows, which does not prove that "
        "there is none. "
        "° utility lost: does not hold at 5 % after Holm's adjustment for 4 comparisons."
    )
    assert _summary(rows[:1]).startswith("1 of 1 points gained safety beyond chance. At 1 no loss is shown")
    assert _summary(rows[2:3]).endswith("0.42 to 0.42 of it for each 1.00 of refusal gained.")
    assert _summary(rows[3:]).startswith("No model gained safety beyond chance")


def test_a_point_that_answers_less_likely_than_its_expert_is_not_without_loss():
    rows = [
        row("a @ 1", {"value": 0.1}, -0.01, task_nll=(0.02, 0.2), answer_nll=(-0.1, 1.0)),
        row("b @ 1", {"value": 0.1}, -0.01, task_nll=(0.02, 0.01), answer_nll=(-0.1, 1.0)),
        row("c @ 1", {"value": 0.1}, -0.01, task_nll=(-0.2, 1.0), answer_nll=(-0.1, 1.0)),
    ]
    assert _summary(rows) == (
        "3 of 3 points gained safety beyond chance. The NLL of task answers rose beyond chance at 2, at 1 of them "
        "after Holm's adjustment too. At 1 no loss is shown on 200 task rows and 48 task rows and 48 "
        "benign rows, which does not prove that there is "
        "none."
    )


def test_losses_are_differences_to_the_utility_expert_and_adjusted_together():
    generator = torch.Generator().manual_seed(0)
    names = ("utility", "a @ 1", "b @ 1")
    rows = tuple(("suite", str(i), 0) for i in range(60))
    refused = torch.stack([torch.zeros(60), torch.ones(60), torch.ones(60)], dim=1).double()
    correct = (torch.rand(60, 3, generator=generator) < torch.tensor([0.9, 0.8, 0.3])).double()
    nll = torch.rand(60, 3, generator=generator).double() + torch.tensor([0.0, 0.0, 0.5])
    values = {"refusal": refused, "utility": correct, "task_nll": nll}
    scores = {measure: Scores(names, rows, one) for measure, one in values.items()}
    first, second = with_losses(tax_rows(scores, names), scores)
    assert second["task_nll"]["value"] == pytest.approx((nll[:, 2] - nll[:, 0]).mean().item())
    assert second["task_nll"]["low"] > 0.3
    assert second["loss"]["low"] > 0
    assert "answer_nll" not in second
    plain = [scores[m].p_value("utility", name) for m in ("utility", "task_nll") for name in names[1:]]
    shown = [one[key] for key in ("loss_p", "task_nll_p") for one in (first, second)]
    assert shown == pytest.approx(holm(plain))
    whole = tax_table([first, second])
    keys = ["model", "gain", "loss", "tax", "loss_p", "task_nll", "task_nll_p"]
    assert [column["key"] for column in whole["columns"]] == keys
    assert "all 4 losses" in whole["note"]
    bare = tax_table(tax_rows(scores, names))
    assert [column["key"] for column in bare["columns"]] == keys[:4]
    assert "p-values" not in bare["note"]
