"""What a safety-tax study says of its points."""

from src.experiments.safety_tax import _summary


def row(name, tax, loss):
    return {"model": name, "tax": tax, "loss": {"value": 0.1, "low": loss, "high": 0.2, "n": 200}}


def test_the_summary_names_the_points_that_lost_utility_and_counts_the_rest():
    rows = [
        row("a @ 1", {"value": 0.1}, -0.01),
        row("b @ 1", {"value": 0.2}, 0.01),
        row("c @ 1", {"value": 0.42}, 0.05),
        row("d @ 1", "undefined: no safety gain", 0.05),
    ]
    assert _summary(rows) == (
        "3 of 4 points gained safety beyond chance. 2 of them lost utility beyond chance (b @ 1, c @ 1), 0.20 to 0.42 "
        "per safety gained; at 1 no loss is shown on 200 rows, which does not prove that there is none."
    )
    assert _summary(rows[:1]).startswith("1 of 1 points gained safety beyond chance. At 1 no loss is shown")
    assert _summary(rows[1:2]).endswith("0.20 to 0.20 per safety gained.")
    assert _summary(rows[3:]).startswith("No model gained safety beyond chance")
