"""Fisher files of every form through the command line: measured, then merged."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from src.adapters.basis import CoreBasis
from src.adapters.peft_files import read_adapter
from src.cli import main
from src.errors import InputError
from src.fisher.base import weighted_mean
from src.fisher.files import load_fisher
from src.gevp.overlap import overlap
from src.merge.base import FisherPair, PatchedFisher
from src.merge.fisher_passes import NEEDED, Pass, check_keys
from src.merge.fishers import _calibration, read_pair
from src.merge.sst import Sst
from src.merge.stage import merge
from src.models.base import BaseSpec, fingerprint, load_model
from tests.commands import fisher_flags, measured_once
from tests.merging import rewritten, write_fishers
from tests.oracles import dense_pencil

REPRESENTATIONS = ["lowrank", "block", "kronecker", "diagonal"]
SIDES = ["safety", "utility"]
CONTROLS = ["random", "safety_only", "utility_only", "swapped"]


@pytest.fixture(scope="module")
def measured(base, adapters, rows, tmp_path_factory):
    """Directories of Fisher files by name, each measured once."""
    return measured_once(tmp_path_factory.mktemp("measured"), base, adapters, rows)


def run(adapters, fisher, output, *flags):
    given = ["--utility", str(adapters["utility"]), "--safety", str(adapters["safety"]), "--fisher", str(fisher)]
    return main(["merge", *given, "--alpha", "1.0", "--output", str(output), *flags])


def expected(method, adapters, *folders, weights=(1.0,)):
    """The method on the files' matrices, without the stage."""
    utility, safety = (read_adapter(adapters[name]).pairs for name in ("utility", "safety"))
    files = [{p.stem: load_fisher(p) for p in folder.glob("*.safetensors")} for folder in folders]
    one, mean = files[0]["safety"], weighted_mean([f["utility"].fisher for f in files], list(weights))
    pair = FisherPair(one.fisher, mean, CoreBasis(one.u, one.v))
    if method.relearns:
        benign = files[0]["benign"]
        extra = {"benign": benign.fisher, "safety_mean": one.mean, "benign_mean": benign.mean}
        pair = PatchedFisher(pair.safety, pair.utility, pair.basis, **extra)
    patch = method.patch(utility, safety, pair).pairs
    return {name: utility[name].dense() + patch[name].dense() for name in utility}


