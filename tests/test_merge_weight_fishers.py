"""Methods that work on Fisher files in weight coordinates, through the command line and against dense twins."""

import json
import shutil

import pytest
import torch

from src.adapters.deltas import DenseDelta, matrix
from src.adapters.pairs import LowRankPair
from src.adapters.peft_files import read_adapter
from src.cli import main
from src.errors import InputError
from src.fisher.diagonal import DiagonalFisher
from src.fisher.files import load_fisher
from src.merge.combination import Expert, KeyedDeltas
from src.merge.combinations.fisher_average import FisherAverage, kronecker_average
from src.merge.combinations.regmean import RegMean, regmean
from src.merge.led import Led
from src.merge.sst_diagonal import SstDiagonal
from tests.commands import fisher_flags
from tests.merging import matching_fishers, regauged, rewritten, updates, weight_fisher

FORMS = {kind: ["--model.coordinates", "weight", "--model.representation", kind] for kind in ("diagonal", "kronecker")}


@pytest.fixture(scope="module")
def statistics(base, adapters, rows, tmp_path_factory):
    """Two directories per representation: what each of the two adapters has measured alone."""
    root = tmp_path_factory.mktemp("statistics")
    found = {}
    for kind, flags in FORMS.items():
        for name in ("utility", "safety"):
            folder = root / f"{kind}-{name}"
            alone = ["--model.utility", str(adapters[name]), "--model.basis", "union"]
            data = ["--data.utility", str(rows["benign" if name == "utility" else "harmful"])]
            assert main(fisher_flags(base, adapters, rows, folder, *flags, *alone, *data)) == 0
            found.setdefault(kind, []).append(folder)
    return found


def combine(adapters, folders, output, *flags):
    experts = json.dumps([str(adapters["utility"]), str(adapters["safety"])])
    fishers = json.dumps([str(folder) for folder in folders])
    given = ["--utility", experts, "--fisher", fishers, "--utility_weights", "[1.0,0.5]", "--output", str(output)]
    config = output.with_suffix(".yaml")
    config.write_text("{}\n")
    return main(["merge", "--config", str(config), *given, *flags])


def files(folders, kind="utility"):
    return [load_fisher(folder / f"{kind}.safetensors").fisher for folder in folders]


def test_the_published_diagonal_method_runs_on_files(base, adapters, rows, tmp_path):
    folder = tmp_path / "f"
    assert main(fisher_flags(base, adapters, rows, folder, *FORMS["diagonal"])) == 0
    given = ["--utility", str(adapters["utility"]), "--safety", str(adapters["safety"]), "--fisher", str(folder)]
    method = ["--method", "SstDiagonal", "--method.top", "0.3", "--method.rho", "0.01", "--rank", "16"]
    assert main(["merge", *given, *method, "--alpha", "0.5", "--output", str(tmp_path / "m")]) == 0
    utility, safety = updates(adapters)
    f_s, f_u = (load_fisher(folder / f"{name}.safetensors").fisher for name in ("safety", "utility"))
    epsilon = 0.01 * f_u.diagonal().mean()
    for name, pair in read_adapter(tmp_path / "m").pairs.items():
        ratio = f_s.module_diagonal(name) / (f_u.module_diagonal(name) + epsilon)
        kept = ratio >= ratio.sort(descending=True).values[int(0.3 * len(ratio)) - 1]
        patch = safety[name].dense() * kept.view(pair.shape)
        torch.testing.assert_close(pair.dense(), utility[name].dense() + 0.5 * patch, rtol=1e-3, atol=1e-5)


def test_settings_and_missing_modules_of_the_diagonal_method_are_named(adapters):
    with pytest.raises(InputError, match=r"method.rho is 0.0"):
        SstDiagonal(rho=0.0)
    with pytest.raises(InputError, match="pass --fisher"):
        SstDiagonal().patch({}, {}, None)


