"""Safety methods against their definitions on dense matrices."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from src.adapters.deltas import DenseDelta, combined
from src.adapters.pairs import LowRankPair, weighted_sum
from src.adapters.peft_files import read_adapter, write_adapter
from src.cli import main, start_logging
from src.errors import InputError
from src.merge.align_guard import AlignGuardPosthoc
from src.merge.aligned import projected
from src.merge.closest_safe_update import ClosestSafeUpdate
from src.merge.masked import Masking
from src.merge.resta import Resta
from src.merge.safe_lora import SafeLora
from src.merge.safe_merge import SafeMerge
from src.merge.sst import Sst
from src.merge.sst_diagonal import SstDiagonal, sst_diagonal
from src.merge.sst_m import SstM
from src.merge.sst_v import SstV
from src.merge.stage import merge
from tests.merging import matching_fishers, weight_space_fishers
from tests.tiny import make_model, random_pairs


@pytest.fixture
def updates():
    model = make_model()
    return random_pairs(model, 3, 1), random_pairs(model, 2, 2)


def merged(utility, patch):
    return {name: delta.dense() for name, delta in combined([utility, patch.pairs], [1.0, 1.0]).items()}


def projection(v, delta):
    """C ΔW and its cosine with ΔW, by definition."""
    moved = v @ v.T / v.norm() @ delta
    return moved, (moved * delta).sum() / (moved.norm() * delta.norm())


def test_safe_lora_projects_the_modules_that_drifted(updates):
    utility, safety = updates
    cosines = {n: projection(safety[n].dense(), utility[n].dense())[1].item() for n in utility}
    tau = sorted(cosines.values())[len(cosines) // 2] + 1e-9
    found = merged(utility, SafeLora(tau=tau).patch(utility, safety, None))
    for name, pair in utility.items():
        moved, cosine = projection(safety[name].dense(), pair.dense())
        expected = moved if cosine <= tau else pair.dense()
        torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-8)


def test_safe_merge_mixes_the_modules_that_drifted(updates):
    utility, safety = updates
    cosines = [projection(safety[n].dense(), utility[n].dense())[1].item() for n in utility]
    tau = sorted(cosines)[5]
    patch = SafeMerge(tau=tau - 1e-12, keep=0.7).patch(utility, safety, None)
    assert len(patch.findings["merged"]) == 5
    found = merged(utility, patch)
    for name, pair in utility.items():
        mixed = 0.7 * pair.dense() + 0.3 * safety[name].dense()
        expected = mixed if name in patch.findings["merged"] else pair.dense()
        torch.testing.assert_close(found[name], expected)


def test_a_cosine_of_exactly_tau_is_projected_by_safe_lora_and_left_by_safe_merge(updates):
    utility, safety = updates
    cosines = SafeLora().patch(utility, safety, None).findings["cosines"]
    name, tau = sorted(cosines.items(), key=lambda entry: entry[1])[5]
    assert name in SafeLora(tau=tau).patch(utility, safety, None).findings["projected"]
    assert len(SafeLora(tau=tau).patch(utility, safety, None).findings["projected"]) == 6
    assert name not in SafeMerge(tau=tau).patch(utility, safety, None).findings["merged"]
    assert len(SafeMerge(tau=tau).patch(utility, safety, None).findings["merged"]) == 5


@pytest.fixture
def aligned_models(base, updates, tmp_path):
    """A directory whose weights are the base's plus the safety update."""
    weights = load_file(base / "model.safetensors")
    for name, pair in updates[1].items():
        weights[f"{name}.weight"] = weights[f"{name}.weight"] + pair.dense()
    (tmp_path / "aligned").mkdir()
    save_file(weights, tmp_path / "aligned" / "model.safetensors")
    return str(tmp_path / "aligned"), str(base)


@pytest.mark.parametrize("method", [SafeLora, SafeMerge, ClosestSafeUpdate])
def test_an_aligned_model_and_its_difference_as_an_adapter_give_the_same(method, aligned_models, updates):
    aligned, base = aligned_models
    utility, safety = updates
    one = merged(utility, method(aligned=aligned, base=base).patch(utility, safety, None))
    two = merged(utility, method().patch(utility, safety, None))
    for name in two:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-5)


