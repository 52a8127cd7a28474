"""Labels of the plot: beside their points, inside of the axes, and not on each other; what forms a path."""

import json
import math
from itertools import combinations

import pytest
from matplotlib.figure import Figure

from src.merge.combinations.task_arithmetic import TaskArithmetic
from src.merge.sst import Sst
from src.merge.sweep import swept_once, variants
from src.metrics.bootstrap import Estimate
from src.report.plot import STYLES, plot_fronts
from src.report.results import ModelResult, load_results


def result(name, method, alpha, refusal, over, accuracy):
    columns = {"refusal (harmful)": refusal, "over-refusal (borderline)": over, "accuracy (task)": accuracy}
    shares = {name: Estimate(value, max(0, value - 0.1), min(1, value + 0.1), 40) for name, value in columns.items()}
    return ModelResult(name, method, alpha, shares, {}, {})


CLOSE = [
    result("base", "base", None, 0.02, 0.0, 0.0),
    result("utility", "expert", None, 0.0, 0.0, 0.69),
    result("safety", "expert", None, 1.0, 1.0, 0.0),
    result("a/1", "TaskArithmetic", 0.75, 0.33, 0.12, 0.44),
    result("a/2", "TaskArithmetic", 1.0, 0.95, 0.53, 0.3),
    result("b/1", "SST soft", 1.0, 0.36, 0.14, 0.42),
    result("b/2", "SST soft", 1.2, 0.95, 0.53, 0.3),
]


@pytest.fixture
def figures(monkeypatch):
    """Figures that are drawn, kept for a look."""
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    return drawn


def test_labels_stand_beside_their_points_and_not_on_each_other(figures, tmp_path):
    assert plot_fronts(CLOSE, tmp_path / "fronts.png")
    (figure,) = figures
    renderer = figure.canvas.get_renderer()
    for axis, column in zip(figure.axes, ("over-refusal (borderline)", "accuracy (task)"), strict=True):
        labels = [text for text in axis.texts if text.get_text()]
        expected = {(f"α={r.alpha:g}" if r.alpha else r.name, r.shares[column].value) for r in CLOSE}
        assert {(label.get_text(), label.xy[0]) for label in labels} == expected
        boxes = [label.get_window_extent(renderer) for label in labels]
        assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
        frame, point = axis.get_window_extent(), figure.dpi / 72
        for label, box in zip(labels, boxes, strict=True):
            assert all(frame.contains(*corner) for corner in box.corners())
            x, y = axis.transData.transform(label.xy)
            assert min(abs(x - box.x0), abs(x - box.x1)) < 10 * point
            assert abs(y - (box.y0 + box.y1) / 2) < 20 * point


def test_paths_that_are_more_than_the_styles_begin_them_again(figures, tmp_path):
    many = [result(f"m{i}", f"m{i}", 1.0, 0.5, 0.1, i / 40) for i in range(4 * len(STYLES) + 2)]
    assert plot_fronts(many, tmp_path / "fronts.png")
    colours = [lines[0].get_color() for lines in figures[0].axes[0].containers]
    assert colours == [STYLES[i % len(STYLES)][0] for i in range(len(many))]


def test_an_interval_that_ends_beside_its_value_is_drawn(figures, tmp_path):
    beyond = Estimate(0.3, math.nextafter(0.3, 1), math.nextafter(0.3, 0), 40)
    columns = ("refusal (harmful)", "over-refusal (borderline)")
    assert plot_fronts([ModelResult("m", "m", 1.0, dict.fromkeys(columns, beyond), {}, {})], tmp_path / "fronts.png")
    assert len(figures) == 1


def loaded(tmp_path, *models):
    """Results of merges, of which (name, method, alpha) are given."""
    listed = [
        {
            "name": name,
            "adapter": {"path": name},
            "manifest": {"kind": "merge", "method": method, "alpha": alpha},
            "suites": {},
        }
        for name, method, alpha in models
    ]
    (tmp_path / "metrics.json").write_text(json.dumps({"models": listed}))
    return [(one.path, one.label) for one in load_results(tmp_path)]


def test_a_sweep_at_one_alpha_is_a_path_along_its_option(tmp_path):
    swept = [(f"s/t-{t}", f"SST relearn, t = {t}", 1.0) for t in (18, 8, 12.5)]
    labels = ["SST relearn, t = 8", "SST relearn, t = 12.5", "SST relearn, t = 18"]
    found = loaded(tmp_path, *swept, ("a", "SST soft", 1.0))
    assert found == [("SST relearn over t", label) for label in labels] + [("SST soft", "SST soft, α = 1")]


