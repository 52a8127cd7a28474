"""Choices from products that round: the same as exact ones, of which few are computed."""

import math

import pytest
import torch

from src.models import computation
from src.models.computation import choose_modes
from src.models.grading import chosen
from src.models.products import NarrowCopies
from src.models.settling import FEWEST, gap, lead, settle
from tests.evaluations import answers, choice_rows, evaluate, write_jsonl
from tests.tiny import make_model

EXACT = {"score": "highest", "decode": "highest", "settle": "highest", "choose": "highest"}


def settled(exact, rough, weights):
    """Scores after settling, and the rows computed exactly."""
    found = [list(scores) for scores in rough]

    def compute(rows):
        for row in rows:
            found[row] = exact[row]
        return [exact[row] for row in rows]

    return found, settle(rough, weights, compute)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("noise", [1e-3, 0.03, 0.3])
def test_choices_are_those_of_exact_scores(seed, noise):
    draw = torch.Generator().manual_seed(seed)
    exact = torch.randn(400, 4, generator=draw).double()
    rough = exact + noise * torch.randn(400, 4, generator=draw).double()
    lengths = torch.randint(1, 30, (400, 4), generator=draw)
    weights = [[[1.0] * 4, (1 / row).tolist()] for row in lengths]
    found, again = settled(exact.tolist(), rough.tolist(), weights)
    flips = 0
    for i, (scores, right) in enumerate(zip(found, exact.tolist(), strict=True)):
        for factors in weights[i]:
            by_both = [[score * factor for score, factor in zip(one, factors, strict=True)] for one in (scores, right)]
            assert chosen(by_both[0]) == chosen(by_both[1])
        flips += chosen(rough[i].tolist()) != chosen(right)
        assert (scores == right) == (i in again)
    if noise == 1e-3:
        assert len(again) < 60
    if noise == 0.3:
        assert flips > 10  # without settling these would be other choices


def test_a_few_rows_are_always_computed_both_ways():
    exact = [[0.0, -5.0 - i] for i in range(10)]
    found, again = settled(exact, exact, [[[1.0, 1.0]]] * 10)
    assert again == set(range(FEWEST))
    assert found == exact


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_a_rough_score_that_is_no_number_has_all_rows_computed(wrong):
    exact = [[0.0, -5.0 - i] for i in range(10)]
    rough = [list(row) for row in exact]
    rough[7][1] = wrong
    found, again = settled(exact, rough, [[[1.0, 1.0]]] * 10)
    assert found[7] == exact[7]
    assert 7 in again


def test_gaps_have_the_size_of_one_error():
    draw = torch.Generator().manual_seed(0)
    errors = torch.randn(20000, 2, generator=draw).tolist()
    gaps = torch.tensor([gap((a, 0.7), (b, 0.01)) for a, b in errors])
    assert gaps.square().mean().item() == pytest.approx(1, rel=0.05)
    assert lead([3.0, 1.0, 2.0], [1.0, 1.0, 1.0]) == pytest.approx(1 / math.sqrt(2))
    assert lead([3.0], [1.0]) == math.inf


@pytest.mark.parametrize("style", ["letters", "question"])
def test_a_suite_in_bfloat16_products_chooses_as_in_float32(base, adapters, tmp_path, monkeypatch, style):
    # Rows of one subject with few words in common: what they share is short beside them.
    rows = [
        row | {"subject": "tiny_things", "question": f"{i} " + row["question"] * 4}
        for i, row in enumerate(choice_rows(48))
    ]
    suite = {"name": "mc", "kind": "choice", "rows": str(write_jsonl(tmp_path / "mc.jsonl", rows)), "style": style}
    found = {}
    for choose in ("highest", "bfloat16"):
        monkeypatch.setattr(
            "src.models.evaluation.choose_modes", lambda *_, choose=choose, **__: EXACT | {"choose": choose}
        )
        (tmp_path / choose).mkdir()
        more = ["--model.base.dtype", "float32", "--model.adapters", str(adapters["utility"])]
        evaluate(base, tmp_path / choose, [suite], *more, batch_size=48)
        models = "base", str(adapters["utility"]).lstrip("/")
        found[choose] = [one for name in models for one in answers(tmp_path / choose / "out", "mc", name)]
    again = 0
    for one, two in zip(found["highest"], found["bfloat16"], strict=True):
        assert (one["choice"], one.get("correct_norm")) == (two["choice"], two.get("correct_norm"))
        again += one["scores"] == pytest.approx(two["scores"], abs=1e-6)
    assert 2 * FEWEST <= again < 96  # the others show that products did round


def test_copies_round_products_and_nothing_else():
    model = make_model().float()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        exact = model(ids).logits
        copies = NarrowCopies(model)
        with copies.used():
            rough = model(ids).logits
        after = model(ids).logits
    assert torch.equal(exact, after)
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).abs().max() < 0.1 * exact.std()
    last = model.get_output_embeddings()
    x = torch.randn(3, last.in_features)
    with torch.no_grad():
        wide = last(x)
        with copies.used():
            assert torch.equal(last(x), wide)


@pytest.mark.parametrize(("shots", "rounds"), [(0, True), (3, False)])
def test_a_long_common_beginning_is_not_computed_twice(base, tmp_path, monkeypatch, shots, rounds):
    seen = set()
    original = computation.letter_scores

    def noted(*given, narrow, **more):
        seen.add(narrow)
        return original(*given, narrow=narrow, **more)

    monkeypatch.setattr(computation, "letter_scores", noted)
    monkeypatch.setattr("src.models.evaluation.choose_modes", lambda *_, **__: EXACT | {"choose": "bfloat16"})
    rows = [
        row | {"question": f"{i} " + row["question"] * 4} for i, row in enumerate(choice_rows(24, ("tiny_things",)))
    ]
    few = write_jsonl(tmp_path / "few.jsonl", choice_rows(6, ("tiny_things",), start=50))
    suite = {"name": "mc", "kind": "choice", "rows": str(write_jsonl(tmp_path / "mc.jsonl", rows))}
    suite |= {"few_shot": str(few), "shots": shots} if shots else {}
    given = evaluate(base, tmp_path, [suite], "--model.base.dtype", "float32", batch_size=12)
    assert given["mc"]["accuracy"]["n"] == 24
    assert seen == ({True, False} if rounds else {False})


@pytest.mark.parametrize("mode", ["auto", "medium"])
def test_close_choices_are_settled_by_products_that_do_not_round(mode):
    modes = choose_modes(mode, make_model().float(), 5e-3, choices=True)
    assert set(modes) == {"score", "decode", "settle", "choose"}
    torch.set_float32_matmul_precision(modes["settle"])
    x, w = (torch.randn(512, 512, generator=torch.Generator().manual_seed(i)) for i in range(2))
    exact = x.double() @ w.double()
    assert ((x @ w).double() - exact).norm() < 1e-5 * exact.norm()
    torch.set_float32_matmul_precision("highest")
    assert mode == "auto" or modes["choose"] == mode
