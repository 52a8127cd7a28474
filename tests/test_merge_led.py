"""LED-Merging from the command line, against a dense twin that sorts, and what it refuses."""

import shutil

import pytest
import torch

from src.adapters.peft_files import read_adapter
from src.cli import main
from src.errors import InputError
from src.fisher.files import load_fisher
from src.merge.base import FisherBesideBase
from src.merge.led import Led
from src.merge.settings import with_option
from src.merge.sst_diagonal import SstDiagonal
from tests.commands import measured_once
from tests.merging import matching_fishers, rewritten, updates
from tests.tiny import make_model

POINTS = {"experts": ("{safety: 1.0}", "utility"), "base": ("base", "base")}


@pytest.fixture(scope="module")
def measured(base, adapters, rows, tmp_path_factory):
    """Directories of mean magnitudes by reference point, each measured once; ``diagonal`` holds squares."""
    once = measured_once(tmp_path_factory.mktemp("magnitudes"), base, adapters, rows)

    def measure(at, *flags):
        safety, utility = POINTS.get(at, POINTS["experts"])
        points = [f"--model.reference_safety={safety}", f"--model.reference_utility={utility}"]
        form = ["--model.representation", "magnitude", "--model.coordinates", "weight", "--model.labels", "data"]
        return once(at, *form, *points, *flags)

    return measure


def run(adapters, fisher, output, *flags):
    given = ["--utility", str(adapters["utility"]), "--safety", str(adapters["safety"]), "--fisher", str(fisher)]
    return main(["merge", *given, "--method", "Led", "--rank", "16", "--output", str(output), *flags])


def top(scores, share):
    """The largest scores of a matrix, by sorting them."""
    kept = torch.zeros(scores.numel(), dtype=torch.bool)
    kept[scores.flatten().argsort(descending=True)[: int(share * scores.numel())]] = True
    return kept.view(scores.shape)


def twin(weight, deltas, at_base, at_expert, shares, weights):
    """The definition on whole matrices of one module."""
    elected = [
        top(weight.abs() * b, r) & top((weight + d).abs() * e, r)
        for d, b, e, r in zip(deltas, at_base, at_expert, shares, strict=True)
    ]
    only = [elected[0] & ~elected[1], elected[1] & ~elected[0]]
    return sum(w * mask * d for w, mask, d in zip(weights, only, deltas, strict=True)), only


