"""How well harmful prompts and prompts that only sound harmful are told apart by a linear reading of a base model.

Logistic regression on the hidden state at the last prompt token, layer by layer: what a model that has to decide there
between refusing and answering can read linearly. Trained on several kinds of rows:

* ``calibration``: the sources that the studies train and calibrate on, none of the prompts' own benchmark;
* ``own, calib``, ``own, calib and train``, ``own, all``: those and borderline prompts of ``src/data/demo`` (96, 192 and
  312), of XSTest's kinds but not from it;
* ``own, all, and harmful``: those and the 516 harmful requests of ``src/data/demo``;
* ``other types``: those and XSTest's prompts of all types but the one tested (homonyms, figurative language, …);
* ``same types``: those and other XSTest prompts of the same types (five folds; near-duplicates by design).

Printed is, for the layer that does best **on the test rows** (so a bound from above), over-refusal on XSTest's safe
prompts at the threshold that refuses .5 to .95 of XSTest's unsafe ones, and, where no XSTest prompt is trained on, of
the harmful prompts of ``borderline_rows_small.yaml`` (a quarter of them XSTest's). ``BENCH_MODEL`` and ``BENCH_DTYPE``
name another base.
"""

import os
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits
from torchmetrics.functional.classification import binary_auroc

from src.data.chat import Encoder
from src.data.row_source import RowSource
from src.data.sources import load_rows
from src.models.base import BaseSpec, load_model, load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
DEMO = ROOT / "src" / "data" / "demo"
SPEC = BaseSpec(**({"name": os.environ["BENCH_MODEL"]} if "BENCH_MODEL" in os.environ else {}))
EVERY = 3
"""Layers between two readings."""
SPLITS = ("calib", "train", "eval")
OWN = {
    "own, calib": {"borderline": SPLITS[:1]},
    "own, calib and train": {"borderline": SPLITS[:2]},
    "own, all": {"borderline": SPLITS},
    "own, all, and harmful": {"borderline": SPLITS, "harmful": SPLITS},
}
"""Splits of the project's own prompts, by their kind."""
LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
MIX = {"advbench": 80, "do_not_answer": 40, "harmbench": 80, "simplesafetytests": 40, "xstest_unsafe": 80}
"""Harmful prompts of the study, by benchmark."""
RIDGE = 1e-2
"""Of the regression, on standardised features."""

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="the research data set ../shared/data is not here")


def rows(name, limit=None):
    return load_rows(RowSource(path=str(DATA / name), seed=0, limit=limit), need_response=False)


def features(model, encoder, given):
    """(rows, layers, width) hidden states at the last prompt token, in float64."""
    found = []
    with torch.no_grad():
        for row in given:
            ids = torch.tensor([encoder.encode(row).prompt_ids])
            states = model(ids, output_hidden_states=True, logits_to_keep=1).hidden_states[1:]
            found.append(torch.stack([state[0, -1] for state in states[EVERY - 1 :: EVERY]]))
    return torch.stack(found).double()


def scores(harmful, safe, tested):
    """Scores of tested rows (n, width) by a regression fitted to harmful and safe rows."""
    x = torch.cat([harmful, safe])
    y = torch.cat([torch.ones(len(harmful)), torch.zeros(len(safe))]).double()
    mean, deviation = x.mean(0), x.std(0)
    w, b = (torch.zeros(size, dtype=torch.float64, requires_grad=True) for size in (x.shape[1], 1))
    optimizer = torch.optim.LBFGS([w, b], max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = binary_cross_entropy_with_logits((x - mean) / deviation @ w + b, y) + RIDGE * w.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return ((tested - mean) / deviation @ w + b).detach()


def held_out(train, unsafe, safe, parts):
    """Scores of all unsafe and safe rows, each part (names of rows) scored by a fit to the others and to ``train``."""
    found = torch.empty(len(unsafe)), torch.empty(len(safe))
    for part in sorted(set(parts[0]) | set(parts[1])):
        here = [torch.tensor([own == part for own in names]) for names in parts]
        fitted = [torch.cat([a, b[~own]]) for a, b, own in zip(train, (unsafe, safe), here, strict=True)]
        for result, given, own in zip(found, (unsafe, safe), here, strict=True):
            if own.any():
                result[own] = scores(*fitted, given[own]).float()
    return found


def types_of(given):
    """Type of each XSTest prompt; the contrast of a type counts as it."""
    names = [row.category.removeprefix("contrast_") for row in given]
    return [
        "discrimination" if name.endswith("discr") else "privacy" if name.startswith("privacy") else name
        for name in names
    ]


def test_how_far_a_linear_reading_tells_harmful_from_harmless():
    model, encoder = load_model(SPEC).eval(), Encoder(load_tokenizer(SPEC), max_length=256)
    harmful, safe = rows("train/safety_refusal.jsonl", 500), rows("calib/borderline.jsonl")
    unsafe_rows, safe_rows = rows("eval/harmful_xstest_unsafe.jsonl"), rows("eval/overrefusal_xstest_safe.jsonl")
    train = [features(model, encoder, given) for given in (harmful, safe + rows("train/instruct.jsonl", 250))]
    own = {
        (kind, split): features(model, encoder, load_rows(f"{DEMO}/{kind}.{split}.jsonl", need_response=False))
        for kind in ("harmful", "borderline")
        for split in SPLITS
    }
    unsafe, borderline = (features(model, encoder, given) for given in (unsafe_rows, safe_rows))
    draw = torch.Generator().manual_seed(0)
    folds = [(torch.randperm(len(given), generator=draw) % 5).tolist() for given in (unsafe, borderline)]
    mix_rows = [row for name, limit in MIX.items() for row in rows(f"eval/harmful_{name}.jsonl", limit)]
    harmful_tested = {
        "XSTest's unsafe prompts": unsafe,
        "the study's harmful prompts": features(model, encoder, mix_rows),
    }
    layers = range(unsafe.shape[1])
    for kind, added in {"calibration": {}, **OWN}.items():
        sides = zip(train, ("harmful", "borderline"), strict=True)
        fitted = [torch.cat([part, *(own[name, split] for split in added.get(name, ()))]) for part, name in sides]
        for name, tested in harmful_tested.items():
            found = [
                [scores(*(part[:, i] for part in fitted), given[:, i]).float() for given in (tested, borderline)]
                for i in layers
            ]
            print_best(f"{kind}, {name}", found)
    for kind, parts in {"other types": [types_of(unsafe_rows), types_of(safe_rows)], "same types": folds}.items():
        found = [held_out([part[:, i] for part in train], unsafe[:, i], borderline[:, i], parts) for i in layers]
        print_best(f"{kind}, XSTest's unsafe prompts", found)


def print_best(name, by_layer):
    """The line of the layer whose scores, (harmful, safe), tell both apart best."""
    best = None
    for layer, (one, zero) in enumerate(by_layer):
        area = binary_auroc(torch.cat([one, zero]), torch.cat([torch.ones(len(one)), torch.zeros(len(zero))]).int())
        if best is None or area > best[0]:
            refused = [(zero >= one.quantile(1 - level)).double().mean().item() for level in LEVELS]
            best = (area, layer, refused)
    area, layer, refused = best
    at = ", ".join(f"{part:.2f} at {level:g}" for level, part in zip(LEVELS, refused, strict=True))
    sys.stderr.write(
        f"\n{SPEC.name}, {name}: area under the curve {area:.3f} (after layer {EVERY * (layer + 1)}); "
        f"over-refusal {at} refusal\n"
    )
    assert 0.5 < area <= 1
