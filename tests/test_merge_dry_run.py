"""What a merge says before and after it: dry runs, warnings, and input that is refused in one line."""

import ctypes
import json
import logging
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from src.adapters.pairs import LowRankPair
from src.adapters.peft_files import read_adapter, write_adapter
from src.errors import InputError
from src.merge.combinations.compress_then_merge import CompressThenMerge
from src.merge.combinations.fisher_average import FisherAverage
from src.merge.combinations.iso_c import IsoC
from src.merge.combinations.magnitude_prune import MagnitudePrune
from src.merge.combinations.regmean import RegMean
from src.merge.combinations.task_arithmetic import TaskArithmetic
from src.merge.combinations.ties import Ties
from src.merge.resta import Resta
from src.merge.sst import Sst
from src.merge.sst_diagonal import SstDiagonal
from src.merge.sst_m import SstM
from src.merge.sst_v import SstV
from src.merge.stage import merge


@pytest.fixture
def said(caplog, capsys, monkeypatch):
    """A function that gives what was logged, and then what was printed, since it was last called."""
    monkeypatch.setattr(logging.getLogger("src"), "propagate", True)
    caplog.set_level(logging.INFO, "src")

    def taken():
        text = caplog.text + capsys.readouterr().out
        caplog.clear()
        return text

    return taken


@pytest.mark.parametrize(
    "record",
    [
        [{"adapter": 5}],
        {"a": 1},
        {"models": [{}]},
        {"models": {"a": 1}},
        {"models": ["a"]},
        {"models": [{"adapter": 5, "suites": {}}]},
        {"models": [{"adapter": None, "suites": []}]},
        {"models": [{"adapter": None, "suites": {"s": 1}}]},
        {"models": [{"adapter": None, "suites": {"s": {"refusal": {"value": "x", "interval": [0, 1], "n": 1}}}}]},
        {"models": [{"adapter": None, "suites": {"s": {"refusal": {"value": 1, "interval": 3, "n": 1}}}}]},
        {"models": [{"adapter": None, "suites": {"s": {"perplexity": 3}}}]},
    ],
)
def test_a_file_that_is_no_evaluation_is_one_line(adapters, tmp_path, record):
    (tmp_path / "metrics.json").write_text(json.dumps(record))
    given = {"utility": str(adapters["utility"]), "evaluation": str(tmp_path / "metrics.json")}
    with pytest.raises(InputError, match=r"metrics\.json: .*; expected .*of an evaluation"):
        merge(**given, output=str(tmp_path / "m"))
    assert not (tmp_path / "m").exists()