def test_an_aligned_model_that_is_no_fine_tuned_base_is_warned_of(aligned_models, updates, tmp_path, caplog):
    import logging

    aligned, base = aligned_models
    utility, safety = updates
    near = load_file(f"{base}/model.safetensors")
    torch.manual_seed(0)
    save_file({k: w + 0.01 * w.std() * torch.randn_like(w) for k, w in near.items()}, f"{aligned}/model.safetensors")
    ours = logging.getLogger("src")
    ours.addHandler(caplog.handler)
    try:
        SafeLora(aligned=aligned, base=base).patch(utility, safety, None)
        assert not caplog.messages
        save_file({k: torch.randn_like(w) for k, w in near.items()}, f"{aligned}/model.safetensors")
        SafeLora(aligned=aligned, base=base).patch(utility, safety, None)
    finally:
        ours.removeHandler(caplog.handler)
    assert "expected a model trained from it" in caplog.text


@pytest.mark.parametrize("module", ["transformer.h.0.up", "lm_head"])
def test_an_unchanged_module_has_no_direction_under_whatever_name(module, tmp_path, capfd):
    """The base's files leave the first part of names out; the head has the embedding's weight."""
    torch.manual_seed(0)
    weights = {name: torch.randn(4, 3) for name in ("h.0.up", "h.1.up", "wte")}
    near, far = ({n: w + size * torch.randn(4, 3) * (n == "h.1.up") for n, w in weights.items()} for size in (0.1, 9.0))
    for folder, prefix, held in (("base", "", weights), ("near", "transformer.", near), ("far", "transformer.", far)):
        (tmp_path / folder).mkdir()
        save_file({f"{prefix}{n}.weight": w for n, w in held.items()}, tmp_path / folder / "model.safetensors")
    utility = {name: LowRankPair(torch.ones(1, 3), torch.ones(4, 1)) for name in (module, "transformer.h.1.up")}
    start_logging()
    for folder, strange in (("near", False), ("far", True)):
        method = SafeLora(tau=1.0, aligned=str(tmp_path / folder), base=str(tmp_path / "base"))
        assert set(method.patch(utility, {}, None).pairs) == {"transformer.h.1.up"}
        assert ("expected a model trained from it" in capfd.readouterr().err) == strange


def test_an_adapter_can_hold_the_alignment(adapters, updates):
    utility = read_adapter(adapters["utility"]).pairs
    safety = read_adapter(adapters["safety"]).pairs
    method = SafeLora(aligned=str(adapters["safety"]))
    assert not method.needs_safety
    one, two = (
        merged(utility, method.patch(utility, {}, None)),
        merged(utility, SafeLora().patch(utility, safety, None)),
    )
    for name in two:
        torch.testing.assert_close(one[name], two[name])


@pytest.mark.parametrize("method", [SafeLora, SafeMerge, ClosestSafeUpdate])
def test_what_the_alignments_adapter_has_seen_the_merged_one_has(adapters, updates, tmp_path, method):
    read = read_adapter(adapters["safety"])
    write_adapter(tmp_path / "a", updates[1], base=read.base, manifest={}, seen=frozenset({"a-prompt"}), card="c")
    given = {"utility": str(adapters["utility"]), "safety": str(adapters["safety"]), "output": str(tmp_path / "m")}
    merge(**given, method=method(aligned=str(tmp_path / "a")))
    assert "a-prompt" in read_adapter(tmp_path / "m").seen


@pytest.mark.parametrize("method", [SafeLora, SafeMerge, ClosestSafeUpdate])
def test_an_adapter_of_another_base_gives_no_direction(adapters, updates, tmp_path, method):
    write_adapter(tmp_path / "a", updates[1], base="other/base", manifest={}, seen=frozenset(), card="c")
    given = {"utility": str(adapters["utility"]), "safety": str(adapters["safety"]), "output": str(tmp_path / "m")}
    with pytest.raises(InputError, match=r"/a: trained on the base 'other/base'; that of .*utility is"):
        merge(**given, method=method(aligned=str(tmp_path / "a")))


@pytest.mark.parametrize("method", [SafeLora(tau=1.0), SafeMerge(tau=1.0), ClosestSafeUpdate()])
def test_modules_without_a_direction_stay_as_they_are(method, updates, capfd):
    utility, safety = updates
    name, other = list(utility)[:2]
    zero = {other: safety[other].scaled(0.0)}
    start_logging()
    patch = method.patch(utility, {key: pair for key, pair in safety.items() if key != name} | zero, None)
    expected = f"no direction of alignment in 2 of {len(utility)} modules, which stay as they are: {name}, {other}"
    assert expected in capfd.readouterr().err
    assert set(patch.pairs) == set(utility) - {name, other}
    with pytest.raises(InputError, match=f"has no update of {name} or any other module"):
        method.patch(utility, {}, None)


