"""Held-out shares of re-learned coefficients: half means in the files, and each half fitted once and judged once."""

import shutil

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from src.adapters.basis import CoreBasis
from src.adapters.peft_files import read_adapter
from src.cli import main
from src.fisher.accumulate import MeanAccumulator, examples, row_half
from src.fisher.files import load_fisher
from tests.commands import measured_once
from tests.oracles import dense_relearned

NAMES = ("safety", "utility", "benign")
STEP = {"t": 2.0, "trust": 3.0, "rho_s": 5.0}
FREE = ["--method.radius", "1e9", *(text for key, value in STEP.items() for text in (f"--method.{key}", str(value)))]


@pytest.fixture(scope="module")
def measured(base, adapters, rows, tmp_path_factory):
    """Directories of Fisher files by name, each measured once."""
    return measured_once(tmp_path_factory.mktemp("relearn"), base, adapters, rows)


def files(folder):
    return {name: load_fisher(folder / f"{name}.safetensors") for name in NAMES}


def held_out(adapters, fisher, output, *flags):
    """The manifest's shares of a merge with re-learned coefficients."""
    given = ["--utility", str(adapters["utility"]), "--safety", str(adapters["safety"]), "--fisher", str(fisher)]
    method = ["--method", "Sst", "--method.coefficients", "relearn", *flags]
    assert main(["merge", *given, "--output", str(output), *method]) == 0
    return read_adapter(output).manifest["findings"]["held_out"]


def halves_by_name(file):
    """Dense matrices of both halves, rows told apart by nothing but their ids."""
    if file.fisher.representation != "lowrank":
        return [file.fisher.half(i).dense().numpy() for i in (0, 1)]
    half = torch.tensor([row_half(row) for row in file.record["rows"]])
    parts = [file.fisher.scores[half == i].double() for i in (0, 1)]
    return [(part.T @ part / len(part)).numpy() for part in parts]


def twin(found, start, left_out=()):
    """Mean shares over both halves, from dense matrices; what is left out fits as an identity with a mean of zero."""
    matrices = {name: halves_by_name(file) for name, file in found.items()}
    kept = []
    for fit in (0, 1):
        fitted = {name: matrices[name][fit] for name in NAMES}
        fitted |= {name: np.trace(fitted[name]) / len(start) * np.eye(len(start)) for name in left_out}
        s, u, b = fitted.values()
        weights = {"tau": STEP["t"] * np.trace(s) / np.trace(b), "trust": STEP["trust"] * np.trace(s) / np.trace(u)}
        means = [found[name].half_means[fit].numpy() * (name not in left_out) for name in ("safety", "benign")]
        made = dense_relearned(s, b, u, *means, start, **weights, sigma=STEP["rho_s"] * np.trace(s) / len(start))
        judges = [matrices[name][1 - fit] for name in ("safety", "utility")]
        kept.append([made @ judge @ made / (start @ judge @ start) for judge in judges])
    return dict(zip(("safety_energy_kept", "utility_tax_kept"), np.mean(kept, axis=0), strict=True))


@pytest.mark.parametrize("kind", ["lowrank", "diagonal"])
def test_a_step_fitted_to_one_half_is_judged_by_the_other(adapters, measured, tmp_path, kind):
    fisher = measured(kind, "--model.representation", kind, "--model.relearn", "true")
    found = files(fisher)
    start = CoreBasis(found["safety"].u, found["safety"].v).coordinates(read_adapter(adapters["safety"]).pairs)
    kept = held_out(adapters, fisher, tmp_path / "m", *FREE)
    assert kept == pytest.approx(twin(found, start.numpy()), rel=1e-6)
    # The same rows in two directories are the same halves, and the trust region binds where it is small.
    assert held_out(adapters, f"[{fisher},{fisher}]", tmp_path / "n", *FREE) == pytest.approx(kept, rel=1e-6)
    short = held_out(adapters, fisher, tmp_path / "s", "--method.radius", "1e-6")
    assert short == pytest.approx({"safety_energy_kept": 1.0, "utility_tax_kept": 1.0}, abs=1e-4)


