import json
import logging

import numpy as np
import pytest
import torch
from peft import PeftModel

from src.adapters.pairs import weighted_sum
from src.adapters.peft_files import read_adapter, write_adapter
from src.errors import InputError
from src.gevp.pencil import make_pencil
from src.gevp.solve import solve
from src.merge.combinations.concatenate import Concatenate
from src.merge.combinations.dare import Dare
from src.merge.combinations.knots import Knots
from src.merge.combinations.linear import Linear
from src.merge.combinations.task_arithmetic import TaskArithmetic
from src.merge.combinations.ties import Ties
from src.merge.combinations.tsv_m import TsvM
from src.merge.sst import Sst
from src.merge.stage import merge
from tests.merging import regauged, weight_space_fishers, write_fishers
from tests.oracles import dense_filtered, dense_pencil
from tests.tiny import make_model, random_pairs


@pytest.mark.parametrize("method", [Sst(), Sst(filter="topk", k=5, rho_s=0.0), TaskArithmetic()])
def test_the_merge_does_not_depend_on_the_factors(method):
    model = make_model()
    utility, safety = random_pairs(model, 3, 1), random_pairs(model, 2, 2)
    turned = regauged(safety)
    one = method.patch(utility, safety, weight_space_fishers(safety)).pairs
    two = method.patch(regauged(utility), turned, weight_space_fishers(turned)).pairs
    for name in safety:
        torch.testing.assert_close(one[name].dense(), two[name].dense(), rtol=1e-6, atol=1e-8)


def test_sst_soft_is_the_minimiser_of_its_objective():
    safety = random_pairs(make_model(), 2, 2)
    fisher = weight_space_fishers(safety)
    patch = Sst(t=4.0, rho=0.2, rho_s=3.0).patch({}, safety, fisher)
    c0 = fisher.basis.coordinates(safety).numpy()
    left, right = dense_pencil(fisher.safety.dense().numpy(), fisher.utility.dense().numpy(), rho=0.2, rho_s=3.0)
    tau = 4.0 * fisher.safety.trace() / fisher.utility.trace()
    found = fisher.basis.coordinates(patch.pairs).numpy()
    gradient = left @ (found - c0) + tau * right @ found
    assert abs(gradient).max() < 1e-8 * abs(left @ c0).max()


def test_energies_are_reported_on_held_out_rows():
    safety = random_pairs(make_model(), 2, 2)
    fisher = weight_space_fishers(safety, n_s=8, n_u=8)
    method = Sst(rho_s=0.0, t=1.0)
    findings = method.patch({}, safety, fisher).findings
    whole = fisher.basis.coordinates(safety)
    system = solve(make_pencil(fisher.safety, fisher.utility, rho=0.1, rho_s=0.0))
    fitted = fisher.utility.energy(system.expand(whole).at(method._phi(system))) / fisher.utility.energy(whole)
    assert set(findings["held_out"]) == {"safety_energy_kept", "utility_tax_kept"}
    assert findings["held_out"]["utility_tax_kept"] != pytest.approx(fitted, rel=0.05)