def test_an_aligned_model_that_is_the_base_gives_no_direction(aligned_models, updates):
    _, base = aligned_models
    with pytest.raises(InputError, match="has no update of"):
        SafeLora(aligned=base, base=base).patch(updates[0], {}, None)


def test_a_model_that_holds_the_alignment_needs_the_base(updates):
    utility, safety = updates
    with pytest.raises(InputError, match="name the base model's directory"):
        SafeLora(aligned="models/aligned").patch(utility, safety, None)


def test_the_closest_safe_update_minimises_its_objective(updates):
    utility, safety = updates
    found = merged(utility, ClosestSafeUpdate(penalty=3.0, rank=2).patch(utility, safety, None))
    for name, pair in utility.items():
        u = torch.linalg.svd(safety[name].dense()).U[:, :2]
        x = found[name]
        outside = x - u @ (u.T @ x)
        gradient = (x - pair.dense()) + 3.0 * outside
        assert gradient.abs().max() < 1e-8


def test_what_lies_outside_the_safe_subspace_is_reported_as_a_share_of_energy():
    utility = {"m": LowRankPair(torch.eye(2), torch.diag(torch.tensor([1.0, 2.0])))}
    safety = {"m": LowRankPair(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0], [0.0]]))}
    findings = ClosestSafeUpdate().patch(utility, safety, None).findings
    assert findings["energy_outside"]["m"] == pytest.approx(0.8)


def test_resta_adds_the_safety_vector_and_thins_the_task_vector(updates):
    utility, safety = updates
    plain = merged(utility, Resta(gamma=0.5).patch(utility, safety, None))
    expected = weighted_sum([utility, safety], [1.0, 0.5])
    name = next(iter(utility))
    torch.testing.assert_close(plain[name], expected[name].dense())
    thinned = merged(utility, Resta(density=0.5).patch(utility, safety, None))[name] - safety[name].dense()
    kept = thinned.abs() > 1e-6
    assert 0.3 < kept.double().mean() < 0.7
    torch.testing.assert_close(thinned[kept], 2 * utility[name].dense()[kept], rtol=1e-4, atol=1e-6)


def test_align_guard_removes_the_leading_directions_of_the_safety_fisher(updates):
    utility, safety = updates
    fisher = weight_space_fishers(safety)
    patch = AlignGuardPosthoc(k=2, add_safety=False).patch(utility, safety, fisher)
    left = fisher.basis.coordinates(combined([utility, patch.pairs], [1.0, 1.0]))
    _, vectors = torch.linalg.eigh(fisher.safety.dense())
    assert (vectors[:, -2:].T @ left).abs().max() < 1e-9
    before = vectors[:, :-2].T @ fisher.basis.coordinates(utility)
    torch.testing.assert_close(vectors[:, :-2].T @ left, before)
    with pytest.raises(InputError, match=r"method.k is 7; expected 1 to 6"):
        AlignGuardPosthoc(k=7).patch(utility, safety, fisher)


@pytest.mark.parametrize("add_safety", [True, False])
def test_align_guard_removes_a_share_and_reports_the_critical_energy(updates, add_safety):
    utility, safety = updates
    fisher = weight_space_fishers(safety)
    patch = AlignGuardPosthoc(k=2, gamma=0.3, add_safety=add_safety).patch(utility, safety, fisher)
    leading = torch.linalg.eigh(fisher.safety.dense())[1][:, -2:]
    critical = leading @ leading.T @ fisher.basis.coordinates(utility)
    found = merged(utility, patch)
    for name, removed in fisher.basis.patch(critical).items():
        expected = utility[name].dense() + add_safety * safety[name].dense() - 0.3 * removed.dense()
        torch.testing.assert_close(found[name].double(), expected.double(), rtol=1e-5, atol=1e-7)
    whole = sum(pair.dense().double().square().sum().item() for pair in utility.values())
    energy = critical.square().sum().item() / whole
    assert patch.findings["utility_energy_critical"] == pytest.approx(energy, rel=1e-6)
    assert 0 < energy < 1