@pytest.mark.parametrize("floored", ["first", "normalised"])
@pytest.mark.parametrize("normalise", [True, False])
def test_the_diagonal_average_follows_each_experts_own_information(adapters, statistics, tmp_path, normalise, floored):
    """``first`` is the authors' code (``merge_models`` with favor_target_model, norms of the Fisher as they are)."""
    flags = ["--combine", "FisherAverage", "--combine.normalise", str(normalise).lower(), "--rank", "16"]
    flags += ["--combine.floored", floored, "--combine.floor", "0.05"]
    assert combine(adapters, statistics["diagonal"], tmp_path / "m", *flags) == 0
    fishers = files(statistics["diagonal"])
    norms = [fisher.diagonal().norm() if normalise else 1.0 for fisher in fishers]
    floors = []
    for name, pair in read_adapter(tmp_path / "m").pairs.items():
        raw = [f.module_diagonal(name) for f in fishers]
        if floored == "first":
            floors.append((raw[0] < 0.05).double().mean().item())
            held = [raw[0].clamp(min=0.05) / norms[0], raw[1] / norms[1]]
        else:
            held = [(one / n).clamp(min=0.05) for one, n in zip(raw, norms, strict=True)]
        weights = [w * one.view(pair.shape) for one, w in zip(held, [1.0, 0.5], strict=True)]
        total = sum(w * own[name].dense() for w, own in zip(weights, updates(adapters), strict=True))
        torch.testing.assert_close(pair.dense(), total / sum(weights), rtol=1e-3, atol=1e-5)
    assert floored == "normalised" or 0 < max(floors) < 1


def test_what_else_a_file_holds_changes_no_average():
    """The modules of a file are those of its own pass's adapters, which no expert need change."""
    shapes = {name: (3, 4) for name in ("a", "b", "c")}
    updates = {name: LowRankPair(torch.randn(2, 4), torch.randn(3, 2)) for name in ("a", "b")}

    def merged(held):
        fishers = [weight_fisher(shapes, "diagonal", seed) for seed in (1, 2)]
        fishers = [
            DiagonalFisher({n: shapes[n] for n in held}, f.counts, {n: f.sums[n] for n in held}) for f in fishers
        ]
        experts = [
            Expert(str(i), 1.0, {n: p.scaled(1.0 + i) for n, p in updates.items()}, f) for i, f in enumerate(fishers)
        ]
        return FisherAverage().combine(experts).deltas

    one, two = merged("ab"), merged("abc")
    assert all(torch.equal(one[name].block(slice(0, 3)), two[name].block(slice(0, 3))) for name in "ab")


def test_regmean_refuses_factors_of_tokens(base, adapters, rows, statistics, tmp_path, capsys):
    flags = [*FORMS["kronecker"], "--model.granularity", "token", "--model.basis", "union"]
    folders = []
    for name in ("utility", "safety"):
        folders.append(tmp_path / name)
        assert (
            main(fisher_flags(base, adapters, rows, folders[-1], *flags, "--model.utility", str(adapters[name]))) == 0
        )
    assert combine(adapters, folders, tmp_path / "m", "--combine", "RegMean") == 2
    assert "measured with granularity token; RegMean needs --model.granularity sequence" in capsys.readouterr().err


def test_the_kronecker_average_is_that_of_the_files_factors(adapters, statistics, tmp_path, capsys):
    flags = ["--combine", "FisherAverage", "--combine.floor", "0.001", "--rank", "16"]
    flags += ["--combine.normalise", "false", "--combine.weight_safety", "2.0"]
    assert combine(adapters, statistics["kronecker"], tmp_path / "m", *flags) == 0
    said = capsys.readouterr().err
    assert "FisherAverage normalise has no effect here: it is read with diagonal Fisher files" in said
    assert "combine.weight_safety has no effect here: it is read with --method" in said
    assert "floored" not in said
    fishers = files(statistics["kronecker"])
    smallest = min(fishers[0].shapes, key=lambda name: sum(fishers[0].shapes[name]))
    for name, pair in read_adapter(tmp_path / "m").pairs.items():
        left, right = zip(*(fisher.factors(name) for fisher in fishers), strict=True)
        dense = [own[name].dense() for own in updates(adapters)]
        expected = kronecker_average(dense, left, right, [1.0, 0.5], ridge=1e-3)
        torch.testing.assert_close(pair.dense(), expected, rtol=1e-3, atol=1e-5)
        if name == smallest:
            ridged = [[m + 1e-3 * m.diagonal().mean() * torch.eye(len(m)) for m in side] for side in (left, right)]
            whole = [w * torch.kron(a, b) for w, a, b in zip([1.0, 0.5], *ridged, strict=True)]
            target = sum(f @ d.flatten() for f, d in zip(whole, dense, strict=True))
            expected = torch.linalg.solve(sum(whole), target).view(pair.shape)
            torch.testing.assert_close(pair.dense(), expected, rtol=1e-3, atol=1e-5)