@pytest.mark.parametrize(
    ("options", "phi"),
    [
        ({"filter": "soft", "t": 2.0, "rho_s": 0.5}, lambda values, tau: values / (values + 2.0 * tau)),
        ({"filter": "threshold", "t": 0.5, "rho_s": 0.1}, lambda values, tau: values > 0.5 * tau),
        # Directions that safety rows have seen: of all rows 8, of each half 4. Beside their cuts stands the whole
        # patch, so 5 is in the middle of all rows' nine cuts as 3 is of a half's five.
        ({"filter": "topk", "k": 5, "rho_s": 0.0}, lambda values, _: np.arange(len(values)) < 3),
    ],
)
def test_held_out_shares_equal_dense_filters_of_one_half_judged_by_the_other(options, phi):
    safety = random_pairs(make_model(), 2, 2)
    fisher = weight_space_fishers(safety, n_s=8, n_u=9)
    c0 = fisher.basis.coordinates(safety).numpy()
    halves = [[half.dense().numpy() for half in side.halves(0)] for side in (fisher.safety, fisher.utility)]
    kept = []
    for fit in (0, 1):
        left, right = dense_pencil(halves[0][fit], halves[1][fit], rho=0.1, rho_s=options["rho_s"])
        ratio = np.trace(halves[0][fit]) / np.trace(halves[1][fit])
        made = dense_filtered(left, right, c0, lambda values, ratio=ratio: phi(values, ratio))
        kept.append([(made @ side[1 - fit] @ made) / (c0 @ side[1 - fit] @ c0) for side in halves])
    found = Sst(**options).patch({}, safety, fisher).findings["held_out"]
    expected = dict(zip(("safety_energy_kept", "utility_tax_kept"), np.mean(kept, axis=0), strict=True))
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": 0.0}, "method.rho is 0.0"),
        ({"rho": -1.0}, "method.rho is -1.0"),
        ({"rho_s": -1.0}, "method.rho_s is -1.0"),
        ({"t": -1.0}, "method.t is -1.0"),
        ({"filter": "topk"}, "filter is 'topk', which needs method.k"),
        ({"k": 3}, "method.k is 3 with filter 'soft', which takes none; topk does"),
        ({"filter": "topk", "k": 0}, "at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        Sst(**options)


def test_k_above_the_number_of_coordinates_is_refused():
    safety = random_pairs(make_model(), 2, 2)
    with pytest.raises(InputError, match=r"method.k is 57; expected 1 to D = 56"):
        Sst(filter="topk", k=57).patch({}, safety, weight_space_fishers(safety))


def test_a_patch_outside_the_core_space_is_refused():
    model = make_model()
    with pytest.raises(InputError, match="another safety adapter"):
        Sst().patch({}, random_pairs(model, 2, 3), weight_space_fishers(random_pairs(model, 2, 2)))


@pytest.fixture
def fisher_folder(adapters, base, tmp_path):
    return write_fishers(tmp_path / "fisher", adapters, base)


def run(adapters, output, **options):
    given = {"utility": str(adapters["utility"]), "safety": str(adapters["safety"]), "output": str(output)}
    merge(**given | {"method": TaskArithmetic()} | options)
    return output


def deltas(folder):
    return {name: pair.dense() for name, pair in read_adapter(folder).pairs.items()}


def test_task_arithmetic_equals_pefts_exact_concatenation(adapters, tmp_path):
    run(adapters, tmp_path / "m", alpha=0.7)
    peft = PeftModel.from_pretrained(make_model(), str(adapters["utility"]), adapter_name="u")
    peft.load_adapter(str(adapters["safety"]), adapter_name="s")
    peft.add_weighted_adapter(["u", "s"], [1.0, 0.7], "both", combination_type="cat")
    for name, delta in deltas(tmp_path / "m").items():
        module = peft.get_submodule(f"base_model.model.{name}")
        torch.testing.assert_close(delta.float(), module.get_delta_weight("both").float(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("sst", [False, True])
def test_alpha_zero_reproduces_the_utility_adapter(adapters, fisher_folder, tmp_path, sst):
    method = Sst() if sst else TaskArithmetic()
    run(adapters, tmp_path / "m", method=method, alpha=0.0, fisher=str(fisher_folder))
    utility = deltas(adapters["utility"])
    for name, delta in deltas(tmp_path / "m").items():
        assert torch.equal(delta, utility[name])


def test_a_path_of_strengths_is_linear_in_the_filtered_patch(adapters, fisher_folder, tmp_path):
    run(adapters, tmp_path / "m", method=Sst(), alpha=[0.5, 1.0], fisher=str(fisher_folder))
    utility = deltas(adapters["utility"])
    half, whole = deltas(tmp_path / "m" / "alpha-0.5"), deltas(tmp_path / "m" / "alpha-1")
    for name, delta in utility.items():
        torch.testing.assert_close(2 * (half[name] - delta), whole[name] - delta, rtol=1e-4, atol=1e-7)
    assert read_adapter(tmp_path / "m" / "alpha-1").pairs[name].rank == 3 + 2


def test_the_written_adapter_equals_the_merge_in_memory(adapters, fisher_folder, tmp_path):
    run(adapters, tmp_path / "m", method=Sst(), alpha=0.8, fisher=str(fisher_folder))
    utility, safety = (read_adapter(adapters[name]).pairs for name in ("utility", "safety"))
    patch = Sst().patch(utility, safety, weight_space_fishers(safety)).pairs
    expected = weighted_sum([utility, patch], [1.0, 0.8])
    model = make_model()
    loaded = PeftModel.from_pretrained(make_model(), str(tmp_path / "m")).double()
    for name, pair in expected.items():
        model.get_submodule(name).weight += pair.dense()
    ids = torch.arange(12)[None]
    torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-5, atol=1e-6)


def test_a_merge_records_its_inputs(adapters, fisher_folder, tmp_path):
    run(adapters, tmp_path / "m", method=Sst(), alpha=0.8, fisher=str(fisher_folder))
    manifest = json.loads((tmp_path / "m" / "manifest.json").read_text())
    assert manifest["safety"]["sha256"] == read_adapter(adapters["safety"]).sha256
    assert manifest["settings"]["rho_s"] == 10.0
    assert read_adapter(tmp_path / "m").seen == {"safety-prompt", "utility-prompt"}
    assert "SST soft" in (tmp_path / "m" / "README.md").read_text()


def test_a_merge_records_the_weights_of_its_adapters_and_what_they_were_trained_on(base, adapters, tmp_path):
    trained_on = {"name": str(base), "fingerprint": "f0"}
    pairs = read_adapter(adapters["utility"]).pairs
    write_adapter(tmp_path / "a", pairs, base=str(base), manifest={"base": trained_on}, seen=frozenset(), card="c")
    given = [str(tmp_path / "a"), str(adapters["safety"])]
    merge(utility=given, utility_weights=[0.5, 2.0], output=str(tmp_path / "m"))
    manifest = read_adapter(tmp_path / "m").manifest
    assert [each["weight"] for each in manifest["utility"]] == [0.5, 2.0]
    assert manifest["base"] == trained_on


def test_equal_inputs_give_equal_bytes(adapters, fisher_folder, tmp_path):
    for name in ("a", "b"):
        run(adapters, tmp_path / name, method=Sst(), alpha=0.8, fisher=str(fisher_folder))
    assert read_adapter(tmp_path / "a").sha256 == read_adapter(tmp_path / "b").sha256


def test_fisher_files_of_other_weights_warn(adapters, fisher_folder, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("src"), "propagate", True)
    run(adapters, tmp_path / "m", method=Sst(), fisher=str(fisher_folder))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    run(adapters, tmp_path / "n", method=Sst(), fisher=str(fisher_folder), utility_weights=[0.5])
    assert "measured at utility weights [1.0], not [0.5]" in caplog.text
    caplog.clear()
    # A mean of one expert is that expert, whatever its weight; a trimmed one is another model.
    mean = {"combine": Linear(), "utility_weights": [0.5]}
    run(adapters, tmp_path / "o", method=Sst(), fisher=str(fisher_folder), **mean)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    run(adapters, tmp_path / "p", method=Sst(), fisher=str(fisher_folder), combine=TsvM())
    assert "measured at a plain sum of the utility adapters, not at what TsvM makes of them" in caplog.text


def test_a_mean_of_experts_is_no_sum_of_them():
    """Fisher files of two experts at weight 1 each are not those of their mean."""
    assert Linear().sum_weights([1.0, 3.0]) == [0.25, 0.75]
    assert TaskArithmetic().sum_weights([1.0, 3.0]) == Concatenate().sum_weights([1.0, 3.0]) == [1.0, 3.0]
    assert all(one.sum_weights([1.0]) is None for one in (Ties(), Dare(), TsvM(), Knots()))


@pytest.mark.parametrize("alpha", [-0.1, float("nan"), float("inf"), [], [1.0, 1.0]])
def test_strengths_out_of_range_are_refused(adapters, tmp_path, alpha):
    with pytest.raises(InputError, match="alpha is"):
        run(adapters, tmp_path / "m", alpha=alpha)
    assert not (tmp_path / "m").exists()


def test_an_existing_output_is_kept_unless_told(adapters, tmp_path):
    run(adapters, tmp_path / "m", alpha=1.0)
    before = read_adapter(tmp_path / "m").sha256
    with pytest.raises(InputError, match="exists already"):
        run(adapters, tmp_path / "m", alpha=0.5)
    assert read_adapter(tmp_path / "m").sha256 == before
    run(adapters, tmp_path / "m", alpha=0.5, overwrite=True)
    assert read_adapter(tmp_path / "m").sha256 != before
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_failed_write_leaves_nothing_behind(adapters, tmp_path, monkeypatch):
    run(adapters, tmp_path / "m", alpha=1.0)
    before = read_adapter(tmp_path / "m").sha256

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("src.adapters.peft_files.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        run(adapters, tmp_path / "m", alpha=0.5, overwrite=True)
    assert read_adapter(tmp_path / "m").sha256 == before
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_fisher_files_of_other_adapters_or_bases_are_refused(adapters, fisher_folder, tmp_path):
    swapped = {"utility": adapters["safety"], "safety": adapters["utility"]}
    with pytest.raises(InputError, match="measured for the safety adapter"):
        run(swapped, tmp_path / "m", method=Sst(), fisher=str(fisher_folder))
    with pytest.raises(InputError, match="measured at the utility adapters"):
        run({**adapters, "utility": adapters["safety"]}, tmp_path / "m", method=Sst(), fisher=str(fisher_folder))
    with pytest.raises(InputError, match="pass --fisher"):
        run(adapters, tmp_path / "m", method=Sst())
    files = [fisher_folder / f"{name}.safetensors" for name in ("safety", "utility")]
    files[0].write_bytes(files[1].read_bytes())
    with pytest.raises(InputError, match="holds the utility pass"):
        run(adapters, tmp_path / "m", method=Sst(), fisher=str(fisher_folder))
