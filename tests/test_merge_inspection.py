import json
import sys
from itertools import chain
from shutil import copytree
from statistics import median

import pytest
import torch

from src.adapters.constant_input import with_bias
from src.adapters.deltas import DenseDelta
from src.adapters.geometry import cosine, inner, principal_angles, principal_cosines, whole_cosine
from src.adapters.pairs import LowRankPair, weighted_sum
from src.adapters.peft_config import Layout
from src.adapters.peft_files import read_adapter, write_adapter
from src.cli import main
from src.gevp.diagnostics import effective_rank
from src.merge.inspect_stage import inspect_stage
from src.merge.inspection import inspect_adapters
from src.models.discovery import find_adapters


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_inner_products_need_no_dense_update():
    one = LowRankPair(drawn(2, 5), drawn(4, 2, seed=1))
    two = LowRankPair(drawn(3, 5, seed=2), drawn(4, 3, seed=3))
    expected = (one.dense() * two.dense()).sum().item()
    assert inner(one, two) == pytest.approx(expected)
    dense = DenseDelta(two.dense())
    for pair in ((one, dense), (dense, one), (DenseDelta(one.dense()), dense)):
        assert inner(*pair) == pytest.approx(expected)
        assert cosine(*pair) == pytest.approx(cosine(one, two))


def test_a_module_that_one_adapter_lacks_counts_in_the_norm():
    pair = LowRankPair(drawn(2, 5), drawn(4, 2, seed=1))
    for given in (({"a": pair}, {"a": pair, "b": pair}), ({"a": pair, "b": pair}, {"a": pair})):
        assert whole_cosine(*given) == pytest.approx(0.5**0.5)


def test_the_effective_rank_of_a_flat_spectrum_is_its_rank():
    assert effective_rank(torch.full((5,), 3.0)) == pytest.approx(5.0)
    assert effective_rank(torch.tensor([1.0, 0.0])) == pytest.approx(1.0)
    assert effective_rank(torch.zeros(3)) == 0.0


def test_principal_angles_are_scipys():
    import scipy.linalg

    one, two = torch.linalg.qr(drawn(9, 3)).Q, torch.linalg.qr(drawn(9, 4, seed=1)).Q
    expected = scipy.linalg.subspace_angles(one.numpy(), two.numpy())
    torch.testing.assert_close(principal_cosines(one, two).acos().flip(0), torch.from_numpy(expected))
    torch.testing.assert_close(principal_angles(one, two).flip(0), torch.from_numpy(expected).rad2deg())


def test_an_adapter_is_parallel_to_its_multiple_and_opposite_to_its_negative(adapters, tmp_path):
    utility = read_adapter(adapters["utility"])
    for name, factor in (("double", 2.0), ("minus", -1.0)):
        pairs = weighted_sum([utility.pairs], [factor])
        write_adapter(tmp_path / name, pairs, base=utility.base, manifest={}, seen=frozenset(), card="c")
    given = [utility, read_adapter(tmp_path / "double"), read_adapter(tmp_path / "minus")]
    summaries, comparison = inspect_adapters(given)
    assert comparison.cosines[0].tolist() == pytest.approx([1.0, 1.0, -1.0])
    assert comparison.columns.min() == pytest.approx(1.0)
    assert comparison.rows.min() == pytest.approx(1.0)
    assert summaries[1].norm == pytest.approx(2 * summaries[0].norm)
    assert summaries[0].ranks == (3, 3)
    assert summaries[0].modules == 14
    assert summaries[0].largest == max(utility.pairs, key=lambda name: utility.pairs[name].squared_norm())