def test_regmean_of_files_stays_low_rank_and_solves_the_whole_problem(adapters, statistics, tmp_path):
    assert combine(adapters, statistics["kronecker"], tmp_path / "m", "--combine", "RegMean") == 0
    fishers = files(statistics["kronecker"])
    for name, pair in read_adapter(tmp_path / "m").pairs.items():
        assert pair.rank == 3 + 2
        grams = [fisher.factors(name)[1] for fisher in fishers]
        expected = regmean([own[name].dense() for own in updates(adapters)], grams, [1.0, 0.5])
        torch.testing.assert_close(pair.dense(), expected, rtol=1e-4, atol=1e-6)
        scale = 0.9 + 0.1 * torch.eye(pair.shape[1])
        scaled = [w * gram * scale for w, gram in zip([1.0, 0.5], grams, strict=True)]
        right = sum(g @ own[name].dense().T for g, own in zip(scaled, updates(adapters), strict=True))
        whole = torch.linalg.solve(sum(scaled), right).T
        torch.testing.assert_close(pair.dense(), whole, rtol=1e-4, atol=1e-6)


def experts_of(adapters, folders, turn=lambda pairs: pairs):
    fishers = files(folders)
    return [Expert(str(i), 1.0, turn(p), f) for i, (p, f) in enumerate(zip(updates(adapters), fishers, strict=True))]