def assert_equal(folder, deltas):
    for name, pair in read_adapter(folder).pairs.items():
        torch.testing.assert_close(pair.dense(), deltas[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", REPRESENTATIONS)
def test_every_representation_is_merged_from_its_files(adapters, measured, tmp_path, kind):
    fisher = measured(kind, "--model.representation", kind)
    sst = ["--method", "Sst", "--method.t", "3", "--alpha", "[0.5,1.0]"]
    assert run(adapters, fisher, tmp_path / "m", *sst) == 0
    assert_equal(tmp_path / "m" / "alpha-1", expected(Sst(t=3.0), adapters, fisher))
    manifest = read_adapter(tmp_path / "m" / "alpha-0.5").manifest
    assert manifest["findings"]["representation"] == kind
    assert [entry["pass"] for entry in manifest["fisher"]] == ["safety", "utility"]
    files = [load_fisher(fisher / f"{side}.safetensors").fisher for side in ("safety", "utility")]
    found = overlap(*files)
    assert manifest["overlap"].keys() == found.keys()
    for key, value in found.items():
        # Sums of float64 in another order of threads.
        assert manifest["overlap"][key] == pytest.approx(value, rel=1e-9)
    assert len(manifest["overlap"]["angles"]) > 1
    # Strength changes nothing in it: one picture for both.
    assert [p.parent for p in (tmp_path / "m").rglob("pencil.png")] == [tmp_path / "m"]
    for control in CONTROLS:
        options = {"filter": "threshold", "t": 1.0, "rho_s": 0.5, "control": control}
        flags = [text for key, value in options.items() for text in (f"--method.{key}", str(value))]
        assert run(adapters, fisher, tmp_path / control, "--method", "Sst", *flags) == 0
        assert_equal(tmp_path / control, expected(Sst(**options), adapters, fisher))
        assert (tmp_path / control / "pencil.png").stat().st_size > 1000


@pytest.mark.parametrize("kind", ["lowrank", "diagonal"])
def test_coefficients_are_relearned_from_files(adapters, measured, tmp_path, kind):
    fisher = measured(f"{kind}-relearn", "--model.representation", kind, "--model.relearn", "true")
    assert run(adapters, fisher, tmp_path / "m", "--method", "Sst", "--method.coefficients", "relearn") == 0
    assert_equal(tmp_path / "m", expected(Sst(coefficients="relearn"), adapters, fisher))
    findings = read_adapter(tmp_path / "m").manifest["findings"]
    assert findings["objective_after"] < findings["objective_before"]


def test_missing_relearn_files_name_the_flag(adapters, measured, tmp_path, capsys):
    relearn = ["--method", "Sst", "--method.coefficients", "relearn"]
    assert run(adapters, measured("lowrank"), tmp_path / "m", *relearn) == 2
    assert "--model.relearn true" in capsys.readouterr().err
    whole = measured("lowrank-relearn", "--model.relearn", "true")
    part = shutil.copytree(whole, tmp_path / "part")
    shutil.copy(measured("lowrank") / "safety.safetensors", part)
    assert run(adapters, part, tmp_path / "m", *relearn) == 2
    assert "holds no mean scores" in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


def test_the_interpolating_form_filters_the_difference(adapters, measured, tmp_path, capsys):
    form = ["--method", "Sst", "--method.form", "interpolating", "--method.t", "0"]
    fisher = measured("union", "--model.basis", "union")
    assert run(adapters, fisher, tmp_path / "m", *form) == 0
    # t = 0 keeps the whole patch: at strength 1 only the safety adapter is left.
    safety = read_adapter(adapters["safety"]).pairs
    assert_equal(tmp_path / "m", {name: pair.dense() for name, pair in safety.items()})
    assert run(adapters, measured("lowrank"), tmp_path / "n", *form) == 2
    assert "--model.basis union" in capsys.readouterr().err
    # t = 2, from the same files: the dense solve of the difference in the union's coordinates.
    utility, files = read_adapter(adapters["utility"]).pairs, [load_fisher(fisher / f"{p}.safetensors") for p in SIDES]
    u, v = files[0].u, files[0].v
    whole = torch.cat([(u[n].T @ (safety[n].dense() - utility[n].dense()) @ v[n]).flatten() for n in u]).numpy()
    left, right = dense_pencil(*(file.fisher.dense().numpy() for file in files), rho=0.1, rho_s=10.0)
    tau = 2.0 * files[0].fisher.trace() / files[1].fisher.trace()
    kept = torch.from_numpy(np.linalg.solve(left + tau * right, left @ whole))
    cores = zip(u, kept.split([u[n].shape[1] * v[n].shape[1] for n in u]), strict=True)
    parts = {n: u[n] @ core.view(u[n].shape[1], -1) @ v[n].T for n, core in cores}
    for name, found in expected(Sst(form="interpolating", t=2.0), adapters, fisher).items():
        torch.testing.assert_close(found, utility[name].dense() + parts[name], rtol=1e-6, atol=1e-8)


def test_several_utility_fishers_are_their_weighted_mean(adapters, measured, rows, tmp_path, capsys):
    one = measured("lowrank")
    two = measured("other", "--data.utility", str(rows["task"]), "--model.seed", "7")
    folders, weights = f"[{one},{two}]", ["--fisher_weights", "[3,1]"]
    assert run(adapters, folders, tmp_path / "m", "--method", "Sst", *weights) == 0
    assert_equal(tmp_path / "m", expected(Sst(), adapters, one, two, weights=(3.0, 1.0)))
    assert [each["weight"] for each in read_adapter(tmp_path / "m").manifest["fisher"]] == [1.0, 3.0, 1.0]
    assert run(adapters, folders, tmp_path / "n", "--method", "Sst", "--fisher_weights", "[1,2,3]") == 2
    assert "3 weights for 2 directories" in capsys.readouterr().err
    union = measured("union", "--model.basis", "union")
    assert run(adapters, f"[{one},{union}]", tmp_path / "n", "--method", "Sst") == 2
    assert "in other coordinates than" in capsys.readouterr().err
    block = measured("block", "--model.representation", "block")
    assert run(adapters, f"[{one},{block}]", tmp_path / "n", "--method", "Sst") == 2
    assert "have no mean" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "Sst"], "needs lowrank or block or kronecker or diagonal in core coordinates"),
        (["--method", "Sst", "--fisher_weights", "[-1]"], "fisher_weights is [-1"),
        (["--method", "AlignGuardPosthoc"], "needs lowrank in core coordinates"),
    ],
)
def test_files_of_a_form_that_a_method_cannot_use_are_refused(adapters, measured, tmp_path, capsys, flags, message):
    fisher = measured("weight", "--model.representation", "diagonal", "--model.coordinates", "weight")
    assert run(adapters, fisher, tmp_path / "m", *flags) == 2
    assert message in capsys.readouterr().err