def test_the_command_merges_what_each_expert_alone_needs(adapters, measured, tmp_path):
    flags = ["--method.base_fisher", str(measured("base")), "--method.share_safety", "0.3", "--alpha", "[0.5, 1.0]"]
    assert run(adapters, measured("experts"), tmp_path / "m", *flags, "--method.weight_safety", "0.7") == 0
    names = ("utility", "safety")
    files = {at: [load_fisher(measured(at) / f"{name}.safetensors").fisher for name in names] for at in POINTS}
    found = [read_adapter(tmp_path / "m" / f"alpha-{alpha}").pairs for alpha in ("0.5", "1")]
    pairs, model = [read_adapter(adapters[name]).pairs for name in names], make_model()
    for name, pair in pairs[0].items():
        weight, deltas = model.get_submodule(name).weight, [own[name].dense() for own in pairs]
        means = {at: [f.mean(name).view(pair.shape) for f in both] for at, both in files.items()}
        whole, only = twin(weight, deltas, means["base"], means["experts"], (0.4, 0.3), (0.9, 0.7))
        assert all(0 < mask.sum() < mask.numel() / 2 for mask in only)
        torch.testing.assert_close(found[1][name].dense(), whole, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(found[0][name].dense(), (deltas[0] + whole) / 2, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("block", [1 << 17, 40])
def test_the_patch_is_that_of_the_dense_twin_in_blocks_of_any_size(adapters, monkeypatch, block):
    monkeypatch.setattr("src.adapters.deltas.BLOCK_ELEMENTS", block)
    method, (utility, safety) = Led(share_safety=0.5, weight_utility=1.0, weight_safety=2.0), updates(adapters)
    lacking = next(iter(safety))
    fisher = matching_fishers(method, utility, safety)
    safety = {name: pair for name, pair in safety.items() if name != lacking}
    found = method.patch(utility, safety, fisher).pairs
    assert set(found) == set(utility)
    for name, pair in utility.items():
        deltas = [pair.dense(), safety[name].dense() if name in safety else torch.zeros(pair.shape).double()]
        means = [[f.mean(name).view(pair.shape) for f in (at.utility, at.safety)] for at in (fisher.base, fisher)]
        whole, _ = twin(fisher.weights[name].matrix, deltas, *means, (0.4, 0.5), (1.0, 2.0))
        torch.testing.assert_close(found[name].dense(), whole - deltas[0], rtol=1e-5, atol=1e-7)


def test_shares_at_their_ends(adapters):
    utility, safety = updates(adapters)
    fisher = matching_fishers(Led(), utility, safety)
    # Everything elected by both is nobody's own; a share of less than one weight elects nothing.
    both = Led(share_utility=1.0, share_safety=1.0).patch(utility, safety, fisher).pairs
    none = Led(share_utility=1.0, share_safety=1e-6, weight_utility=1.0).patch(utility, safety, fisher).pairs
    for name, pair in utility.items():
        torch.testing.assert_close(both[name].dense(), -pair.dense())
        assert none[name].dense().abs().max() == 0.0


def test_settings_and_missing_magnitudes_are_named(adapters):
    pair = updates(adapters)
    for make, message in (
        (lambda: Led(share_utility=0.0), "method.share_utility is 0.0"),
        (lambda: Led(share_safety=1.5), "method.share_safety is 1.5"),
        (lambda: Led(weight_safety=float("nan")), "method.weight_safety is nan"),
        (lambda: Led().patch(*pair, None), "pass --fisher and --method.base_fisher"),
    ):
        with pytest.raises(InputError, match=message):
            make()
    fisher, squares = matching_fishers(Led(), *pair), matching_fishers(SstDiagonal(), *pair)
    mixed = FisherBesideBase(fisher.safety, squares.utility, fisher.basis, base=fisher.base, weights=fisher.weights)
    with pytest.raises(InputError, match="needs mean magnitudes of gradients, not diagonal"):
        Led().patch(*pair, mixed)
    with pytest.raises(InputError, match="needs diagonal Fisher files"):
        SstDiagonal().patch(*pair, fisher)
    assert with_option(Led(), "share_utility", 0.5).share_utility == 0.5


REFUSED = [
    (("experts",), None, "pass --method.base_fisher"),
    (("experts",), ("experts",), "measured at {'safety': 1.0}; expected the base alone"),
    (("base",), ("base",), "measured at base; expected the safety expert alone"),
    (
        ("experts",),
        ("draws", "--model.labels", "model", "--model.reference_safety", "base"),
        "needs --model.labels data",
    ),
    (("diagonal", "--model.representation", "diagonal"), ("base",), "needs magnitude in weight coordinates"),
    (("experts",), ("diagonal", "--model.representation", "diagonal"), "needs magnitude in weight coordinates"),
]


@pytest.mark.parametrize(("fisher", "at_base", "message"), REFUSED)
def test_files_that_do_not_belong_are_refused(adapters, measured, tmp_path, capsys, fisher, at_base, message):
    flags = [] if at_base is None else ["--method.base_fisher", str(measured(*at_base))]
    assert run(adapters, measured(*fisher), tmp_path / "m", *flags) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


def test_rows_that_were_cut_or_weighed_otherwise_are_other_ones(adapters, measured, tmp_path, capsys):
    for name, flags in (("cut", ["--data.max_length", "24"]), ("weighed", ["--data.utility_weights", "[2.0, 1.0]"])):
        other = measured(
            f"base-{name}", "--model.reference_safety", "base", "--model.reference_utility", "base", *flags
        )
        assert run(adapters, measured("experts"), tmp_path / "m", "--method.base_fisher", str(other)) == 2
        assert "with other tokens or weights of them" in capsys.readouterr().err
        # Files of before that was recorded.
        old = shutil.copytree(other, tmp_path / name)
        for path in old.glob("*.safetensors"):
            rewritten(path, lambda record: record.pop("measured_sha256"))
        assert run(adapters, measured("experts"), tmp_path / f"m-{name}", "--method.base_fisher", str(old)) == 0


@pytest.mark.parametrize("at", ["base", "experts"])
@pytest.mark.parametrize("name", ["safety", "utility"])
@pytest.mark.parametrize(
    "key",
    ["pass", "base", "basis_sha256", "safety", "seen", "utility", "reference", "rows_sha256", "labels", "granularity"],
)
def test_a_record_that_lacks_a_key_is_one_line_with_file_and_key(adapters, measured, tmp_path, capsys, at, name, key):
    folders = {point: measured(point) for point in POINTS}
    folders[at] = shutil.copytree(folders[at], tmp_path / at)
    path = folders[at] / f"{name}.safetensors"
    rewritten(path, lambda record: record.pop(key))
    capsys.readouterr()
    assert run(adapters, folders["experts"], tmp_path / "m", "--method.base_fisher", str(folders["base"])) == 2
    assert f"{path}: its record has no '{key}'; expected a file written by" in capsys.readouterr().err


@pytest.mark.parametrize(("key", "part"), [("base", "fingerprint"), ("safety", "sha256"), ("utility", "weight")])
def test_a_part_of_a_record_that_lacks_a_key_is_named_too(adapters, measured, tmp_path, capsys, key, part):
    at_base = shutil.copytree(measured("base"), tmp_path / "base")
    path = at_base / "utility.safetensors"
    rewritten(path, lambda record: (record[key][0] if key == "utility" else record[key]).pop(part))
    assert run(adapters, measured("experts"), tmp_path / "m", "--method.base_fisher", str(at_base)) == 2
    assert f"{path}: its record has no '{part}' in '{key}'" in capsys.readouterr().err


def test_one_directory_a_base_with_the_modules_and_squares_elsewhere(adapters, measured, tmp_path, capsys):
    at_base = ["--method.base_fisher", str(measured("base"))]
    assert run(adapters, f"[{measured('experts')},{measured('experts')}]", tmp_path / "m", *at_base) == 2
    assert "2 directories; Led takes one" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert run(adapters, measured("experts"), tmp_path / "m", *at_base, "--base", str(tmp_path / "empty")) == 2
    assert "no model*.safetensors" in capsys.readouterr().err
    assert run(adapters, measured("experts"), tmp_path / "m", "--method", "SstDiagonal") == 2
    assert "SstDiagonal needs diagonal in weight coordinates" in capsys.readouterr().err
