"""The vertical axis of a front: what methods need, and far references as arrows on its edge."""

import re

import pytest

from src.report.front_scale import off_axis, off_axis_note, vertical_axis
from src.report.html_fronts import front_figure
from src.report.html_png import GREY, draw_fronts, series_styles


def number(value, half=0.05):
    return {"value": value, "low": value - half, "high": value + half, "n": 100}


def series(name, heights, role="method", half=0.05):
    points = [
        {"model": name if len(heights) == 1 else f"{name} @ {place}", "x": number(0.5), "y": number(height, half)}
        for place, height in enumerate(heights)
    ]
    return {"name": name, "role": role, "points": points}


def front(*lines):
    axes = {"x": {"label": "refusal", "better": "higher"}, "y": {"label": "NLL", "better": "lower"}}
    return {"title": "Front", "series": list(lines), **axes}


METHODS = (series("A", [2.0, 2.1]), series("ours", [1.95], role="ours"))


def test_a_far_reference_does_not_stretch_the_axis_and_is_named():
    shown = front(
        series("base", [2.2], "reference"), series("safety", [7.125], "reference"), series("low", [0.5], "reference")
    )
    shown["series"] += METHODS
    # Methods' intervals: 1.9 to 2.15; 2.2 is nearer than half of that span, its interval is shown whole.
    assert vertical_axis(shown) == pytest.approx((1.9 - 0.06 * 0.35, 2.25 + 0.06 * 0.35))
    assert off_axis(shown, vertical_axis(shown)) == ["safety 7.125", "low 0.500"]
    assert off_axis_note(shown, vertical_axis(shown)).endswith("by an arrow: safety 7.125, low 0.500.")


@pytest.mark.parametrize(
    "lines",
    [
        (series("base", [9.0], "reference"), series("safety", [1.0], "reference")),
        (series("base", [9.0], "reference"), series("A", [2.0], half=0.0)),
        (series("A", [9.0]), series("B", [2.0])),
    ],
    ids=["references alone", "methods of one value without interval", "a far method"],
)
def test_everything_is_shown_where_no_span_of_methods_says_what_is_far(lines):
    low, high = vertical_axis(front(*lines))
    heights = [point["y"] for line in lines for point in line["points"]]
    assert low < min(one["low"] for one in heights)
    assert high > max(one["high"] for one in heights)
    assert off_axis_note(front(*lines), (low, high)) == ""


def test_a_series_without_role_is_a_method():
    old = {key: value for key, value in series("A", [9.0]).items() if key != "role"}
    assert off_axis(front(old, series("B", [2.0])), vertical_axis(front(old, series("B", [2.0])))) == []


def test_the_page_puts_an_arrow_on_the_edge_with_the_true_value_and_no_whiskers():
    shown = front(series("safety", [7.125], "reference"), *METHODS)
    figure = front_figure(shown, "front0")
    far, *others = re.findall(r'<g class="point".*?</g>', figure)
    assert "NLL 7.125 [7.075, 7.175], n = 100" in far
    assert "whisker" not in far
    assert all("whisker" in other for other in others)
    assert "Beyond the axis, marked by an arrow: safety 7.125." in figure
    places = [float(y) for y in re.findall(r'(?:y[12]|cy|y)="([-\d.]+)"', figure)]
    height = float(re.search(r'viewBox="0 0 \d+ (\d+)"', figure)[1])
    assert all(0 <= place <= height for place in places)


def test_the_picture_has_grey_references_and_the_own_method_stands_out():
    lines = [series("base", [2.0], "reference"), *METHODS, series("utility", [2.0], "reference")]
    base, other, ours, utility = series_styles(lines)
    assert base["color"] == utility["color"] == GREY
    assert base["marker"] != utility["marker"]
    assert GREY not in (other["color"], ours["color"])
    assert ours["linewidth"] > other.get("linewidth", 1.2)


def test_the_picture_is_drawn_with_a_point_beyond_the_axis(tmp_path):
    near, far = tmp_path / "near.png", tmp_path / "far.png"
    draw_fronts([front(*METHODS)], near)
    draw_fronts([front(series("safety", [7.125], "reference"), *METHODS)], far)
    assert near.read_bytes()[:4] == far.read_bytes()[:4] == b"\x89PNG"
    assert near.read_bytes() != far.read_bytes()