def counted(monkeypatch):
    """Every call of the solver."""
    from src.gevp.solve import solve

    calls = []

    def counting(pencil, **options):
        calls.append(pencil.dim)
        return solve(pencil, **options)

    monkeypatch.setattr("src.merge.sst_solved.solve", counting)
    monkeypatch.setattr("src.gevp.heldout.solve", counting)
    return calls


@pytest.mark.parametrize(
    ("method", "sweep"),
    [
        (Sst(), {"t": [0.1 * i for i in range(1, 26)]}),
        (Sst(filter="topk", k=1, rho_s=0.0), {"k": list(range(1, 7))}),
        (Sst(filter="energy", share=0.5, rho_s=0.0), {"share": [0.3, 0.6]}),
        (Sst(filter="threshold", rho_s=0.5), {"t": [0.5, 1.0]}),
    ],
)
def test_a_path_costs_one_solve_of_all_rows(adapters, base, tmp_path, monkeypatch, method, sweep):
    calls = counted(monkeypatch)
    monkeypatch.setattr("src.merge.stage.plot_pencil", lambda *_: None)
    fisher = str(write_fishers(tmp_path / "fisher", adapters, base))
    given = {"utility": str(adapters["utility"]), "safety": str(adapters["safety"]), "fisher": fisher}
    merge(**given, method=method, sweep=sweep, alpha=[0.5, 1.0], output=str(tmp_path / "m"))
    assert len(list((tmp_path / "m").rglob("adapter_config.json"))) == 2 * len(next(iter(sweep.values())))
    # One of all rows, and one of each half, for the shares that are reported on held-out rows.
    assert len(calls) == 3


@pytest.mark.parametrize("ridges", [{"rho": [0.1, 0.2]}, {"rho_s": [0.5, 10.0]}])
def test_other_ridges_are_solved_anew(adapters, base, tmp_path, monkeypatch, ridges):
    calls = counted(monkeypatch)
    monkeypatch.setattr("src.merge.stage.plot_pencil", lambda *_: None)
    fisher = str(write_fishers(tmp_path / "fisher", adapters, base))
    given = {"utility": str(adapters["utility"]), "safety": str(adapters["safety"]), "fisher": fisher}
    merge(**given, method=Sst(), sweep=ridges | {"t": [1.0, 2.0]}, output=str(tmp_path / "m"))
    assert len(calls) == 6