def test_hashes_of_prompts_that_are_no_text_are_one_line(adapters, tmp_path):
    folder = shutil.copytree(adapters["utility"], tmp_path / "a")
    (folder / "seen_prompts.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"seen_prompts\.txt: not UTF-8 text"):
        read_adapter(folder)


def test_fisher_files_that_nothing_needs_are_named(adapters, tmp_path, said):
    given = {"utility": str(adapters["utility"]), "output": str(tmp_path / "m"), "dry_run": True}
    merge(**given)
    assert "Fisher files" not in said()
    merge(**given, fisher=str(adapters["utility"]))
    assert "TaskArithmetic needs no Fisher files: --fisher and --fisher_weights are not used" in said()
    merge(**given, fisher_weights=[1.0], combine=Ties(), rank=2)
    assert "Ties needs no Fisher files" in said()
    with pytest.raises(InputError, match="fisher /nonexistent: no such directory"):
        merge(**given, fisher="/nonexistent", method=TaskArithmetic(), safety=str(adapters["safety"]))


def test_points_of_a_sweep_that_differ_little_have_names_of_their_own(adapters, tmp_path):
    values = [0.1234567, 0.1234568]
    both = [str(adapters["utility"]), str(adapters["safety"])]
    merge(utility=both, combine=Ties(), rank=2, sweep={"combine.density": values}, output=str(tmp_path / "m"))
    found = [read_adapter(tmp_path / "m" / f"combine.density-{value}").manifest["method"] for value in values]
    assert found == [f"Ties, combine.density = {value}" for value in values]


def test_an_energy_that_was_asked_for_is_no_surprise(adapters, tmp_path, said):
    both = [str(adapters["utility"]), str(adapters["safety"])]
    for form, warned in (({"energy": 0.5}, False), ({"rank": 1}, True), ({"rank": 1, "warn_below": 0.0}, False)):
        merge(utility=both, combine=Ties(0.5), **form, output=str(tmp_path / "m"), overwrite=True)
        assert ("of the merged update's energy is kept" in said()) == warned
        kept = read_adapter(tmp_path / "m").manifest["output"]["kept_energy"]
        assert kept < 0.95


def test_what_a_combination_finds_as_a_method_is_in_the_manifest(adapters, tmp_path):
    given = {"utility": str(adapters["utility"]), "safety": str(adapters["safety"])}
    merge(**given, method=IsoC(), output=str(tmp_path / "m"))
    manifest = read_adapter(tmp_path / "m").manifest
    modules = manifest["findings"]["modules"]
    assert len(modules) == 14
    assert all(found["singular_value"] > 0 for found in modules.values())
    assert manifest["combine"]["findings"] == {}


def front_matter(folder):
    from huggingface_hub import ModelCard

    return ModelCard((folder / "README.md").read_text()).data.to_dict()


def test_front_matter_names_a_base_of_the_hub_and_no_directory(adapters, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, config = shutil.copytree(adapters["utility"], tmp_path / "a"), tmp_path / "a" / "adapter_config.json"
    (tmp_path / "models" / "here").mkdir(parents=True)
    bases = {
        "org/model-1.0": "org/model-1.0",
        "models/here": None,
        "./models": None,
        "/models/x": None,
        "a: b/c": None,
        "~/base": None,
    }
    for base, expected in bases.items():
        config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": base}))
        merge(utility=str(folder), license="bsd-3-clause", output="m", overwrite=True)
        found = front_matter(tmp_path / "m")
        assert found.get("base_model") == expected, base
        assert found["license"] == "bsd-3-clause"
        assert found["tags"] == ["lora", "sst-merge", "merge"]


@pytest.mark.parametrize("licence", ["foo bar: x\n---", "MIT License", "", "mit\n", "-mit", "[mit]"])
def test_a_licence_is_an_identifier_of_the_hub(adapters, tmp_path, licence):
    with pytest.raises(InputError, match=r"license is .*; expected an identifier of the hub"):
        merge(utility=str(adapters["utility"]), license=licence, output=str(tmp_path / "m"))


def test_a_card_without_a_licence_lists_those_that_the_adapters_name(adapters, tmp_path):
    cards = {
        "one": "---\nlicense: llama3.1\ntags: [x]\n---\n# One\n",
        "two": "---\nlicense: [mit, openrail++]\n---\n",
        "broken": "---\nlicense: a: b\n---\n",
        "none": "no front matter\n",
    }
    for name, card in cards.items():
        (shutil.copytree(adapters["utility"], tmp_path / name) / "README.md").write_text(card)
    given = [str(tmp_path / name) for name in cards]
    merge(utility=given, output=str(tmp_path / "m"))
    card = (tmp_path / "m" / "README.md").read_text()
    assert "Licence: not stated by its maker; the adapters' own cards name:" in card
    for name, licence in zip(given, ["llama3.1", "mit and openrail++", "none named", "none named"], strict=True):
        assert f"  * `{name}`: {licence}\n" in card
    assert "license" not in front_matter(tmp_path / "m")
    merge(utility=given, license="other", output=str(tmp_path / "n"))
    assert "own cards" not in (tmp_path / "n" / "README.md").read_text()


def sizes(text):
    """The bytes that a dry run expects of an output: smallest and largest."""
    line = next(line for line in text.splitlines() if "output(s) of form" in line)
    units = {"B": 1, "kB": 1e3, "MB": 1e6}
    found = [float(number) * units[unit] for number, unit in re.findall(r"(\d+) (B|kB|MB)\b(?! in all)", line)]
    return found[0], found[-1]


@pytest.mark.parametrize(
    "given",
    [
        {"rank": 1},
        {"rank": 4, "combine": Ties(0.5)},
        {},
        {"combine": CompressThenMerge(), "sweep": {"combine.rank": [1, 4]}},
        {"combine": CompressThenMerge(), "sweep": {"combine.rank": [4, 1]}},
        {"method": TaskArithmetic(), "alpha": [1.0, 0.0, 0.5]},
        {"method": TaskArithmetic(), "alpha": [0.0, 0.5], "rank": 4},
    ],
)
def test_a_dry_run_expects_the_sizes_that_are_written(adapters, tmp_path, said, given):
    both = [str(adapters["utility"]), str(adapters["safety"])]
    utility, safety = ({"utility": both}, {}) if "method" not in given else ({"utility": both[0]}, {"safety": both[1]})
    merge(**utility, **safety, **given, dry_run=True, warn_below=0.0, output=str(tmp_path / "m"))
    text = said()
    merge(**utility, **safety, **given, warn_below=0.0, output=str(tmp_path / "m"))
    written = sorted(path.stat().st_size for path in (tmp_path / "m").rglob("adapter_model.safetensors"))
    assert f"{len(written)} output(s) of form" in text
    assert sizes(text) == pytest.approx((written[0], written[-1]), rel=0.15)


@pytest.mark.parametrize("alpha", [[0.0, 1.0], [1.0, 0.0]])
def test_a_dry_run_lists_the_modules_of_the_largest_output(adapters, tmp_path, said, alpha):
    given = {"utility": str(adapters["utility"]), "safety": str(adapters["safety"]), "output": str(tmp_path / "m")}
    merge(**given, method=TaskArithmetic(), alpha=alpha, dry_run=True)
    text = said()
    assert re.search(r"^16 x 16 +\d+  5$", text, re.MULTILINE)
    assert "(of the largest output)" in text


def test_a_dry_run_refuses_what_a_later_point_of_a_sweep_would_be_refused_for(adapters, tmp_path):
    both = {"utility": str(adapters["utility"]), "safety": str(adapters["safety"]), "output": str(tmp_path / "m")}
    for dry_run in (True, False):
        with pytest.raises(InputError, match="gives full-rank updates"):
            merge(**both, method=Ties(), alpha=[0.0, 1.0], dry_run=dry_run)


def peak(work):
    """Bytes of memory that some work takes at most, beside what is held before."""

    def resident(key):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024

    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize(
    ("shape", "form"), [((1500, 2000), {"rank": 16}), ((700, 3000), {"energy": 0.9}), ((1500, 2000), {})]
)
def test_a_dry_run_says_how_much_memory_is_needed(tmp_path, said, shape, form):
    draw = torch.Generator().manual_seed(0)
    for name in ("a", "b"):
        pair = LowRankPair(torch.randn(8, shape[1], generator=draw), torch.randn(shape[0], 8, generator=draw))
        count = 1 if form else 120
        pairs = {f"m{i}": LowRankPair(pair.a.clone(), pair.b.clone()) for i in range(count)}
        write_adapter(tmp_path / name, pairs, base="org/x", manifest={}, seen=frozenset(), card="c")
    given = {"utility": [str(tmp_path / "a"), str(tmp_path / "b")], "combine": Ties() if form else None, **form}
    merge(**given, dry_run=True, output=str(tmp_path / "m"))
    line = next(line for line in said().splitlines() if "memory" in line)
    found = [
        float(number) * {"kB": 1e3, "MB": 1e6, "B": 1}[unit] for number, unit in re.findall(r"(\d+) (kB|MB|B)\b", line)
    ]
    needed = peak(lambda: merge(**given, warn_below=0.0, output=str(tmp_path / "m")))
    assert needed < 1.25 * sum(found) + 8e6
    assert found[-1] < 2.5 * needed


@pytest.mark.parametrize(
    ("settings", "unread"),
    [
        ({"damping": 0.5, "radius": 0.3, "trust": 1.0}, {"damping", "radius", "trust"}),
        ({"filter": "topk", "k": 2, "t": 3.0, "rho": 0.2}, {"t"}),
        ({"filter": "threshold", "t": 3.0}, set()),
        ({"coefficients": "relearn", "rho": 0.2, "damping": 0.5, "radius": 0.3, "t": 3.0}, {"rho", "damping"}),
        ({"coefficients": "relearn", "ridge": "kronecker", "damping": 0.5, "radius": 0.3}, set()),
        ({}, set()),
        ({"seed": 1, "eigenpairs": 5, "holdout_seed": 2}, {"seed", "eigenpairs"}),
        ({"filter": "topk", "k": 2, "control": "random", "seed": 1, "eigenpairs": 5, "holdout_seed": 2}, set()),
        (
            {"coefficients": "relearn", "seed": 1, "eigenpairs": 5, "holdout_seed": 2},
            {"seed", "eigenpairs", "holdout_seed"},
        ),
    ],
)
def test_options_of_sst_that_nothing_reads_are_named(adapters, tmp_path, said, settings, unread):
    given = {name: str(adapters[name]) for name in ("utility", "safety")}
    with pytest.raises(InputError, match="nonexistent"):
        merge(**given, fisher="/nonexistent", method=Sst(**settings), output=str(tmp_path / "m"))
    assert set(re.findall(r"method\.(\w+) has no effect", said())) == unread


@pytest.mark.parametrize(
    ("method", "unread"),
    [
        (SstV(top=0.5, tau=2.0), {"tau": "mask soft"}),
        (SstM(mask="soft", top=0.5, tau=2.0), {"top": "mask hard"}),
        (SstDiagonal(gamma=1.0), {"gamma": "mask soft"}),
        (SstDiagonal(mask="soft", gamma=1.0), {}),
        # Studies give every method with a seed that of the study.
        (Resta(gamma=0.5, seed=1), {}),
        (Ties(density=0.5), {}),
    ],
)
def test_options_that_a_mask_or_a_merge_without_one_does_not_read_are_named(method, unread):
    assert method.unread == unread


@pytest.mark.parametrize(
    ("combine", "unread"),
    [
        (MagnitudePrune(density=0.5, patch_only=True), {"patch_only"}),
        (RegMean(space="core", weight_safety=2.0), {"weight_safety"}),
        (FisherAverage(weight_safety=0.5), {"weight_safety"}),
        (FisherAverage(), set()),
    ],
)
def test_what_tells_of_the_safety_adapter_is_unread_by_a_combination_of_utility_adapters(combine, unread):
    assert set(combine.unread_by_combine) == unread
    assert combine.unread == {}


def test_a_swept_option_that_nothing_reads_is_named_once(adapters, tmp_path, said):
    given = {name: str(adapters[name]) for name in ("utility", "safety")}
    with pytest.raises(InputError, match="nonexistent"):
        merge(**given, fisher="/nonexistent", method=Sst(), sweep={"radius": [0.1, 0.3]}, output=str(tmp_path / "m"))
    assert said().count("method.radius has no effect here: it is read with coefficients relearn") == 1
