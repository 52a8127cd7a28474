"""Re-learned coefficients start where mean scores were measured: at a first step, in the patch, at a difference."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from src.adapters.basis import CoreBasis
from src.adapters.pairs import weighted_sum
from src.adapters.peft_files import read_adapter, write_adapter
from src.cli import main
from src.data.sources import load_rows
from src.fisher.files import load_fisher
from src.merge.fisher_passes import Pass
from src.merge.sst import Sst
from tests.commands import fisher_flags, measured_once
from tests.oracles import dense_kronecker_ridge, dense_relearned
from tests.tiny import make_model, random_pairs

STEP = {"t": 2.0, "trust": 3.0, "rho_s": 5.0}
RELEARN = ["--method", "Sst", "--method.coefficients", "relearn"]
FREE = [*RELEARN, "--method.radius", "1e9", *(text for k, v in STEP.items() for text in (f"--method.{k}", str(v)))]


@pytest.fixture(scope="module")
def measured(base, adapters, rows, tmp_path_factory):
    """Directories of Fisher files with mean scores by name, each measured once."""
    measure = measured_once(tmp_path_factory.mktemp("points"), base, adapters, rows)
    return lambda name, *flags: measure(name, "--model.relearn", "true", *flags)


@pytest.fixture(scope="module")
def first(adapters, measured, tmp_path_factory):
    """A merge by a first step, at strength 1.4."""
    output = tmp_path_factory.mktemp("first") / "merged"
    assert merge(adapters, measured("patched"), output, *FREE, "--alpha", "1.4") == 0
    return output


def merge(adapters, fisher, output, *flags):
    given = ["--utility", str(adapters["utility"]), "--safety", str(adapters["safety"]), "--fisher", str(fisher)]
    return main(["merge", *given, "--output", str(output), *flags])


def patch_of(folder, adapters, basis):
    """Core coordinates of what a merge adds to the utility adapter."""
    pairs = [read_adapter(where).pairs for where in (folder, adapters["utility"])]
    return basis.coordinates(weighted_sum(pairs, [1.0, -1.0])).numpy()


def stepped(fisher, start, damping=None):
    """A step from ``start``, by dense matrices; under a ridge of Kronecker form where that is damped."""
    files = [load_fisher(fisher / f"{name}.safetensors") for name in ("safety", "benign", "utility")]
    s, b, u = (file.fisher.dense().numpy() for file in files)
    weights = {"tau": STEP["t"] * np.trace(s) / np.trace(b), "trust": STEP["trust"] * np.trace(s) / np.trace(u)}
    means = [file.mean.numpy() for file in files[:2]]
    scores, total, shapes = files[1].fisher.scores.double().numpy(), files[1].fisher.total, files[1].shapes
    ridge = None if damping is None else dense_kronecker_ridge(scores, total, shapes, damping)
    sigma = STEP["rho_s"] * np.trace(s) / len(start)
    return dense_relearned(s, b, u, *means, start, **weights, sigma=sigma, ridge=ridge)


def basis_of(fisher):
    file = load_fisher(fisher / "safety.safetensors")
    return CoreBasis(file.u, file.v)


def test_a_second_step_goes_on_from_the_first(adapters, measured, first, tmp_path):
    second = measured("second", "--model.reference_safety", f"{{{first}: 1.0}}")
    assert merge(adapters, second, tmp_path / "m", *FREE) == 0
    basis = basis_of(second)
    start = patch_of(first, adapters, basis)
    whole = basis.coordinates(read_adapter(adapters["safety"]).pairs).numpy()
    assert np.linalg.norm(start - whole) > 0.1 * np.linalg.norm(whole)
    made = patch_of(tmp_path / "m", adapters, basis)
    np.testing.assert_allclose(made, stepped(second, start), rtol=1e-5, atol=1e-6 * np.linalg.norm(whole))
    findings = read_adapter(tmp_path / "m").manifest["findings"]
    assert findings["start_norm"] == pytest.approx(np.linalg.norm(start) / np.linalg.norm(whole), rel=1e-5)
    assert findings["objective_after"] < findings["objective_before"]
    # All rows have made the start: none is held out.
    assert findings["held_out"] is None
    assert read_adapter(first).manifest["findings"]["held_out"]["safety_energy_kept"] > 0
    # A short step stays at the first one's end: the radius bounds what is added to it.
    assert merge(adapters, second, tmp_path / "short", *RELEARN, "--method.radius", "1e-7") == 0
    np.testing.assert_allclose(patch_of(tmp_path / "short", adapters, basis), start, atol=1e-6 * np.linalg.norm(whole))


def test_what_the_first_step_has_seen_the_second_has_seen(adapters, measured, first):
    second = measured("second", "--model.reference_safety", f"{{{first}: 1.0}}")
    seen = {name: load_fisher(second / f"{name}.safetensors").record["seen"] for name in ("safety", "utility")}
    assert read_adapter(first).seen <= set(seen["safety"])
    assert not read_adapter(first).seen <= set(seen["utility"])


@pytest.mark.parametrize(
    ("reference", "share"), [("{utility: 1.0, safety: 0.5}", 0.5), ("utility", 0.0), ("{utility: 1, safety: 1}", 1.0)]
)
def test_a_step_starts_at_the_share_of_the_patch_that_was_measured_at(adapters, measured, tmp_path, reference, share):
    fisher = measured(f"at-{share}", "--model.reference_safety", reference)
    assert merge(adapters, fisher, tmp_path / "m", *FREE) == 0
    basis = basis_of(fisher)
    whole = basis.coordinates(read_adapter(adapters["safety"]).pairs).numpy()
    made = patch_of(tmp_path / "m", adapters, basis)
    np.testing.assert_allclose(made, stepped(fisher, share * whole), rtol=1e-5, atol=1e-6 * np.linalg.norm(whole))


@pytest.mark.parametrize(
    "flags", [(), ("--model.basis", "union", "--model.reference_safety", "{utility: 1, safety: 0.5}")]
)
def test_a_ridge_of_kronecker_form_is_made_of_the_benign_pass(adapters, measured, tmp_path, flags):
    fisher, share = measured(f"ridge-{len(flags)}", *flags), 0.5 if flags else 1.0
    ridge = ["--method.ridge", "kronecker", "--method.damping", "0.3"]
    assert merge(adapters, fisher, tmp_path / "m", *FREE, *ridge) == 0
    assert merge(adapters, fisher, tmp_path / "n", *FREE) == 0
    basis = basis_of(fisher)
    whole = basis.coordinates(read_adapter(adapters["safety"]).pairs).numpy()
    made, other = (patch_of(tmp_path / name, adapters, basis) for name in "mn")
    expected, near = stepped(fisher, share * whole, damping=0.3), 1e-6 * np.linalg.norm(whole)
    np.testing.assert_allclose(made, expected, rtol=1e-5, atol=near)
    assert np.linalg.norm(made - other) > 100 * near


def test_a_ridge_of_kronecker_form_without_scores_is_one_line(adapters, measured, tmp_path, capsys):
    fisher = measured("block", "--model.representation", "block")
    assert merge(adapters, fisher, tmp_path / "m", *RELEARN, "--method.ridge", "kronecker") == 2
    assert "method Sst: a ridge of Kronecker form needs lowrank Fisher files, not block" in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("reference", ["base", "{safety: 1.0}", "{utility: 2.0, safety: 1.0}"])
def test_a_point_outside_of_the_core_space_is_one_line(adapters, measured, tmp_path, capsys, reference):
    fisher = measured(reference, "--model.reference_safety", reference)
    assert "is no patch in the adapters' core space" in capsys.readouterr().err
    assert merge(adapters, fisher, tmp_path / "m", *RELEARN) == 2
    assert "no patch in the safety adapter's core space" in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


def test_a_second_step_needs_the_first_ones_adapter_no_more(adapters, measured, first, tmp_path, capsys):
    moved = shutil.copytree(first, tmp_path / "first")
    fisher = measured("moved", "--model.reference_safety", f"{{{moved}: 1.0}}")
    shutil.rmtree(moved)
    assert merge(adapters, fisher, tmp_path / "m", *FREE) == 0
    second = measured("second", "--model.reference_safety", f"{{{first}: 1.0}}")
    assert merge(adapters, second, tmp_path / "n", *FREE) == 0
    both = [read_adapter(tmp_path / name).pairs for name in "mn"]
    for name, pair in both[0].items():
        torch.testing.assert_close(pair.dense(), both[1][name].dense())
    assert not capsys.readouterr().err.count("Traceback")


def test_a_start_that_is_no_number_is_one_line(adapters, measured, first, tmp_path, capsys):
    second = measured("second", "--model.reference_safety", f"{{{first}: 1.0}}")
    broken = shutil.copytree(second, tmp_path / "broken")
    path = broken / "safety.safetensors"
    with safe_open(path, "pt") as handle:
        metadata = handle.metadata()
    tensors = load_file(path)
    tensors["start"][3] = float("nan")
    save_file(tensors, path, metadata=metadata)
    assert merge(adapters, broken, tmp_path / "m", *RELEARN) == 2
    assert "safety.safetensors: the start of" in capsys.readouterr().err
    del tensors["start"]
    save_file(tensors, path, metadata=metadata)
    assert merge(adapters, broken, tmp_path / "m", *RELEARN) == 2
    assert "no patch in the safety adapter's core space" in capsys.readouterr().err


def test_both_passes_with_mean_scores_are_of_one_point(adapters, measured, tmp_path, capsys):
    mixed = shutil.copytree(measured("patched"), tmp_path / "mixed")
    half = measured("at-0.5", "--model.reference_safety", "{utility: 1.0, safety: 0.5}")
    shutil.copy(half / "benign.safetensors", mixed)
    assert merge(adapters, mixed, tmp_path / "m", *RELEARN) == 2
    assert "reference is" in capsys.readouterr().err


def test_a_difference_is_learned_anew_from_where_it_leads(adapters, measured, tmp_path, capsys):
    form = [*FREE, "--method.form", "interpolating"]
    assert merge(adapters, measured("union", "--model.basis", "union"), tmp_path / "m", *form) == 2
    assert "--model.reference_safety '{safety: 1.0}'" in capsys.readouterr().err
    there = measured("there", "--model.basis", "union", "--model.reference_safety", "{safety: 1.0}")
    assert merge(adapters, there, tmp_path / "n", *form) == 0
    basis = basis_of(there)
    pairs = [read_adapter(adapters[name]).pairs for name in ("safety", "utility")]
    start = basis.coordinates(weighted_sum(pairs, [1.0, -1.0]))
    made = patch_of(tmp_path / "n", adapters, basis)
    np.testing.assert_allclose(
        made, stepped(there, start.numpy()), rtol=1e-5, atol=1e-6 * torch.linalg.norm(start).item()
    )


@pytest.mark.parametrize(
    "settings",
    [{}, {"filter": "topk", "k": 3}, {"coefficients": "relearn"}, {"coefficients": "relearn", "ridge": "kronecker"}],
)
def test_an_option_changes_the_patch_unless_it_is_named_as_unread(adapters, measured, tmp_path, settings):
    fisher = measured("patched")
    basis = basis_of(fisher)

    def made(name, **options):
        flags = [text for key, value in options.items() for text in (f"--method.{key}", str(value))]
        assert merge(adapters, fisher, tmp_path / name, "--method", "Sst", *flags) == 0
        return patch_of(tmp_path / name, adapters, basis)

    before = made("before", **settings)
    near = 1e-6 * np.linalg.norm(before)
    for option, value in {"t": 1.0, "rho": 5.0, "trust": 0.1, "radius": 0.05, "damping": 5.0}.items():
        changed = {**settings, option: value}
        same = np.linalg.norm(made(option, **changed) - before) < near
        assert same == (option in Sst(**changed).unread), option


def test_a_step_needs_scores_of_rows(adapters, measured, tmp_path, capsys):
    fisher = measured("tokens", "--model.granularity", "token")
    assert "model.relearn: no merge re-learns coefficients with scores of tokens" in capsys.readouterr().err
    assert merge(adapters, fisher, tmp_path / "m", *FREE) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "granularity is token, and mean scores are of rows; re-learned coefficients need" in said
    assert not (tmp_path / "m").exists()


def test_a_second_step_on_rows_that_the_experts_were_trained_on_holds_nothing_out(
    base, adapters, rows, first, tmp_path, tmp_path_factory
):
    """Such rows are the experts' and the first step's: the latter counts."""
    trained = {}
    for name in ("utility", "safety"):
        trained[name] = shutil.copytree(adapters[name], tmp_path / name)
        seen = set().union(*(hashes(path) for path in rows.values()))
        (trained[name] / "seen_prompts.txt").write_text("".join(f"{one}\n" for one in sorted(seen)))
    measure = measured_once(tmp_path_factory.mktemp("trained"), base, trained, rows)
    start = measure("first", "--model.relearn", "true")
    assert merge(trained, start, tmp_path / "merged", *FREE) == 0
    assert read_adapter(tmp_path / "merged").manifest["findings"]["held_out"] is not None
    second = measure("second", "--model.relearn", "true", "--model.reference_safety", f"{{{tmp_path / 'merged'}: 1.0}}")
    assert load_fisher(second / "safety.safetensors").record["fitted_before"]
    assert merge(trained, second, tmp_path / "m", *FREE) == 0
    assert read_adapter(tmp_path / "m").manifest["findings"]["held_out"] is None


def test_a_record_that_does_not_say_so_holds_rows_that_made_its_point_where_an_adapter_names_it():
    points = "utility", {"utility": 1.0, "safety": 0.5}, {"/some/merge": 1.0}
    passes = [Pass(Path("safety.safetensors"), SimpleNamespace(record={"reference": at})) for at in points]
    assert [one.fitted_before for one in passes] == [False, False, True]


def hashes(path):
    return {row.prompt_hash for row in load_rows(str(path), need_response=True)}


@pytest.mark.parametrize("relearn", ["true", "false"])
def test_a_point_named_by_an_adapter_of_another_base_is_one_line(base, adapters, rows, tmp_path, capsys, relearn):
    pairs = random_pairs(make_model(hidden_size=24), 2, 7)
    write_adapter(tmp_path / "other", pairs, base=str(base), manifest={}, seen=frozenset(), card="card")
    point = f"{{utility: 1.0, {tmp_path / 'other'}: 1.0}}"
    flags = ["--model.relearn", relearn, "--model.reference_safety", point]
    assert main(fisher_flags(base, adapters, rows, tmp_path / "f", *flags)) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert "other" in said
