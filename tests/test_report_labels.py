"""Labels of the plot: beside their points, inside of the axes, and not on each other."""

from itertools import combinations

import pytest
from matplotlib import pyplot

from src.report.plot import plot_fronts
from src.report.results import ModelResult, Share


def result(name, method, alpha, refusal, over, accuracy):
    columns = {"refusal (harmful)": refusal, "over-refusal (borderline)": over, "accuracy (task)": accuracy}
    shares = {column: Share(value, max(0, value - 0.1), min(1, value + 0.1), 40) for column, value in columns.items()}
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
    """Figures that are drawn, kept open for a look."""
    drawn = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    yield drawn
    monkeypatch.undo()
    pyplot.close("all")


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
