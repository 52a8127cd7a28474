"""Output forms, sweeps, the dry run and combinations without a safety method, through the stage."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from src.adapters.base_weights import open_base
from src.adapters.deltas import DenseDelta
from src.adapters.pairs import LowRankPair, weighted_sum
from src.adapters.peft_files import read_adapter, write_adapter
from src.adapters.safetensors_stream import NAMES
from src.adapters.truncate import truncate
from src.cli import main
from src.errors import InputError
from src.merge.align_guard import AlignGuardPosthoc
from src.merge.combinations.dare import Dare
from src.merge.combinations.knots import Knots
from src.merge.combinations.magnitude_prune import MagnitudePrune
from src.merge.combinations.task_arithmetic import TaskArithmetic
from src.merge.combinations.ties import Ties
from src.merge.forms import Form
from src.merge.led import Led
from src.merge.sst import Sst
from src.merge.sst_diagonal import SstDiagonal
from src.merge.stage import merge
from src.models.base import BaseSpec, fingerprint, load_model
from tests.merging import anchored, weight_space_fishers, write_fishers
from tests.tiny import make_base, make_model, random_pairs

IDS = torch.arange(12)[None]


def both(adapters):
    return [str(adapters["utility"]), str(adapters["safety"])]


def decaying(rows, columns, seed=0):
    draw = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(rows, rows, generator=draw)).Q
    right = torch.linalg.qr(torch.randn(columns, rows, generator=draw)).Q
    return left @ torch.diag(1.0 / torch.arange(1, rows + 1)) @ right.T


@pytest.mark.parametrize("dense", [decaying(80, 120), decaying(80, 120).T, decaying(20, 30)])
def test_truncation_keeps_as_much_as_the_best_one(dense):
    values = torch.linalg.svdvals(dense.double())
    total = values.square().sum().item()
    for rank in (1, 4, 16):
        found = truncate(DenseDelta(dense.contiguous()), rank=rank, energy=None)
        best = values[:rank].square().sum().item()
        assert found.pair.rank == rank
        assert found.total == pytest.approx(total, rel=1e-6)
        assert found.kept <= best * (1 + 1e-6)
        assert found.kept >= best * (1 - 1e-3)
        error = (dense.double() - found.pair.dense()).square().sum().item()
        assert error == pytest.approx(total - found.kept, rel=1e-3, abs=1e-6 * total)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999, 1.0])
def test_the_smallest_rank_that_keeps_an_energy_is_taken(energy):
    dense = decaying(20, 30).double()
    shares = torch.linalg.svdvals(dense).square()
    shares = (shares / shares.sum()).cumsum(0)
    u, s, v = torch.linalg.svd(dense, full_matrices=False)
    for delta in (DenseDelta(dense), LowRankPair(v, u * s)):
        found = truncate(delta, rank=None, energy=energy)
        assert shares[found.pair.rank - 1] >= energy - 1e-9
        assert found.pair.rank == 1 or shares[found.pair.rank - 2] < energy


def test_low_rank_truncation_is_the_svd_of_the_product():
    draw = torch.Generator().manual_seed(0)
    pair = LowRankPair(torch.randn(6, 9, generator=draw), torch.randn(7, 6, generator=draw))
    found = truncate(pair, rank=3, energy=None)
    u, s, v = torch.linalg.svd(pair.dense())
    torch.testing.assert_close(found.pair.dense(), u[:, :3] @ torch.diag(s[:3]) @ v[:3])


def test_zero_updates_truncate_to_zero():
    for delta in (DenseDelta(torch.zeros(50, 60)), LowRankPair(torch.zeros(2, 5), torch.ones(4, 2))):
        assert truncate(delta, rank=4, energy=None).pair.dense().abs().max() == 0


def test_rank_limited_merges_are_pefts_svd(adapters, tmp_path):
    merge(utility=both(adapters), utility_weights=[1.0, 0.7], rank=2, warn_below=0.0, output=str(tmp_path / "m"))
    peft = PeftModel.from_pretrained(make_model(), str(adapters["utility"]), adapter_name="u")
    peft.load_adapter(str(adapters["safety"]), adapter_name="s")
    peft.add_weighted_adapter(["u", "s"], [1.0, 0.7], "both", combination_type="svd", svd_rank=2)
    for name, pair in read_adapter(tmp_path / "m").pairs.items():
        module = peft.get_submodule(f"base_model.model.{name}")
        torch.testing.assert_close(pair.dense().float(), module.get_delta_weight("both").float(), rtol=1e-4, atol=1e-6)
    report = json.loads((tmp_path / "m" / "manifest.json").read_text())["output"]
    assert 0.5 < report["kept_energy"] < 1
    assert set(report["kept_energy_by_module"]) == set(read_adapter(tmp_path / "m").pairs)


def test_full_rank_ties_is_pefts_ties_svd(adapters, tmp_path):
    merge(utility=both(adapters), combine=Ties(0.4), rank=8, warn_below=0.0, output=str(tmp_path / "m"))
    peft = PeftModel.from_pretrained(make_model(), str(adapters["utility"]), adapter_name="u")
    peft.load_adapter(str(adapters["safety"]), adapter_name="s")
    peft.add_weighted_adapter(["u", "s"], [1.0, 1.0], "both", combination_type="ties_svd", svd_rank=8, density=0.4)
    for name, pair in read_adapter(tmp_path / "m").pairs.items():
        module = peft.get_submodule(f"base_model.model.{name}")
        torch.testing.assert_close(pair.dense().float(), module.get_delta_weight("both").float(), rtol=1e-4, atol=1e-5)


def test_full_rank_magnitude_pruning_is_pefts_magnitude_prune_svd(adapters, tmp_path):
    given = {"combine": MagnitudePrune(0.4), "utility_weights": [1.0, -0.7]}
    merge(utility=both(adapters), **given, rank=8, warn_below=0.0, output=str(tmp_path / "m"))
    found = weighted_adapter(adapters, [1.0, -0.7], combination_type="magnitude_prune_svd", svd_rank=8, density=0.4)
    equal(read_adapter(tmp_path / "m").pairs, found)


@pytest.mark.parametrize("kind", ["dare_linear_svd", "dare_ties_svd"])
def test_full_rank_dare_is_pefts_under_our_masks(adapters, tmp_path, monkeypatch, kind):
    """PEFT draws its masks from torch's generator; here it gets those of (seed, adapter, module)."""
    from peft.utils import merge_utils

    from src.merge.randomness import bernoulli

    known = [
        (adapter.identity, name, pair.dense().float())
        for adapter in map(read_adapter, both(adapters))
        for name, pair in adapter.pairs.items()
    ]

    def masked(tensor, density, rescale):
        assert rescale
        for key, name, dense in known:
            if dense.shape == tensor.shape and torch.allclose(dense, tensor.float(), rtol=1e-4, atol=1e-6):
                return tensor * bernoulli(density, 5, key, name, slice(0, dense.shape[0]), dense.shape[1]) / density
        raise AssertionError("PEFT pruned something that is no adapter's update")

    monkeypatch.setattr(merge_utils, "random_pruning", masked)
    ties = {"election": "peft", "normalise": True} if kind == "dare_ties_svd" else {}
    given = {"combine": Dare(0.6, seed=5, **ties), "utility_weights": [1.0, 1.0]}
    merge(utility=both(adapters), **given, rank=8, warn_below=0.0, output=str(tmp_path / "m"))
    found = weighted_adapter(adapters, [1.0, 1.0], combination_type=kind, svd_rank=8, density=0.6)
    equal(read_adapter(tmp_path / "m").pairs, found)