def test_a_manifest_holds_the_flags_and_a_card_its_evaluation(adapters, base, tmp_path, capsys):
    fisher = write_fishers(tmp_path / "fisher", adapters, base)
    sst = ["--method", "Sst", "--alpha", "0.5", "--license", "mit"]
    assert run(adapters, fisher, tmp_path / "m", *sst) == 0
    merged = read_adapter(tmp_path / "m")
    assert merged.manifest["flags"]["fisher"] == str(fisher)
    assert merged.manifest["flags"]["alpha"] == 0.5
    assert merged.manifest["license"] == "mit"

    def model(sha, value):
        suites = {"harmful": {"kind": "harmful", "refusal": {"value": value, "interval": [0.1, 0.9], "n": 7}}}
        return {"name": "x", "adapter": sha and {"path": "x", "sha256": sha}, "suites": suites}

    metrics = tmp_path / "metrics.json"
    metrics.write_text(json.dumps({"models": [model(None, 0.25), model(merged.sha256, 0.75)]}))
    again = [*sst, "--overwrite", "true", "--evaluation", str(metrics)]
    assert run(adapters, fisher, tmp_path / "m", *again) == 0
    card = (tmp_path / "m" / "README.md").read_text()
    assert "| harmful | refusal | 0.750 [0.100, 0.900], n = 7 | 0.250 [0.100, 0.900], n = 7 |" in card
    assert read_adapter(tmp_path / "m").sha256 == merged.sha256
    metrics.write_text(json.dumps({"models": [model("0" * 64, 0.75)]}))
    assert run(adapters, fisher, tmp_path / "m", *again) == 2
    assert "no model with the weights" in capsys.readouterr().err
    assert read_adapter(tmp_path / "m").sha256 == merged.sha256


def test_every_tensor_of_a_merge_from_files_is_finite(adapters, measured, tmp_path):
    assert run(adapters, measured("lowrank"), tmp_path / "m", "--method", "Sst") == 0
    tensors = load_file(tmp_path / "m" / "adapter_model.safetensors")
    assert all(torch.isfinite(tensor).all() and tensor.dtype == torch.float32 for tensor in tensors.values())


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("at-base", ["--model.reference_utility", "base"], "reference is base, that of"),
        ("data", ["--model.labels", "data"], "labels is data, that of"),
        ("token", ["--model.granularity", "token"], "granularity is token, that of"),
    ],
)
def test_directories_that_were_measured_unlike_have_no_mean(adapters, measured, tmp_path, capsys, name, flags, message):
    one, other = measured("lowrank"), measured(name, *flags)
    assert run(adapters, f"[{one},{other}]", tmp_path / "m", "--method", "Sst") == 2
    error = capsys.readouterr().err
    assert f"{other}/utility.safetensors: {message} {one}/utility.safetensors" in error
    assert not (tmp_path / "m").exists()


def test_a_set_in_two_directories_keeps_its_held_out_rows_apart(adapters, measured, tmp_path):
    fisher = measured("lowrank")
    for name, folders in (("one", str(fisher)), ("two", f"[{fisher},{fisher}]")):
        assert run(adapters, folders, tmp_path / name, "--method", "Sst", "--method.rho", "1e-3") == 0
    one, two = (read_adapter(tmp_path / name).manifest["findings"]["held_out"] for name in ("one", "two"))
    assert two["utility_tax_kept"] == pytest.approx(one["utility_tax_kept"], rel=1e-4)


@pytest.mark.parametrize("key", ["seen", "base", "pass"])
def test_a_record_that_lacks_a_key_is_refused(adapters, measured, tmp_path, capsys, key):
    from safetensors import safe_open
    from safetensors.torch import save_file

    part = shutil.copytree(measured("lowrank"), tmp_path / "part")
    path = part / "safety.safetensors"
    with safe_open(path, "pt") as handle:
        record = json.loads(handle.metadata()["sst_fisher"])
    del record[key]
    save_file(load_file(path), path, metadata={"sst_fisher": json.dumps(record)})
    assert run(adapters, part, tmp_path / "m", "--method", "Sst") == 2
    assert f"{path}: its record has no '{key}'" in capsys.readouterr().err