def test_the_command_prints_a_table_and_draws_a_heat_map(adapters, tmp_path, capsys):
    given = [str(adapters["utility"]), str(adapters["safety"])]
    assert main(["inspect", *given]) == 0
    assert "effective rank" in capsys.readouterr().out
    assert main(["inspect", *given, "--output", str(tmp_path / "i")]) == 0
    assert (tmp_path / "i" / "angles.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "i" / "inspect.json").read_text())
    assert found["cosines"][0][1] == found["cosines"][1][0]
    pair = found["angles"][0]
    assert (pair["one"], pair["two"], len(pair["columns"]), len(pair["rows"])) == (0, 1, 14, 14)
    by_hand = [
        principal_cosines(*(torch.linalg.qr(read_adapter(folder).pairs[name].b.double()).Q for folder in given))
        for name in pair["columns"]
    ]
    assert found["columns"][0][1] == pytest.approx(torch.stack([c.square().mean() for c in by_hand]).mean().item())
    rows = [
        principal_cosines(*(torch.linalg.qr(read_adapter(folder).pairs[name].a.double().T).Q for folder in given))
        for name in pair["rows"]
    ]
    assert found["rows"][0][1] == pytest.approx(torch.stack([c.square().mean() for c in rows]).mean().item())
    assert pair["columns"] == {
        name: pytest.approx(cosines.acos().rad2deg().tolist(), abs=1e-5)
        for name, cosines in zip(pair["columns"], by_hand, strict=True)
    }
    assert found["column_angles"][0][1] == pytest.approx(median(chain.from_iterable(pair["columns"].values())))
    assert (tmp_path / "i" / "table.md").read_text() in capsys.readouterr().out
    assert main(["inspect", *given, "--output", given[1], "--overwrite"]) == 2
    assert "is not this command's, and would be lost" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "no" / "where" / "x")]) == 2
    assert "no such directory" in capsys.readouterr().err


def test_a_folder_of_adapters_stands_for_those_below_it(adapters, tmp_path, capsys):
    for number, name in enumerate(("utility", "safety")):
        copytree(adapters[name], tmp_path / "sst" / f"alpha-{number}")
    assert main(["inspect", str(adapters["utility"]), str(adapters["safety"])]) == 0
    named = capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "sst")]) == 0
    found = capsys.readouterr().out
    for number, name in enumerate(("utility", "safety")):
        found = found.replace(str(tmp_path / "sst" / f"alpha-{number}"), str(adapters[name]))
    assert found == named


def test_the_output_is_written_before_the_table(adapters, tmp_path, monkeypatch):
    class Full:
        def write(self, text):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("src.merge.inspect_stage.draw_angles", lambda *_: None)
    monkeypatch.setattr(sys, "stdout", Full())
    with pytest.raises(OSError, match="No space"):
        inspect_stage(adapters=[str(adapters["utility"])], output=str(tmp_path / "i"))
    assert (tmp_path / "i" / "inspect.json").is_file()


def test_links_to_adapters_are_followed_and_each_is_found_once(tmp_path):
    def adapter(name):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "adapter_config.json").touch()

    for name in ("utility", "links/s", "links/.hidden"):
        adapter(name)
    for name, target in {"u": "../utility", "again": "s", "loop": "../links", "up": "..", "none": "nowhere"}.items():
        (tmp_path / "links" / name).symlink_to(target)
    found = find_adapters(tmp_path / "links")
    assert [str(path.relative_to(tmp_path)) for path in found] == ["links/s", "links/u"]
    (tmp_path / "alias").symlink_to("links")
    assert find_adapters(tmp_path / "alias") == [tmp_path / "alias" / "s", tmp_path / "alias" / "u"]


def test_effective_ranks_are_means_over_modules_of_the_weights_part(adapters, tmp_path):
    utility = read_adapter(adapters["utility"])
    biased = {n: with_bias(p, 30.0 * drawn(p.shape[0], seed=i)) for i, (n, p) in enumerate(utility.pairs.items())}
    layout = Layout(constant=frozenset(biased))
    write_adapter(tmp_path / "b", biased, base=utility.base, manifest={}, seen=frozenset(), card="c", layout=layout)
    summaries = [inspect_adapters([one])[0][0] for one in (utility, read_adapter(tmp_path / "b"))]
    each = [effective_rank(torch.linalg.svdvals(pair.dense())[:3]) for pair in utility.pairs.values()]
    assert summaries[0].effective_rank == pytest.approx(sum(each) / len(each))
    assert summaries[1].effective_rank == pytest.approx(summaries[0].effective_rank, rel=1e-5)
    assert summaries[1].effective_rank <= summaries[1].ranks[1]