def test_a_sweep_and_a_path_of_alphas_of_one_method_are_two_paths(tmp_path):
    swept = [(f"s/t-{t}", f"SST soft, t = {t}", 1.0) for t in (3, 5)]
    found = loaded(tmp_path, *swept, *((f"a-{alpha}", "SST soft", alpha) for alpha in (1.0, 1.2)))
    assert [path for path, _ in found] == ["SST soft", "SST soft", "SST soft over t", "SST soft over t"]


def test_a_sweep_at_another_alpha_says_so(tmp_path):
    found = loaded(tmp_path, ("1", "Ties, combine.density = 0.3", 0.5), ("2", "Ties, combine.density = 0.1", 0.5))
    path = "Ties, α = 0.5"
    labels = [f"{path}, combine.density = {density}" for density in (0.1, 0.3)]
    assert found == [(f"{path} over combine.density", label) for label in labels]


@pytest.mark.parametrize(
    "models",
    [
        [("1", "SST soft, t = 3", 1.0), ("2", "SST soft, t = 5", 0.5)],  # strengths differ: paths along alpha
        [("1", "SST soft, t = 3", 1.0)],  # one value
        [("1", "SST soft, rho = 0.1, t = 3", 1.0), ("2", "SST soft, rho = 0.2, t = 5", 1.0)],  # two options
        [("1", "SST soft, t = 3", 1.0), ("2", "SST relearn, t = 5", 1.0)],  # another method
    ],
)
def test_other_sweeps_have_a_path_along_alpha_for_each_value(tmp_path, models):
    found = loaded(tmp_path, *models)
    assert sorted(found) == sorted((method, f"{method}, α = {alpha:g}") for _, method, alpha in models)


def test_what_a_merge_writes_is_read_back():
    point = next(iter(variants(Sst(), TaskArithmetic(), {"t": [0.1 + 0.2]})))
    assert swept_once(f"SST soft, {point.label}") == ("SST soft", "t", 0.1 + 0.2)
    assert swept_once("SST soft, t = 1e-05") == ("SST soft", "t", 1e-5)
    assert swept_once("SST soft") is swept_once("of another tool, mode = fast") is None


def test_merges_of_one_method_and_other_adapters_or_settings_are_paths_of_their_own(tmp_path):
    """Other experts, weights, settings of the combination, Fisher files or forms make other models."""

    def merged(folder, t, alpha, **more):
        manifest = {
            "kind": "merge",
            "method": f"Sst, t = {t}",
            "alpha": alpha,
            "settings": {"filter": "soft", "t": t},
            "combine": {"method": "Ties", "settings": {"density": 0.2}},
            "utility": [{"sha256": "u", "weight": 1.0}],
            "safety": {"sha256": "s"},
            "fisher": [{"sha256": "f"}],
            "flags": {"rank": None, "energy": None},
        }
        name = f"out/{folder}/t-{t}/alpha-{alpha}"
        return {"name": name, "adapter": name, "manifest": manifest | more, "suites": {}}

    def read(*models):
        (tmp_path / "metrics.json").write_text(json.dumps({"models": models}))
        return load_results(tmp_path)

    same = [merged("a", t, alpha) for t in (5, 10) for alpha in (0.5, 1.0)]
    assert {one.path for one in read(*same)} == {"Sst, t = 5", "Sst, t = 10"}
    others = [
        {"utility": [{"sha256": "v", "weight": 1.0}]},
        {"utility": [{"sha256": "u", "weight": 0.5}]},
        {"safety": {"sha256": "r"}},
        {"fisher": [{"sha256": "g"}]},
        {"settings": {"filter": "topk", "t": 5}},
        {"combine": {"method": "Ties", "settings": {"density": 0.3}}},
        {"flags": {"rank": 4, "energy": None}},
    ]
    for other in others:
        found = read(*same, merged("b", 5, 0.5, **other))
        assert {one.path for one in found} == {"Sst (out/a), t = 5", "Sst (out/a), t = 10", "Sst (out/b), t = 5"}
        assert len({one.label for one in found}) == 5
    (low, _), (high, _) = [(merged("b", t, 1.0, fisher=[]), t) for t in (-0.5, 0.5)]
    names = {one.method.partition(", t = ")[0] for one in read(*same, low, high)}
    assert names == {"Sst (out/a)", "Sst (out/b)"}  # a folder of a negative value is one of a point, too