def weighted_adapter(adapters, weights, **options):
    """PEFT's combination of both adapters: update per module."""
    peft = PeftModel.from_pretrained(make_model(), str(adapters["utility"]), adapter_name="u")
    peft.load_adapter(str(adapters["safety"]), adapter_name="s")
    peft.add_weighted_adapter(["u", "s"], weights, "both", **options)
    names = read_adapter(adapters["utility"]).pairs
    return {n: peft.get_submodule(f"base_model.model.{n}").get_delta_weight("both").float() for n in names}


def equal(pairs, theirs):
    assert set(pairs) == set(theirs)
    for name, pair in pairs.items():
        torch.testing.assert_close(pair.dense().float(), theirs[name], rtol=1e-4, atol=1e-5)


def test_what_is_merged_can_be_merged_by_peft_with_adapters_of_other_ranks(adapters, tmp_path):
    """Ranks that differ between modules of the written adapter and from those of the other."""
    merge(utility=both(adapters), energy=0.9, warn_below=0.0, output=str(tmp_path / "m"))
    written = read_adapter(tmp_path / "m").pairs
    assert len({pair.rank for pair in written.values()}) > 1
    found = weighted_adapter(adapters | {"utility": tmp_path / "m"}, [0.5, -1.5], combination_type="svd", svd_rank=8)
    equal(weighted_sum([written, read_adapter(adapters["safety"]).pairs], [0.5, -1.5]), found)


def test_a_kept_energy_under_the_threshold_warns(adapters, tmp_path, caplog, monkeypatch):
    import logging

    monkeypatch.setattr(logging.getLogger("src"), "propagate", True)
    merge(utility=both(adapters), combine=Ties(), rank=1, warn_below=0.9, output=str(tmp_path / "m"))
    assert "of the merged update's energy is kept" in caplog.text


