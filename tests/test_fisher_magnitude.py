"""Mean magnitudes of every weight's gradient against per-example autograd in float64, through files and commands."""

import pytest
import torch

from src.cli import main
from src.fisher.accumulate import mapped
from src.fisher.base import weighted_mean
from src.fisher.diagonal import DiagonalAccumulator
from src.fisher.files import FisherFile, load_fisher
from src.fisher.magnitude import Magnitude, MagnitudeAccumulator
from tests.commands import fisher_flags
from tests.fisher_pass import batches, make_batch, no_bases, run_pass
from tests.oracles import autograd_weight_scores
from tests.tiny import random_pairs

MAGNITUDE = ["--model.representation", "magnitude", "--model.coordinates", "weight"]


@pytest.fixture
def shapes(model):
    return {name: pair.shape for name, pair in random_pairs(model, 1, 0).items()}


def measured(model, encoded, shapes, size, indices=range(7), **options):
    given = batches(encoded, size, indices)
    bases = no_bases(shapes), no_bases(shapes)
    return run_pass(model, given, [MagnitudeAccumulator(shapes, **options)], *bases)[0].finish()


@pytest.mark.parametrize("entries", [2**22, 1])
def test_magnitudes_equal_autograd_of_every_example(model, encoded, shapes, tmp_path, monkeypatch, entries):
    monkeypatch.setattr("src.fisher.diagonal.ENTRIES", entries)
    found = measured(model, encoded, shapes, 3, halves=False, allocate=mapped(tmp_path))
    exact = autograd_weight_scores(model, make_batch(encoded, range(7)), list(shapes))
    total = 0.0
    for name, scores in exact.items():
        expected = scores.abs().mean(0).flatten()
        total += expected.sum().item()
        assert (found.mean(name) - expected).norm() < 1e-9 * expected.norm()
        # Neither the magnitude of the mean nor the root of the diagonal.
        assert (found.mean(name) - scores.mean(0).abs().flatten()).norm() > 1e-2 * expected.norm()
        assert (found.mean(name) - scores.square().mean(0).sqrt().flatten()).norm() > 1e-2 * expected.norm()
    assert found.trace() == pytest.approx(total)
    assert found.count == 7
    assert {path.name for path in tmp_path.iterdir()} == {f"magnitude.{name}.sum" for name in shapes}


def test_batches_halves_and_means_over_data_sets_are_those_of_the_examples(model, encoded, shapes):
    whole, alone = measured(model, encoded, shapes, 7), measured(model, encoded, shapes, 1)
    parts = [measured(model, encoded, shapes, 2, rows) for rows in ([0, 1, 2], [3, 4, 5, 6])]
    pooled, halves = weighted_mean(parts, [3.0, 4.0]), whole.halves(0)
    assert sum(half.count for half in halves) == 7
    for name in shapes:
        torch.testing.assert_close(alone.mean(name), whole.mean(name))
        torch.testing.assert_close(pooled.mean(name), whole.mean(name))
        torch.testing.assert_close(sum(half.count * half.mean(name) for half in halves), 7 * whole.mean(name))


def test_magnitudes_survive_the_file_and_are_no_matrix(model, encoded, shapes, tmp_path):
    found = measured(model, encoded, shapes, 7)
    FisherFile(found, {}, {}, {"pass": "safety"}).save(tmp_path / "f.safetensors")
    loaded = load_fisher(tmp_path / "f.safetensors")
    assert type(loaded.fisher) is Magnitude
    assert loaded.record["coordinates"] == "weight"
    for name in shapes:
        assert torch.equal(loaded.fisher.mean(name), found.mean(name))
    with pytest.raises(ValueError, match="no Fisher matrix"):
        loaded.fisher.matvec(torch.ones(found.dim))
    square = DiagonalAccumulator(shapes)
    run_pass(model, batches(encoded, 7), [square], no_bases(shapes), no_bases(shapes))
    with pytest.raises(ValueError, match="have no mean"):
        weighted_mean([found, square.finish()], [1.0, 1.0])


def test_the_command_measures_magnitudes_at_the_base(base, adapters, rows, model, tokenizer, tmp_path):
    from src.data.calibration import CalibrationData

    flags = [*MAGNITUDE, "--model.labels", "data", "--model.reference_safety", "base"]
    assert main(fisher_flags(base, adapters, rows, tmp_path / "f", *flags)) == 0
    found = load_fisher(tmp_path / "f" / "safety.safetensors")
    data = CalibrationData(safety=str(rows["harmful"]), utility=str(rows["benign"]))
    data.bind(tokenizer)
    data.bind_passes({"safety": "safety", "utility": "utility"}, [])
    data.setup("predict")
    encoded = data.encoded["safety"]
    exact = autograd_weight_scores(model, make_batch(encoded, range(len(encoded))), list(found.shapes))
    for name, scores in exact.items():
        torch.testing.assert_close(found.fisher.mean(name), scores.abs().mean(0).flatten())
    assert found.record["representation"] == "magnitude"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (MAGNITUDE[:2], "magnitude has no core coordinates; pass --model.coordinates weight"),
        (["--model.representation", "block", *MAGNITUDE[2:]], "expected kronecker or diagonal or magnitude"),
    ],
)
def test_coordinates_without_such_a_representation_are_refused(base, adapters, rows, tmp_path, capsys, flags, message):
    assert main(fisher_flags(base, adapters, rows, tmp_path / "f", *flags)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "f").exists()
