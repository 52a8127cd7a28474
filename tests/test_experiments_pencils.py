"""What a merge cell keeps of its pencil, and the table of overlaps."""

import math
from dataclasses import dataclass, field

from src.experiments.pencils import POINTS, kept_pencil, overlap_table, pencils


@dataclass(frozen=True, eq=False)
class ToyCell:
    key: str
    stage: str = "merge"
    needs: dict = field(default_factory=dict)
    settings: dict = field(default_factory=dict)


@dataclass(frozen=True)
class ToyModel:
    seed: int
    made: ToyCell | None


class ToyStore:
    """Results of merges by key."""

    def __init__(self, found):
        self.found = found

    def has_result(self, cell):
        return cell.key in self.found

    def read(self, cell):
        return {"found": self.found[cell.key]}


def findings(count=256):
    return {
        "dim": 13440,
        "complement_eigenvalue": None,
        "effective_rank": 12.3456789,
        "patch_norm_kept": 0.5,
        "spectrum": {"rank": list(range(1, count + 1)), "value": [1 / 3 ** (i / 9) for i in range(count)]},
        "held_out_curve": {"position": [0.0, 1.0], "safety_energy_kept": [0.0, 1.0], "utility_tax_kept": [0.0, 1.0]},
        "held_out": {"safety_energy_kept": 2 / 3, "utility_tax_kept": 0.25},
        "kept_by_module": {"model.layers.0.q": 0.123456789, "model.layers.1.q": None, "model.layers.1.k": 0.25},
    }


OVERLAP = {"directions": 4, "angles": [10.0, 20.0, 40.0, 90.0], "shared": 0.25, "chance": 0.001, "spearman": 0.5}


def test_a_cell_keeps_a_compact_spectrum_with_both_ends_and_the_map():
    kept = kept_pencil({"findings": findings(), "overlap": OVERLAP})
    ranks = kept["pencil"]["spectrum"]["rank"]
    assert len(ranks) == POINTS == len(set(ranks))
    assert (ranks[0], ranks[-1]) == (1, 256)
    values = kept["pencil"]["spectrum"]["value"]
    assert all(math.isclose(v, 1 / 3 ** ((r - 1) / 9), rel_tol=1e-4) for r, v in zip(ranks, values, strict=True))
    expected = {"layers": [0, 1], "modules": ["q", "k"], "kept": [[0.12346, None], [None, 0.25]]}
    assert kept["pencil"]["map"] == expected
    assert kept["pencil"]["held_out"]["safety_energy_kept"] == 0.66667
    assert kept["overlap"] == OVERLAP
    few = kept_pencil({"findings": findings(5)})["pencil"]["spectrum"]["rank"]
    assert few == [1, 2, 3, 4, 5]


def test_a_merge_without_a_pencil_keeps_none_and_a_relearned_one_its_map():
    assert kept_pencil({"findings": {"epsilon": 1.0}, "overlap": None}) == {}
    assert kept_pencil({}) == {}
    relearned = {key: findings()[key] for key in ("kept_by_module", "patch_norm_kept")} | {"held_out": None}
    kept = kept_pencil({"findings": relearned})
    assert kept["pencil"]["spectrum"] is None
    assert kept["pencil"]["curve"] is None
    assert kept["pencil"]["map"]["layers"] == [0, 1]


FISHER = ToyCell("f", "fisher")


def toy(key, fisher=FISHER, seed=0, stage="merge", kind="Sst"):
    method = {"class_path": "src.merge.sst.Sst"} if kind == "Sst" else {"class_path": f"elsewhere.{kind}"}
    settings = {} if stage == "fit" else {"method": method}
    return ToyModel(seed, ToyCell(key, stage, {"fisher": (fisher,)} if fisher else {}, settings))


def test_pencils_are_those_of_merges_with_fisher_files_and_an_older_cell_has_none():
    points = {
        "base": [ToyModel(0, None)],
        "TA @ 1": [toy("t", fisher=None, kind="TaskArithmetic")],
        "average @ 1": [toy("f", kind="FisherAverage")],
        "mixed": [toy("m", fisher=None, stage="fit")],
        "SST @ 1": [toy("s"), toy("s1", seed=1)],
        "old @ 1": [toy("o")],
        "missing @ 1": [toy("nowhere")],
    }
    store = ToyStore({"t": {}, "f": {}, "m": {}, "s": {"pencil": {"dim": 3}}, "s1": {"pencil": {"dim": 4}}, "o": {}})
    assert pencils(points, store) == [
        {"model": "SST @ 1", "seed": 0, "seeds": 2, "cell": "s", "pencil": {"dim": 3}},
        {"model": "old @ 1", "seed": 0, "seeds": 1, "cell": "o", "pencil": None},
    ]


def test_a_second_step_shows_nothing_as_held_out():
    shown = {"dim": 3, "held_out": {"safety_energy_kept": 1.0}}
    plain = ToyCell("a", "merge")
    fitted = ToyCell("b", "merge", {"fisher": (FISHER,)})
    at = {key: ToyCell("f" + key, "fisher", {"first": (one,)}) for key, one in (("p", plain), ("q", fitted))}
    points = {key: [toy(key, fisher=fisher)] for key, fisher in at.items()}
    found = pencils(points, ToyStore({key: {"pencil": shown} for key in at}))
    assert [one["pencil"]["held_out"] for one in found] == [{"safety_energy_kept": 1.0}, None]


def test_methods_that_share_their_fisher_matrices_share_a_row_of_the_overlap():
    other = ToyCell("f2", "fisher")
    methods = {
        "TA": [toy("t", fisher=None)],
        "SST": [toy("a"), toy("b"), toy("c", other, seed=1)],
        "control": [toy("d")],
        "old": [toy("e", ToyCell("f3", "fisher"))],
    }
    known = {key: {"overlap": OVERLAP} for key in "abd"} | {"c": {"overlap": OVERLAP | {"shared": 0.75}}, "e": {}}
    table = overlap_table(methods, ToyStore(known | {"t": {}}))
    assert [(row["methods"], row["seed"]) for row in table["rows"]] == [("SST; control", 0), ("SST", 1)]
    assert [row["shared"] for row in table["rows"]] == [0.25, 0.75]
    first = table["rows"][0]
    assert (first["least"], first["median"], first["greatest"]) == (10.0, 30.0, 90.0)
    assert {column["key"] for column in table["columns"]} == set(first)