def test_files_of_two_bases_are_refused(adapters, measured, tmp_path, capsys):
    part = shutil.copytree(measured("lowrank"), tmp_path / "part")
    rewritten(part / "utility.safetensors", lambda record: record["base"].update(fingerprint="another"))
    assert run(adapters, part, tmp_path / "m", "--method", "Sst") == 2
    told = (
        f"{part}/utility.safetensors: measured on the base '.*', {part}/safety.safetensors on '.*' with other weights"
    )
    assert re.search(told, capsys.readouterr().err)


def test_a_merge_of_adapters_without_a_fingerprint_has_that_of_their_fisher_files(base, adapters, measured, tmp_path):
    assert read_adapter(adapters["utility"]).fingerprint is None
    assert run(adapters, measured("lowrank"), tmp_path / "m", "--method", "Sst") == 0
    found = read_adapter(tmp_path / "m").fingerprint
    assert found == fingerprint(load_model(BaseSpec(str(base), dtype="float64")))


def test_the_points_of_measurement_are_told(adapters, measured, tmp_path, capsys):
    assert run(adapters, measured("lowrank"), tmp_path / "m", "--method", "Sst") == 0
    assert f"{measured('lowrank')}: F_s was measured at patched, F_u at utility" in capsys.readouterr().err
    form = ["--method", "Sst", "--method.form", "interpolating"]
    assert run(adapters, measured("union", "--model.basis", "union"), tmp_path / "n", *form) == 0
    told = "safety.safetensors: measured at patched; with these options Sst leads to the safety adapter alone"
    assert told in capsys.readouterr().err
    where = ["--model.basis", "union", "--model.reference_safety", "{safety: 1.0}"]
    assert run(adapters, measured("at-safety", *where), tmp_path / "o", *form) == 0
    assert "alone" not in capsys.readouterr().err


def test_utility_adapters_in_another_order_are_told_so(base, adapters, rows, tmp_path, capsys):
    both, turned = ([str(adapters[name]) for name in names] for names in (SIDES, SIDES[::-1]))
    flags = fisher_flags(base, adapters, rows, tmp_path / "f", "--model.utility", json.dumps(both))
    assert main(flags) == 0
    given = ["--utility", json.dumps(turned), "--safety", str(adapters["safety"]), "--fisher", str(tmp_path / "f")]
    assert main(["merge", *given, "--method", "Sst", "--output", str(tmp_path / "m")]) == 2
    assert "those of this merge are these in another order" in capsys.readouterr().err


def test_options_that_nothing_reads_are_told(adapters, measured, tmp_path, capsys):
    flags = ["--method", "Sst", "--method.seed", "3"]
    assert run(adapters, measured("lowrank"), tmp_path / "m", *flags) == 0
    assert "method.seed has no effect here: it is read with control random" in capsys.readouterr().err
    flags = ["--method.filter", "topk", "--method.k", "3", "--method.control", "random"]
    assert run(adapters, measured("lowrank"), tmp_path / "r", "--method", "Sst", "--method.seed", "3", *flags) == 0
    assert "no effect" not in capsys.readouterr().err
    fishers = measured("lowrank"), measured("other-seed", "--model.seed", "7")
    flags = ["--method", "AlignGuardPosthoc", "--method.k", "2", "--fisher_weights", "[1.0, 2.0]"]
    assert run(adapters, f"[{fishers[0]},{fishers[1]}]", tmp_path / "a", *flags) == 0
    assert "AlignGuardPosthoc reads no F_u: --fisher_weights are not used" in capsys.readouterr().err


def test_a_filter_that_keeps_nothing_says_so(adapters, measured, tmp_path, capsys):
    flags = ["--method", "Sst", "--method.filter", "threshold", "--method.t"]
    assert run(adapters, measured("lowrank"), tmp_path / "m", *flags, "1e9") == 0
    assert "the filter keeps no direction, so the patch is zero" in capsys.readouterr().err
    assert run(adapters, measured("lowrank"), tmp_path / "n", *flags, "0.1") == 0
    assert "keeps no direction" not in capsys.readouterr().err