@pytest.mark.parametrize(
    ("control", "left_out"), [("safety_only", ("utility", "benign")), ("utility_only", ("safety",))]
)
def test_a_control_is_held_out_like_the_method(adapters, measured, tmp_path, control, left_out):
    fisher = measured("lowrank", "--model.representation", "lowrank", "--model.relearn", "true")
    found = files(fisher)
    start = CoreBasis(found["safety"].u, found["safety"].v).coordinates(read_adapter(adapters["safety"]).pairs)
    kept = held_out(adapters, fisher, tmp_path / "m", *FREE, "--method.control", control)
    assert kept == pytest.approx(twin(found, start.numpy(), left_out), rel=1e-6)
    assert kept != pytest.approx(twin(found, start.numpy()), rel=1e-3)
    assert read_adapter(tmp_path / "m").manifest["method"] == f"SST relearn ({control})"


def test_half_means_are_those_of_the_rows_scores(measured):
    exact = measured(
        "exact", "--model.labels", "data", "--model.reference_utility", "patched", "--model.relearn", "true"
    )
    found = files(measured("lowrank", "--model.representation", "lowrank", "--model.relearn", "true"))
    for name, scores in (("safety", "safety"), ("benign", "utility")):
        file = load_fisher(exact / f"{scores}.safetensors")
        half = torch.tensor([row_half(row) for row in file.record["rows"]])
        expected = torch.stack([file.fisher.scores[half == i].double().mean(0) for i in (0, 1)])
        torch.testing.assert_close(found[name].half_means, expected)
        shares = torch.tensor([(half == i).double().mean() for i in (0, 1)]).double()
        torch.testing.assert_close(shares @ found[name].half_means, found[name].mean)
    assert found["utility"].half_means is None


@pytest.mark.parametrize("how", ["files of before", "halves not kept"])
def test_without_half_means_nothing_is_reported(adapters, measured, tmp_path, how):
    if how == "halves not kept":
        fisher = measured("whole", "--model.halves", "false", "--model.relearn", "true")
        assert files(fisher)["safety"].mean is not None
    else:
        whole = measured("lowrank", "--model.representation", "lowrank", "--model.relearn", "true")
        fisher = shutil.copytree(whole, tmp_path / "old")
        path = fisher / "benign.safetensors"
        with safe_open(path, "pt") as handle:
            metadata = handle.metadata()
        tensors = load_file(path)
        del tensors["mean.halves"]
        save_file(tensors, path, metadata=metadata)
    assert held_out(adapters, fisher, tmp_path / "m") is None


def test_a_half_without_an_example_has_no_mean():
    for rows, told in ((["a"], False), (["a", "b", "c", "d"], True)):
        mean = MeanAccumulator({"m": (1, 2)})
        mean.begin(examples(torch.arange(len(rows)), rows))
        mean.update("m", torch.ones(len(rows), 1, 1), torch.arange(2.0 * len(rows)).view(-1, 1, 2))
        found = mean.finish()
        assert (found.halves is not None) == told
        torch.testing.assert_close(found.mean, torch.arange(2.0 * len(rows)).view(-1, 2).mean(0).double())
    assert {row_half(row) for row in "abcd"} == {0, 1}


@pytest.mark.parametrize("name", NAMES)
def test_a_fisher_matrix_of_zero_is_one_line(adapters, measured, tmp_path, capsys, name):
    whole = measured("diagonal", "--model.representation", "diagonal", "--model.relearn", "true")
    folder = shutil.copytree(whole, tmp_path / "zero")
    path = folder / f"{name}.safetensors"
    with safe_open(path, "pt") as handle:
        metadata = handle.metadata()
    bases = ("u.", "v.", "mean", "counts")
    tensors = {key: own if key.startswith(bases) else own * 0 for key, own in load_file(path).items()}
    save_file(tensors, path, metadata=metadata)
    given = ["--utility", str(adapters["utility"]), "--safety", str(adapters["safety"]), "--fisher", str(folder)]
    method = ["--method", "Sst", "--method.coefficients", "relearn"]
    assert main(["merge", *given, "--output", str(tmp_path / "m"), *method]) == 2
    assert f"method Sst: the {name} Fisher matrix is zero or not finite" in capsys.readouterr().err