def test_kept_energy_is_a_share_of_all_modules_together_and_of_each():
    updates = {"a": DenseDelta(torch.diag(torch.tensor([3.0, 1.0]))), "b": DenseDelta(torch.eye(2))}
    _, report = Form(rank=1, warn_below=0.0).adapter(updates, 1)
    assert report["kept_energy"] == pytest.approx(10 / 12)
    assert report["kept_energy_by_module"] == pytest.approx({"a": 0.9, "b": 0.5})


def test_a_full_rank_merge_cannot_be_an_exact_adapter(adapters, tmp_path):
    with pytest.raises(InputError, match="full-rank updates, which no adapter holds exactly"):
        merge(utility=both(adapters), combine=Ties(), output=str(tmp_path / "m"))
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 2, "energy": 0.5}, "exclude each other"),
        ({"rank": 0}, "rank is 0"),
        ({"energy": 1.5}, "energy is 1.5"),
        ({"warn_below": float("nan")}, "warn_below is nan; expected a number from 0 to 1"),
        ({"warn_below": 95.0}, "warn_below is 95.0; expected a number from 0 to 1"),
        ({"full_model": True, "shard_size": float("nan")}, "shard_size is nan; expected a finite number of GB"),
        ({"full_model": True, "shard_size": float("inf")}, "shard_size is inf; expected"),
        ({"full_model": True, "shard_size": 0.0}, "shard_size is 0.0; expected"),
        ({"alpha": 2.0}, "need a method"),
        ({"method": TaskArithmetic()}, "needs the safety adapter"),
        ({"sweep": {"t": [1.0]}}, "no method is given"),
        ({"sweep": {"combine.t": [1.0]}}, "has no such option"),
        ({"sweep": {"combine.density": []}}, "expected different values"),
        ({"full_model": True, "base": "no/where/at/all"}, "no such directory"),
        ({"method": Sst(), "safety": "x", "combine": Ties()}, "x: no such directory"),
    ],
)
def test_stages_and_forms_are_checked(adapters, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        merge(**{"utility": both(adapters), "output": str(tmp_path / "m")} | options)
    assert not (tmp_path / "m").exists()


def saved_in_shards(base, folder):
    """The base in several files with an index; returns the files."""
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(folder, max_shard_size="8KB")
    return sorted(folder.glob("model-*.safetensors"))


def test_files_that_the_model_does_not_consist_of_are_left_alone(base, adapters, tmp_path):
    flags = ["merge", "--utility", str(adapters["utility"]), "--full_model", "--overwrite"]
    assert main([*flags, "--base", str(base), "--output", str(tmp_path / "m")]) == 0
    expected = load_file(tmp_path / "m" / "model.safetensors")
    parts = saved_in_shards(base, tmp_path / "other")
    assert len(parts) > 2
    for name in ("model_old.safetensors", "model.fp16.safetensors"):
        save_file({key: weight * 0 for key, weight in expected.items()}, tmp_path / "other" / name)
    flags += ["--aliases", json.dumps([str(base)])]
    assert main([*flags, "--base", str(tmp_path / "other"), "--output", str(tmp_path / "m")]) == 0
    found = load_file(tmp_path / "m" / "model.safetensors")
    assert all(torch.equal(found[key], weight) for key, weight in expected.items())
    # A whole set of shards does without an index.
    (tmp_path / "other" / "model.safetensors.index.json").unlink()
    assert main([*flags, "--base", str(tmp_path / "other"), "--output", str(tmp_path / "m")]) == 0
    assert load_file(tmp_path / "m" / "model.safetensors").keys() == expected.keys()


def test_one_file_stands_before_an_index_as_in_transformers(base, tmp_path):
    saved_in_shards(base, tmp_path / "other")
    whole = {key: weight * 2 for key, weight in load_file(base / "model.safetensors").items()}
    save_file(whole, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "other").model.norm.weight
    with open_base(str(tmp_path / "other")) as weights:
        assert torch.equal(weights.get("model.norm.weight"), expected)


@pytest.mark.parametrize("indexed", [True, False])
def test_a_missing_part_of_the_base_is_named(base, adapters, tmp_path, capfd, indexed):
    lost = saved_in_shards(base, tmp_path / "other")[1]
    lost.unlink()
    if not indexed:
        (tmp_path / "other" / "model.safetensors.index.json").unlink()
    flags = ["merge", "--utility", str(adapters["utility"]), "--full_model", "--base", str(tmp_path / "other")]
    assert main([*flags, "--output", str(tmp_path / "m")]) == 2
    assert f"{lost}: no such file" in capfd.readouterr().err
    assert not (tmp_path / "m").exists()


def test_an_index_that_names_what_a_file_has_not_is_refused(base, tmp_path):
    parts = saved_in_shards(base, tmp_path / "other")
    index = json.loads((tmp_path / "other" / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.extra.weight"] = parts[0].name
    (tmp_path / "other" / "model.safetensors.index.json").write_text(json.dumps(index))
    refused = pytest.raises(InputError, match=r"has no model\.extra\.weight, which .*index.json says")
    with refused, open_base(str(tmp_path / "other")):
        pass
    (tmp_path / "other" / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(InputError, match="no weight_map"), open_base(str(tmp_path / "other")):
        pass


@pytest.mark.parametrize("held", ["utility", "base", "aligned", "implied"])
def test_an_output_never_replaces_what_is_read(base, adapters, tmp_path, capfd, held):
    shutil.copytree(adapters["utility"], tmp_path / "here" / "a")
    shutil.copytree(base, tmp_path / "here" / "base")
    utility = tmp_path / "here" / "a" if held in ("utility", "implied") else adapters["utility"]
    flags = ["merge", "--utility", str(utility), "--overwrite"]
    flags += ["--safety", str(utility if held == "implied" else adapters["safety"])]
    flags += {
        "utility": ["--method", "SafeMerge"],
        "base": ["--method", "SafeMerge", "--full_model", "--base", str(tmp_path / "here" / "base")],
        "aligned": ["--method", "SafeMerge", "--method.aligned", str(tmp_path / "here" / "a")],
        "implied": ["--method", "SafeMerge"],
    }[held]
    if held == "implied":
        path = tmp_path / "here" / "a" / "adapter_config.json"
        named = json.loads(path.read_text()) | {"base_model_name_or_path": str(tmp_path / "here" / "base")}
        path.write_text(json.dumps(named))
    for output in (tmp_path / "here", tmp_path / "here" / ("base" if held in ("base", "implied") else "a")):
        assert main([*flags, "--output", str(output)]) == 2
        assert "which is read, lies there" in capfd.readouterr().err
    assert (tmp_path / "here" / "a" / "adapter_config.json").exists()
    assert (tmp_path / "here" / "base" / "model.safetensors").exists()


def test_the_record_names_the_weights_that_were_read(base, adapters, tmp_path, capfd):
    shutil.copytree(base, tmp_path / "elsewhere")
    flags = ["merge", "--utility", str(adapters["utility"]), "--full_model", "--output", str(tmp_path / "m")]
    assert main([*flags, "--base", str(tmp_path / "elsewhere")]) == 2
    told = f"trained on the base '{base}'; --base is '{tmp_path / 'elsewhere'}'; if these are one model, change"
    assert told in capfd.readouterr().err
    assert main([*flags, "--base", str(tmp_path / "elsewhere"), "--aliases", json.dumps([str(base)])]) == 0
    record = json.loads((tmp_path / "m" / "manifest.json").read_text())["base_weights"]
    assert record["path"] == str(tmp_path / "elsewhere")
    assert record["fingerprint"] == fingerprint(load_model(BaseSpec(str(base), dtype="float32")))


def test_an_adapter_that_was_trained_on_the_base_in_float16_is_of_that_base(base, adapters, tmp_path, capfd):
    known = fingerprint(load_model(BaseSpec(str(base), dtype="float16")))
    assert known != fingerprint(load_model(BaseSpec(str(base), dtype="float32")))
    pairs = read_adapter(adapters["utility"]).pairs
    manifest = {"base": {"name": str(base), "fingerprint": known}}
    write_adapter(tmp_path / "a", pairs, base=str(base), manifest=manifest, seen=frozenset(), card="c")
    assert main(["merge", "--utility", str(tmp_path / "a"), "--full_model", "--output", str(tmp_path / "m")]) == 0
    assert "other weights" not in capfd.readouterr().err


def test_a_full_model_of_other_weights_than_the_adapters_base_is_warned_of(base, adapters, tmp_path, capfd):
    known = fingerprint(load_model(BaseSpec(str(base), dtype="float32")))
    pairs = read_adapter(adapters["utility"]).pairs
    manifest = {"base": {"name": str(base), "fingerprint": known}}
    write_adapter(tmp_path / "a", pairs, base=str(base), manifest=manifest, seen=frozenset(), card="c")
    flags = ["merge", "--utility", str(tmp_path / "a"), "--full_model", "--overwrite", "--output", str(tmp_path / "m")]
    assert main(flags) == 0
    assert "other weights" not in capfd.readouterr().err
    shutil.copytree(base, tmp_path / "other")
    weights = {key: weight * 1.1 for key, weight in load_file(base / "model.safetensors").items()}
    save_file(weights, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    assert main([*flags, "--base", str(tmp_path / "other")]) == 0
    assert "other weights than those that" in capfd.readouterr().err


@pytest.mark.parametrize("shard_size", [5.0, 8e-6])
def test_a_full_model_is_the_base_plus_the_update(adapters, tmp_path, shard_size):
    merge(utility=both(adapters), full_model=True, shard_size=shard_size, output=str(tmp_path / "m"))
    files = sorted(p.name for p in (tmp_path / "m").glob("*.safetensors"))
    assert (len(files) > 1) == (shard_size < 1)
    held = [list(load_file(tmp_path / "m" / name).values()) for name in files]
    assert len(files) < sum(map(len, held))
    assert all(sum(weight.nbytes for weight in each) <= shard_size * 1e9 for each in held if len(each) > 1)
    expected = make_model()
    total = weighted_sum([read_adapter(p).pairs for p in both(adapters)], [1.0, 1.0])
    for name, pair in total.items():
        expected.get_submodule(name).weight += pair.dense()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float64)
    torch.testing.assert_close(loaded(IDS).logits, expected(IDS).logits, rtol=1e-6, atol=1e-6)
    assert json.loads((tmp_path / "m" / "manifest.json").read_text())["output"]["form"] == "full model"


def test_a_full_model_of_a_full_rank_merge_equals_its_truncation_at_full_rank(adapters, tmp_path):
    options = {"utility": both(adapters), "combine": Dare(0.6, seed=5)}
    merge(**options, full_model=True, output=str(tmp_path / "m"))
    merge(**options, rank=16, output=str(tmp_path / "a"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float64)
    peft = PeftModel.from_pretrained(make_model(), str(tmp_path / "a")).double()
    torch.testing.assert_close(loaded(IDS).logits, peft(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["Dare", "Della"])
def test_masks_are_those_of_the_adapter_whatever_its_role(adapters, tmp_path, name):
    """The safety adapter as one more expert of ``combine``, and as what ``method`` merges: one and the same merge."""
    from src.merge.combinations.della import Della

    chosen = {"Dare": Dare(0.6, seed=5), "Della": Della(0.6, 0.2, seed=5)}[name]
    one, two = both(adapters)
    merge(utility=[one, two], combine=chosen, rank=16, output=str(tmp_path / "combine"))
    for utility, safety in ((one, two), (two, one)):
        merge(utility=utility, safety=safety, method=chosen, rank=16, output=str(tmp_path / f"m{Path(safety).name}"))
    folders = list(tmp_path.glob("m*"))
    assert len(folders) == 2
    for folder in folders:
        found = read_adapter(folder).pairs
        for module, pair in read_adapter(tmp_path / "combine").pairs.items():
            torch.testing.assert_close(found[module].dense(), pair.dense(), rtol=1e-4, atol=1e-6)


def test_a_bfloat16_base_is_rounded_once_and_keeps_its_format(tmp_path):
    model = make_model(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    pairs = random_pairs(model, 2, 1)
    write_adapter(tmp_path / "a", pairs, base=str(tmp_path / "base"), manifest={}, seen=frozenset(), card="c")
    merge(utility=str(tmp_path / "a"), full_model=True, output=str(tmp_path / "m"))
    before, after = (load_file(tmp_path / n / "model.safetensors") for n in ("base", "m"))
    for name, pair in pairs.items():
        expected = (before[f"{name}.weight"].float() + pair.dense().float()).to(torch.bfloat16)
        assert torch.equal(after[f"{name}.weight"], expected)
    assert set(before) == set(after)


@pytest.mark.parametrize(
    "options", [{}, {"rank": 1}, {"combine": Ties(), "rank": 1}, {"combine": Knots()}, {"full_model": True}]
)
def test_weights_that_are_not_finite_are_not_written(adapters, tmp_path, options):
    given = {"utility": both(adapters), "utility_weights": [1e300, 1.0], "output": str(tmp_path / "m")}
    with pytest.raises(InputError, match=r"model\.layers\..*: holds NaN or infinite values after the merge"):
        merge(**given, **options)
    assert list(tmp_path.iterdir()) == []


def test_tensors_of_every_number_format_are_copied_into_a_full_model(adapters, base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "base")
    formats = (torch.uint16, torch.uint32, torch.uint64, torch.complex64, torch.float8_e5m2fnuz, torch.bool)
    more = {f"extra.{i}": torch.arange(3).to(dtype) for i, dtype in enumerate(formats)}
    save_file(load_file(folder / "model.safetensors") | more, folder / "model.safetensors", metadata={"format": "pt"})
    given = {"utility": both(adapters), "full_model": True, "aliases": [str(base)]}
    merge(**given, base=str(folder), output=str(tmp_path / "m"))
    written = load_file(tmp_path / "m" / "model.safetensors")
    for key, values in more.items():
        assert written[key].dtype == values.dtype
        assert written[key].tolist() == values.tolist()


def test_a_number_format_that_cannot_be_written_is_named(adapters, base, tmp_path, monkeypatch):
    monkeypatch.delitem(NAMES, torch.float64)
    with pytest.raises(InputError, match=r"model.embed_tokens.weight is stored as torch.float64; a number format"):
        merge(utility=both(adapters), full_model=True, output=str(tmp_path / "m"))


@pytest.mark.parametrize("module", ["lm_head", "model.embed_tokens"])
def test_an_update_of_one_of_two_tied_weights_unties_them(base, tmp_path, module):
    pair = LowRankPair(torch.randn(2, 16), torch.randn(258, 2) * 0.1)
    from src.adapters.base_weights import open_base
    from src.adapters.full_model import write_model

    with open_base(str(base)) as weights:
        write_model(tmp_path / "m", weights, {module: pair}, transposed=False, shard_bytes=10**9)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float64)
    original = make_model()
    changed = loaded.get_submodule(module).weight - original.get_submodule(module).weight
    torch.testing.assert_close(changed, pair.dense(), rtol=1e-6, atol=1e-6)
    other = "lm_head" if module != "lm_head" else "model.embed_tokens"
    assert torch.equal(loaded.get_submodule(other).weight, original.get_submodule(other).weight)


def test_modules_that_the_base_lacks_are_named(tmp_path, base):
    from src.adapters.base_weights import open_base
    from src.adapters.full_model import write_model

    pair = LowRankPair(torch.ones(1, 3), torch.ones(3, 1))
    with open_base(str(base)) as weights:
        for name, message in (("model.layers.7.x", "no weight of the module"), ("model.norm", "has the shape")):
            with pytest.raises(InputError, match=message):
                write_model(tmp_path / "m", weights, {name: pair}, transposed=False, shard_bytes=10**9)


def test_a_sweep_equals_single_merges(adapters, base, tmp_path):
    fisher = str(write_fishers(tmp_path / "fisher", adapters, base))
    given = {"utility": str(adapters["utility"]), "safety": str(adapters["safety"]), "fisher": fisher}
    merge(**given, method=Sst(), sweep={"t": [1.0, 3.0]}, alpha=[0.5, 1.0], output=str(tmp_path / "s"))
    merge(**given, method=Sst(t=3.0), alpha=0.5, output=str(tmp_path / "m"))
    folders = sorted(str(p.parent.relative_to(tmp_path / "s")) for p in (tmp_path / "s").rglob("adapter_config.json"))
    assert folders == ["t-1/alpha-0.5", "t-1/alpha-1", "t-3/alpha-0.5", "t-3/alpha-1"]
    swept = read_adapter(tmp_path / "s" / "t-3" / "alpha-0.5")
    assert swept.sha256 == read_adapter(tmp_path / "m").sha256
    assert swept.manifest["method"] == "SST soft, t = 3"


def test_a_name_is_what_results_are_listed_under(adapters, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("src"), "propagate", True)
    caplog.set_level(logging.INFO, "src")
    given = {"utility": str(adapters["utility"]), "safety": str(adapters["safety"])}
    merge(**given, method=Knots(Ties()), sweep={"inner.density": [0.2, 0.5]}, name="mine", output=str(tmp_path / "s"))
    assert "mine: 2 merged adapter(s)" in caplog.text
    merge(**given, method=Knots(Ties(density=0.5)), output=str(tmp_path / "m"))
    named, plain = read_adapter(tmp_path / "s" / "inner.density-0.5"), read_adapter(tmp_path / "m")
    assert (named.manifest["method"], plain.manifest["method"]) == ("mine, inner.density = 0.5", "Knots")
    assert named.sha256 == plain.sha256
    assert "mine, inner.density = 0.5" in (tmp_path / "s" / "inner.density-0.5" / "README.md").read_text()
    with pytest.raises(InputError, match="name is empty"):
        merge(**given, method=Knots(), name=" ", output=str(tmp_path / "n"))
    assert not (tmp_path / "n").exists()


def test_options_of_the_combination_can_be_swept(adapters, tmp_path):
    options = {"utility": both(adapters), "rank": 16}
    merge(**options, combine=Ties(), sweep={"combine.density": [0.3, 0.6]}, output=str(tmp_path / "s"))
    merge(**options, combine=Ties(0.6), output=str(tmp_path / "m"))
    assert read_adapter(tmp_path / "s" / "combine.density-0.6").sha256 == read_adapter(tmp_path / "m").sha256


def test_a_dry_run_writes_nothing(adapters, tmp_path, capsys):
    merge(utility=both(adapters), dry_run=True, output=str(tmp_path / "m"))
    text = capsys.readouterr().out
    assert "nothing was written" in text
    assert "16 x 16" in text
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_says_what_the_real_one_would_do(base, adapters, tmp_path, capsys):
    experts = {"utility": str(adapters["utility"]), "safety": str(adapters["safety"]), "output": str(tmp_path / "m")}
    for refused in ({"method": Ties()}, {"combine": Ties(), "method": TaskArithmetic()}):
        with pytest.raises(InputError, match="full-rank updates, which no adapter holds exactly"):
            merge(**experts, **refused, dry_run=True)
    size = (base / "model.safetensors").stat().st_size
    merge(**experts, method=TaskArithmetic(), full_model=True, dry_run=True)
    assert f"about {size / 1000:.0f} kB each" in capsys.readouterr().out
    fisher = write_fishers(tmp_path / "fisher", adapters, base)
    merge(**experts, method=Sst(), fisher=str(fisher), dry_run=True)
    text = capsys.readouterr().out
    assert "  5" in text
    assert "of Fisher files" in text
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("options", [{"full_model": True}, {}])
def test_a_dry_run_without_updates_ends_as_the_real_one(adapters, tmp_path, options):
    given = {"utility": str(adapters["utility"]), "utility_weights": [0.0], "output": str(tmp_path / "m"), **options}
    for dry_run in (True, False):
        if options:
            merge(**given, dry_run=dry_run)
        else:
            with pytest.raises(InputError, match="nothing to write: every weight is 0"):
                merge(**given, dry_run=dry_run)


@pytest.mark.parametrize("method", [SstDiagonal(), Led()])
def test_a_dry_run_of_a_full_rank_fisher_method_ends_as_the_real_one(base, adapters, tmp_path, method):
    fisher = write_fishers(tmp_path / "fisher", adapters, base, method=method)
    given = {"utility": str(adapters["utility"]), "safety": str(adapters["safety"]), "output": str(tmp_path / "m")}
    for dry_run in (True, False):
        with pytest.raises(InputError, match="gives full-rank updates, which no adapter holds exactly"):
            merge(**given, method=anchored(method, fisher), fisher=str(fisher), dry_run=dry_run)


@pytest.mark.parametrize("method", [Sst(), Sst(form="interpolating"), AlignGuardPosthoc(k=2)])
def test_a_dry_run_gives_the_ranks_of_the_patch(method):
    model = make_model()
    utility, safety = random_pairs(model, 3, 1), random_pairs(model, 2, 2)
    fisher = weight_space_fishers(weighted_sum([safety, utility], [1.0, 1.0]), n_s=20, n_u=20)
    found, expected = (part(utility, safety, fisher) for part in (method.outline, lambda *a: method.patch(*a).pairs))
    assert {name: (p.shape, p.rank) for name, p in found.items()} == {n: (p.shape, p.rank) for n, p in expected.items()}


def test_a_combination_alone_needs_no_safety_adapter(adapters, tmp_path):
    merge(utility=both(adapters), utility_weights=[1.0, 0.5], license="mit", output=str(tmp_path / "m"))
    merged = read_adapter(tmp_path / "m")
    assert merged.manifest["method"] == "TaskArithmetic"
    assert merged.manifest["alpha"] is None
    assert merged.manifest["safety"] is None
    card = (tmp_path / "m" / "README.md").read_text()
    assert "combined by **TaskArithmetic**" in card
    assert "license: mit" in card


def test_a_safety_method_works_on_any_combination(adapters, tmp_path):
    third = shutil.copytree(adapters["safety"], tmp_path / "third")
    given = {"utility": [str(adapters["utility"]), str(third)], "safety": str(adapters["safety"])}
    merge(**given, combine=Ties(0.5), method=TaskArithmetic(), alpha=0.5, rank=16, output=str(tmp_path / "m"))
    merge(utility=given["utility"], combine=Ties(0.5), rank=16, output=str(tmp_path / "u"))
    whole, part = (read_adapter(tmp_path / n).pairs for n in ("m", "u"))
    for name, pair in read_adapter(adapters["safety"]).pairs.items():
        torch.testing.assert_close(whole[name].dense() - part[name].dense(), 0.5 * pair.dense(), rtol=1e-3, atol=1e-6)


def test_a_combination_as_method_treats_safety_as_one_more_expert(adapters, tmp_path):
    given = {"utility": str(adapters["utility"]), "safety": str(adapters["safety"])}
    merge(**given, method=Ties(0.5), rank=16, output=str(tmp_path / "m"))
    merge(utility=both(adapters), combine=Ties(0.5), rank=16, output=str(tmp_path / "c"))
    one, two = (read_adapter(tmp_path / n).pairs for n in ("m", "c"))
    for name in two:
        torch.testing.assert_close(one[name].dense(), two[name].dense(), rtol=1e-3, atol=1e-6)


def test_a_base_without_weights_is_named(adapters, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no model\*.safetensors"):
        merge(utility=both(adapters), full_model=True, base=str(tmp_path / "empty"), output=str(tmp_path / "m"))
    other = make_base(tmp_path / "base")
    (other / "model.safetensors").write_bytes(b"short")
    with pytest.raises(InputError, match="not a readable safetensors"):
        merge(utility=both(adapters), full_model=True, base=str(other), output=str(tmp_path / "m"))


def test_a_gguf_base_is_read_from_its_dequantised_weights(adapters, base, tmp_path, monkeypatch):
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    asked = []

    def dequantised(path):
        asked.append(path.name)
        return base

    monkeypatch.setattr("src.models.base._dequantised", dequantised)
    given = {"utility": both(adapters), "full_model": True}
    merge(**given, base=str(tmp_path / "tiny.gguf"), aliases=[str(base)], output=str(tmp_path / "m"))
    merge(**given, output=str(tmp_path / "n"))
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("m", "n"))
    assert set(asked) == {"tiny.gguf"}
    assert all(torch.equal(one[key], two[key]) for key in two)
    with pytest.raises(InputError, match=r"none.gguf: no such file"):
        merge(**given, base=str(tmp_path / "none.gguf"), output=str(tmp_path / "o"))


def own_memory():
    """Bytes of this process that are no mapped files."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_a_full_model_is_written_in_the_memory_of_its_largest_weight(tmp_path):
    from src.adapters.base_weights import open_base
    from src.adapters.deltas import LazyDelta
    from src.adapters.full_model import write_model

    side, count = 1024, 16
    size, seen = side * side * 4, []
    (tmp_path / "base").mkdir()
    names = [f"model.layers.{i}.x" for i in range(count)]
    save_file({f"{n}.weight": torch.zeros(side, side) for n in names}, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text("{}")

    def evaluate(rows):
        seen.append(own_memory())
        return torch.ones(side, side)[rows]

    deltas = {name: LazyDelta((side, side), evaluate) for name in names}
    before = own_memory()
    with open_base(str(tmp_path / "base")) as weights:
        write_model(tmp_path / "m", weights, deltas, transposed=False, shard_bytes=3 * size)
    assert len(list((tmp_path / "m").glob("*.safetensors"))) == 6
    assert max(seen) - before < 6 * size < count * size


def test_every_stage_can_be_named_on_the_command_line(adapters, tmp_path, capsys):
    from src.cli import main

    given = ["merge", "--utility", json.dumps(both(adapters)), "--safety", str(adapters["safety"]), "--rank", "16"]
    stages = ["--combine", "CoreSpace", "--combine.inner", "Dare", "--combine.inner.density", "0.5"]
    method = ["--method", "Ties", "--method.density", "0.3", "--sweep.density", "[0.3,0.6]", "--alpha", "[0.5,1]"]
    assert main([*given, *stages, *method, "--output", str(tmp_path / "m")]) == 0
    folders = sorted(str(p.parent.relative_to(tmp_path / "m")) for p in (tmp_path / "m").rglob("adapter_config.json"))
    assert folders == [f"density-{d}/alpha-{a}" for d in ("0.3", "0.6") for a in ("0.5", "1")]
    manifest = read_adapter(tmp_path / "m" / folders[-1]).manifest
    assert manifest["settings"]["density"] == 0.6
    assert manifest["combine"]["settings"]["inner"]["settings"]["density"] == 0.5
    capsys.readouterr()
    wrong = [*given, "--combine", "CoreSpace", "--combine.inner", "Dare", "--combine.inner.density", "2"]
    assert main([*wrong, "--method", "Ties", "--output", str(tmp_path / "n")]) == 2
    assert capsys.readouterr().err.startswith("error: Dare density is 2.0; expected")


def test_a_merged_adapter_is_one_of_several_in_peft(adapters, tmp_path):
    merge(utility=both(adapters), output=str(tmp_path / "m"))
    peft = PeftModel.from_pretrained(make_model(), str(tmp_path / "m"), adapter_name="merged")
    peft.load_adapter(str(adapters["safety"]), adapter_name="s")
    peft.add_weighted_adapter(["merged", "s"], [1.0, -1.0], "back", combination_type="cat")
    for name, pair in read_adapter(adapters["utility"]).pairs.items():
        found = peft.get_submodule(f"base_model.model.{name}").get_delta_weight("back")
        torch.testing.assert_close(found.float(), pair.dense().float(), rtol=1e-4, atol=1e-6)