def test_random_directions_of_an_empty_selection_are_refused(adapters, measured, tmp_path, capsys):
    flags = ["--method.filter", "threshold", "--method.t", "1e9", "--method.control", "random"]
    assert run(adapters, measured("lowrank"), tmp_path / "m", "--method", "Sst", *flags) == 2
    assert "method.t is 1000000000.0: the filter keeps no direction" in capsys.readouterr().err


@pytest.mark.parametrize("coefficients", ["filter", "relearn"])
def test_a_patch_of_zero_has_nothing_to_filter(adapters, measured, coefficients):
    file = load_fisher(measured("lowrank") / "safety.safetensors")
    pair = FisherPair(file.fisher, file.fisher, CoreBasis(file.u, file.v))
    utility, safety = (read_adapter(adapters[name]).pairs for name in ("utility", "safety"))
    zero = {name: own.scaled(0.0) for name, own in safety.items()}
    with pytest.raises(InputError, match=r"the patch to filter is zero \(form additive\)"):
        Sst(coefficients=coefficients).patch(utility, zero, pair)


def test_passes_in_weight_coordinates_are_of_one_space_whatever_basis_they_name(measured):
    flags = ["--model.coordinates", "weight", "--model.representation", "diagonal", "--model.basis"]
    folders = [measured(f"weight-{basis}", *flags, basis) for basis in ("safety", "union")]
    one, two = (Pass(folder, load_fisher(folder / "safety.safetensors")) for folder in folders)
    assert one.file.record["basis_sha256"] != two.file.record["basis_sha256"]
    two.check_coordinates(one)


def test_every_pass_of_a_directory_has_the_directorys_weight(adapters, monkeypatch):
    asked = []
    monkeypatch.setattr("src.merge.fishers.read_pass", lambda f, name, _, w=1.0: asked.append((f, name, w)))
    given = [read_adapter(adapters["utility"])], read_adapter(adapters["safety"])
    with pytest.raises(AttributeError, match="check_adapters"):  # what is read here is None
        read_pair(["a", "b"], [3.0, 1.0], *given, Sst(coefficients="relearn"))
    for kind in ("utility", "benign"):
        assert [(f, w) for f, name, w in asked if name == kind] == [("a", 3.0), ("b", 1.0)]


def test_prompts_of_every_pass_have_been_seen():
    bases = [{"fingerprint": known} for known in (None, "x", "x")]
    records = [{"seen": [prompt], "base": base} for prompt, base in zip("abc", bases, strict=True)]
    passes = [SimpleNamespace(file=SimpleNamespace(record=record), entry={}) for record in records]
    assert _calibration(passes).seen == {"a", "b", "c"}
    assert _calibration(passes).base_fingerprint == "x"


@pytest.mark.parametrize(
    ("change", "what"),
    [({"base": None}, "'base'"), ({"seen": None}, "'seen'"), ({"utility": [None]}, "'path' in 'utility'")],
)
def test_a_key_without_a_value_is_one_that_is_missing(change, what):
    adapter = {"path": "a", "sha256": "x", "weight": 1.0}
    record = dict.fromkeys(NEEDED, "x") | {"base": {"name": "b", "fingerprint": None}, "safety": adapter}
    one = Pass(Path("f"), SimpleNamespace(record=record | {"utility": [adapter], "seen": [], "reference": None}))
    check_keys(one, NEEDED)
    with pytest.raises(InputError, match=r"^f: its record has no 'reference'; expected a file written"):
        one.check_expert(SimpleNamespace(sha256="x", identity="y"))
    one.file.record.update(change)
    with pytest.raises(InputError, match=f"^f: its record has no {what}; expected a file written"):
        check_keys(one, NEEDED)