@pytest.mark.parametrize("form", ["additive", "interpolating"])
@pytest.mark.parametrize("method", [SstV, SstM])
def test_data_free_masks_are_their_formula(method, form, updates):
    utility, safety = updates
    found = method(form=form, top=0.3).patch(utility, safety, None).pairs
    soft = method(form=form, mask="soft", tau=2.0, gamma=0.5).patch(utility, safety, None).pairs
    for name, pair in utility.items():
        u, s = pair.dense(), safety[name].dense()
        whole = s if form == "additive" else s - u
        ratio = whole**2 / (u**2 + 1e-12) if method is SstV else s.abs() / (u.abs() + 1e-8)
        count = int(0.3 * u.numel())
        threshold = ratio.reshape(-1).sort(descending=True).values[count - 1]
        torch.testing.assert_close(found[name].dense(), whole * (ratio >= threshold), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(soft[name].dense(), whole * torch.sigmoid((ratio - 2) / 0.5), rtol=1e-3, atol=1e-5)


def test_the_diagonal_variant_ranks_by_the_ratio_of_fishers(updates):
    utility, safety = updates
    draw = torch.Generator().manual_seed(0)
    fishers = [
        {n: DenseDelta(torch.rand(p.shape, generator=draw, dtype=torch.float64)) for n, p in safety.items()}
        for _ in range(2)
    ]
    masking = Masking("hard", 0.25, 1.0, 1.0, "additive")
    name = next(iter(safety))
    patch = sst_diagonal(utility, safety, *fishers, masking, epsilon=0.1, layer_weights={name: 0.5})
    ratio = fishers[0][name].matrix / (fishers[1][name].matrix + 0.1)
    threshold = ratio.reshape(-1).sort(descending=True).values[int(0.25 * ratio.numel()) - 1]
    expected = 0.5 * safety[name].dense() * (ratio >= threshold)
    torch.testing.assert_close(patch[name].dense(), expected, rtol=1e-5, atol=1e-7)
    without = sst_diagonal(utility, safety, *fishers, masking, epsilon=0.1, layer_weights={name: 0.0})
    assert set(without) == set(safety) - {name}
    with pytest.raises(ValueError, match="no diagonal Fisher"):
        sst_diagonal(utility, safety, {}, {}, masking, epsilon=0.1)


def test_the_diagonal_method_hands_its_settings_on(updates):
    utility, safety = updates
    fisher, name = matching_fishers(SstDiagonal(), utility, safety), next(iter(safety))
    f_s, f_u = (one.module_diagonal(name).view(safety[name].shape) for one in (fisher.safety, fisher.utility))
    ratio = f_s / (f_u + 0.1 * fisher.utility.trace() / fisher.utility.dim)
    method = SstDiagonal("soft", tau=1.5, gamma=0.5, form="interpolating", rho=0.1, layer_weights={name: 0.5})
    found = method.patch(utility, safety, fisher).pairs[name].dense()
    expected = 0.5 * (safety[name].dense() - utility[name].dense()) * torch.sigmoid((ratio - 1.5) / 0.5)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5, check_dtype=False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SafeLora(tau=2.0), "method.tau is 2.0"),
        (lambda: SafeMerge(keep=1.5), "method.keep is 1.5"),
        (lambda: ClosestSafeUpdate(penalty=-1.0), "method.penalty is -1.0"),
        (lambda: Resta(density=0.0), "method.density is 0.0"),
        (lambda: SstV(epsilon=0.0), "method.epsilon is 0.0"),
        (lambda: SstM(top=0.0), "method.top is 0.0"),
        (lambda: AlignGuardPosthoc(k=0), "method.k is 0"),
        (lambda: Resta(gamma=float("nan")), "method.gamma is nan"),
        (lambda: SstM(tau=float("nan")), "method.tau is nan"),
        (lambda: SstV(gamma=float("inf")), "method.gamma is inf"),
        (lambda: SstDiagonal(layer_weights={"m": float("nan")}), "method.layer_weights.m is nan"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


FULL_RANK = {
    "Safe LoRA": lambda: SafeLora(tau=0.2),
    "Safe LoRA everywhere": lambda: SafeLora(tau=1.0),
    "SafeMERGE": lambda: SafeMerge(tau=0.2),
    "closest safe update": lambda: ClosestSafeUpdate(penalty=3.0, rank=2),
    "AlignGuard": lambda: AlignGuardPosthoc(k=2),
    "SST": Sst,
    "SST interpolating": lambda: Sst(form="interpolating", filter="topk", k=3),
}


@pytest.mark.parametrize("make", FULL_RANK.values(), ids=FULL_RANK)
def test_a_full_rank_update_is_treated_as_its_factors_are(make, updates):
    utility, safety = updates
    method = make()
    union = weighted_sum([safety, utility], [1.0, 1.0])
    fisher = weight_space_fishers(union, n_s=40, n_u=40) if method.needs_fisher else None
    dense = {name: DenseDelta(pair.dense()) for name, pair in utility.items()}
    expected, found = method.patch(utility, safety, fisher), method.patch(dense, safety, fisher)
    assert any(pair.squared_norm() > 0 for pair in expected.pairs.values())
    for (name, one), two in zip(merged(utility, expected).items(), merged(dense, found).values(), strict=True):
        torch.testing.assert_close(one, two, msg=name)
    assert found.findings.keys() == expected.findings.keys()
    for key in found.findings.keys() & {"cosines", "energy_outside", "utility_energy_critical", "patch_norm_kept"}:
        assert found.findings[key] == pytest.approx(expected.findings[key])


@pytest.mark.parametrize("method", [SafeLora, SafeMerge, ClosestSafeUpdate])
def test_a_full_rank_update_and_an_aligned_model(method, aligned_models, updates):
    utility, safety = updates
    dense = {name: DenseDelta(pair.dense()) for name, pair in utility.items()}
    aligned, base = aligned_models
    patch = method(aligned=aligned, base=base).patch(dense, safety, None)
    expected = merged(utility, method().patch(utility, safety, None))
    for _ in range(2):  # read twice, as by a truncation and by a writer
        for name, found in merged(dense, patch).items():
            torch.testing.assert_close(found, expected[name], rtol=1e-3, atol=1e-5)


def test_zero_directions_project_to_zero():
    pair = LowRankPair(torch.ones(1, 3), torch.ones(2, 1))
    zero = LowRankPair(torch.zeros(1, 3), torch.zeros(2, 1))
    for direction in (zero, DenseDelta(zero.dense())):
        assert projected(direction, pair).dense().abs().max() == 0.0
        assert projected(direction, DenseDelta(pair.dense())).dense().abs().max() == 0.0


def test_an_infinite_penalty_projects_and_can_be_written(adapters, tmp_path):
    given = ["merge", "--utility", str(adapters["utility"]), "--safety", str(adapters["safety"])]
    for name, penalty in (("far", "1e30"), ("infinite", ".inf")):
        options = ["--method", "ClosestSafeUpdate", "--method.penalty", penalty, "--output", str(tmp_path / name)]
        assert main([*given, *options]) == 0
    far, infinite = (read_adapter(tmp_path / name).pairs for name in ("far", "infinite"))
    assert all(torch.equal(far[name].dense(), infinite[name].dense()) for name in far)
    assert "``.inf``" in ClosestSafeUpdate.__doc__


@pytest.mark.parametrize("method", [SstV, SstM])
def test_a_hard_mask_leaves_a_module_without_a_safety_update_as_it_is(updates, method):
    utility, safety = updates
    name = next(iter(utility))
    rest = {n: pair for n, pair in safety.items() if n != name}
    found = method(form="interpolating", top=0.2).patch(utility, rest, None).pairs
    assert not found[name].dense().any()
    other = next(iter(rest))
    assert found[other].dense().any()


def test_align_guard_says_where_its_core_space_misses_the_utility_update(updates, caplog):
    utility, safety = updates
    AlignGuardPosthoc(k=2).patch(utility, safety, weight_space_fishers(safety))
    assert "of the utility update's norm lies outside the core space" in caplog.text


@pytest.mark.parametrize("method", ["SafeLora", "ClosestSafeUpdate"])
def test_a_safety_adapter_that_is_not_read_is_told_and_not_recorded(method, adapters, tmp_path, capsys):
    start_logging()
    given = ["merge", "--method", method, "--method.aligned", str(adapters["safety"])]
    given += ["--utility", str(adapters["utility"]), "--output"]
    assert main([*given, str(tmp_path / "without")]) == 0
    assert "--safety is not used" not in capsys.readouterr().err
    assert main([*given, str(tmp_path / "with"), "--safety", str(adapters["safety"])]) == 0
    assert f"{method} with these options reads no safety adapter: --safety is not used" in capsys.readouterr().err
    one, two = (json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("without", "with"))
    assert one["safety"] == two["safety"]