def test_regmean_in_the_core_space_takes_inputs_within_the_experts_span(adapters, statistics):
    folders = statistics["kronecker"]
    found = RegMean(off_diagonal=1.0, space="core").combine(experts_of(adapters, folders)).deltas
    one, two = updates(adapters)
    grams = [fisher.factors for fisher in files(folders)]
    for name in list(one)[:3]:
        v = torch.linalg.svd(torch.cat([one[name].a, two[name].a]).double(), full_matrices=False).Vh.T
        inside = [v.T @ gram(name)[1] @ v for gram in grams]
        cores = [pairs[name].dense() @ v for pairs in (one, two)]
        expected = sum(c @ g for c, g in zip(cores, inside, strict=True)) @ torch.linalg.inv(sum(inside)) @ v.T
        torch.testing.assert_close(found[name].dense(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("combination", [RegMean(), RegMean(space="core"), FisherAverage(floor=1e-3)])
def test_data_aware_combinations_depend_on_updates_and_not_on_factors_or_order(adapters, statistics, combination):
    folders = statistics["kronecker"]
    plain, turned = experts_of(adapters, folders), experts_of(adapters, folders, regauged)
    one, two, three = (combination.combine(given).deltas for given in (plain, turned, plain[::-1]))
    for name in one:
        torch.testing.assert_close(one[name].dense(), two[name].dense(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(one[name].dense(), three[name].dense(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("combination", [RegMean(), FisherAverage()])
def test_one_expert_is_itself(adapters, statistics, combination):
    expert = experts_of(adapters, statistics["kronecker"])[0]
    for name, delta in combination.combine([expert]).deltas.items():
        torch.testing.assert_close(delta.dense(), expert.deltas[name].dense(), rtol=1e-4, atol=1e-6)


def test_a_full_rank_expert_is_merged_as_its_matrix(adapters, statistics):
    low = experts_of(adapters, statistics["kronecker"])
    dense = [
        Expert(e.key, e.weight, {n: DenseDelta(p.dense()) for n, p in e.deltas.items()}, e.fisher) for e in low[:1]
    ]
    one, two = (RegMean().combine([*first, low[1]]).deltas for first in (low[:1], dense))
    for name in one:
        torch.testing.assert_close(one[name].dense(), two[name].dense(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_a_safety_adapter_is_one_more_expert_of_a_data_aware_combination(base, adapters, rows, tmp_path, weight):
    folder = tmp_path / "f"
    own = ["--model.reference_safety", "{safety: 1.0}"]
    assert main(fisher_flags(base, adapters, rows, folder, *FORMS["kronecker"], *own)) == 0
    given = ["--utility", str(adapters["utility"]), "--safety", str(adapters["safety"]), "--fisher", str(folder)]
    method = ["--method", "RegMean", "--method.weight_safety", str(weight), "--output", str(tmp_path / "m")]
    assert main(["merge", *given, *method]) == 0
    grams = {name: load_fisher(folder / f"{name}.safetensors").fisher for name in ("utility", "safety")}
    for name, pair in read_adapter(tmp_path / "m").pairs.items():
        both = [grams[which].factors(name)[1] for which in ("utility", "safety")]
        expected = regmean([own[name].dense() for own in updates(adapters)], both, [1.0, weight])
        torch.testing.assert_close(pair.dense(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("method", "form"), [("RegMean", "kronecker"), ("FisherAverage", "diagonal")])
@pytest.mark.parametrize(
    ("point", "message"),
    [
        ([], "safety.safetensors: measured at"),
        (
            ["--model.reference_safety", "{safety: 1.0}", "--model.reference_utility", "base"],
            "utility.safetensors: mea",
        ),
    ],
)
def test_experts_measured_elsewhere_than_at_themselves_are_refused(
    base, adapters, rows, tmp_path, capsys, method, form, point, message
):
    folder = tmp_path / "f"
    assert main(fisher_flags(base, adapters, rows, folder, *FORMS[form], *point)) == 0
    given = ["--utility", str(adapters["utility"]), "--safety", str(adapters["safety"]), "--fisher", str(folder)]
    assert main(["merge", *given, "--method", method, "--rank", "8", "--output", str(tmp_path / "m")]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "expert alone: `python -m src fisher --model.reference_" in said


@pytest.mark.parametrize(
    ("choose", "flags", "message"),
    [
        (lambda both: both["diagonal"], ["--combine", "RegMean"], "needs kronecker in weight coordinates"),
        (lambda both: both["kronecker"][:1], ["--combine", "RegMean"], "1 directories for 2 utility adapters"),
        (lambda both: both["kronecker"][::-1], ["--combine", "RegMean"], "not measured at"),
        (lambda both: [both["kronecker"][0], both["diagonal"][1]], ["--combine", "FisherAverage"], "representation"),
        (lambda both: both["kronecker"], ["--combine", "RegMean", "--fisher_weights", "[1,1]"], "use utility_weights"),
        (lambda _: [], ["--combine", "RegMean"], "pass --fisher"),
    ],
)
def test_statistics_are_checked_to_belong_to_their_experts(
    adapters, statistics, tmp_path, capsys, choose, flags, message
):
    assert combine(adapters, choose(statistics), tmp_path / "m", *flags) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(("key", "value"), [("labels", "data"), ("granularity", "token")])
def test_statistics_of_other_measurements_are_not_averaged(adapters, statistics, tmp_path, capsys, key, value):
    other = shutil.copytree(statistics["kronecker"][1], tmp_path / "other")
    rewritten(other / "utility.safetensors", lambda record: record.update({key: value}))
    assert combine(adapters, [statistics["kronecker"][0], other], tmp_path / "m", "--combine", "FisherAverage") == 2
    assert f"{key} is {value}" in capsys.readouterr().err


def test_an_expert_alone_may_be_spelled_by_weights(adapters, statistics, tmp_path):
    other = shutil.copytree(statistics["kronecker"][1], tmp_path / "other")
    rewritten(other / "utility.safetensors", lambda record: record.update(reference={"utility": 1.0, "safety": 0.0}))
    assert combine(adapters, [statistics["kronecker"][0], other], tmp_path / "m", "--combine", "RegMean") == 0


@pytest.mark.parametrize(
    "method", [SstDiagonal(), SstDiagonal(form="interpolating"), FisherAverage(), RegMean(), Led()]
)
def test_a_module_that_no_adapter_changes_needs_no_fisher_information(adapters, method):
    """PEFT begins with B = 0, and a layer that training never reaches ends with it."""
    both = updates(adapters)
    fisher = matching_fishers(method, *both)
    keyed = [KeyedDeltas(pairs, name) for pairs, name in zip(both, "us", strict=True)]
    expected = method.patch(*keyed, fisher).pairs
    nothing = LowRankPair(torch.ones(2, 5), torch.zeros(6, 2))
    found = method.patch(*(KeyedDeltas(deltas | {"unused": nothing}, deltas.key) for deltas in keyed), fisher).pairs
    assert "unused" not in found or not matrix(found["unused"]).any()
    for name, delta in expected.items():
        assert torch.equal(matrix(found[name]), matrix(delta))


def test_both_stages_cannot_read_fisher_files_at_once(adapters, statistics, tmp_path, capsys):
    flags = ["--combine", "RegMean", "--method", "Sst", "--safety", str(adapters["safety"])]
    assert combine(adapters, statistics["kronecker"], tmp_path / "m", *flags) == 2
    assert "both need Fisher files" in capsys.readouterr().err


def diagonal_expert():
    pair = LowRankPair(torch.ones(1, 3), torch.ones(4, 1))
    return Expert("a", 1.0, {"m": pair}, weight_fisher({"m": pair.shape}, "diagonal", 1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RegMean(off_diagonal=1.5), "off_diagonal is 1.5"),
        (lambda: FisherAverage(floor=0.0), "floor is 0.0"),
        (lambda: RegMean().combine([Expert("a", 1.0, {})]), "Fisher file of every expert"),
        (lambda: RegMean().combine([diagonal_expert()]), "representation kronecker, not diagonal$"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()
