"""The page of a study: its content by an HTML parser, and its behaviour in a real browser where one is installed."""

import csv
import json
import re
import shutil
from html.parser import HTMLParser

import pytest

from src.errors import InputError
from src.report.html import page, tables_csv, write_report
from src.report.html_axes import log_ticks, ticks
from src.report.html_fronts import GREY, MARKS, REFERENCE_MARKS, _styles, mark
from src.report.html_pencil import pencil_tables
from src.report.html_png import series_style
from src.report.html_tables import p_value, shown

VOID = {"meta", "link", "br", "line", "circle", "polyline", "polygon", "path", "rect"}


def number(value, half=0.05, n=100):
    return {"value": value, "low": value - half, "high": value + half, "n": n}


def axis(label, better):
    return {"measure": label, "label": label, "better": better}


def document():
    """A study's document with every kind of part; its numbers are only here to be found again."""
    columns = [{"key": "model", "label": "model", "better": None}, {"key": "r", "label": "refusal", "better": "higher"}]
    rows = [
        {"model": "base", "r": number(0.125)},
        {"model": "A <b>", "r": number(0.875)},
        {"model": "B", "r": number(0.375)},
        {"model": "C", "r": "undefined"},
        {"model": "D"},
    ]
    points = [{"model": f"A @ {x:g}", "x": number(x), "y": number(1 - x * x)} for x in (0.25, 0.5, 0.75)]
    series = [{"name": "A <b>", "points": points}, {"name": "one", "points": points[:1]}]
    front = {"title": "Front", "x": axis("refusal", "higher"), "y": axis("NLL", "lower"), "series": series}
    answers = [{"model": "base", "answer": "Sure & <script>alert(1)</script>"}, {"model": "B", "answer": ""}]
    return {
        "title": "A study & more",
        "summary": ["A beats B on refusal."],
        "notes": ["C is left out."],
        "fronts": [front, front | {"series": []}],
        "tables": [
            {"title": "Scores", "note": "n is 100.", "columns": columns, "rows": rows, "best": {"r": 1}},
            {"title": "Empty", "note": "", "columns": columns, "rows": [], "best": {}},
        ],
        "examples": [
            {"suite": "advbench", "kind": "harmful", "prompt": "Do harm </details>", "answers": answers},
            {"suite": "xstest", "kind": "borderline", "prompt": "Kill a process", "answers": answers},
        ],
        "provenance": {
            "asked": {"name": "s"},
            "versions": {"torch": "2"},
            "source": "abc",
            "cells": [{"key": "k", "stage": "fit", "label": "utility", "command": ["python", "-m", "src", "fit"]}],
        },
    }


def pencil(**changes):
    """A merge with an unseen rest, a cut, a module that keeps more than its norm, and one that has nothing to keep."""
    found = {
        "dim": 100,
        "complement_eigenvalue": 0.5,
        "directions_kept": 3,
        "effective_rank": 2.5,
        "patch_norm_kept": 0.75,
        "spectrum": {"rank": [1, 2, 5, 9], "value": [1000.0, 12.5, 0.25, 0.0]},
        "curve": {
            "position": [0.0, 0.5, 1.0],
            "safety_energy_kept": [0.0, 0.875, 1.0],
            "utility_tax_kept": [0, 0.3, 1],
        },
        "held_out": {"safety_energy_kept": 0.9, "utility_tax_kept": 0.4},
        "map": {
            "layers": [-1, 0, 1],
            "modules": ["attn.q<b>", "mlp.up", "head"],
            "kept": [[None, None, 0.5], [0.25, 1.25, None], [0.125, None, None]],
        },
    }
    entry = {"model": "A <b> @ 1", "seed": 0, "seeds": 3, "cell": "k", "pencil": found}
    return entry | {"pencil": found | changes}


def with_pencils():
    return document() | {"pencils": [pencil(), pencil() | {"pencil": None, "cell": "older"}]}


class Page(HTMLParser):
    """Tags with attributes, text by tag, and whether every tag is closed where it should be."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.open, self.balanced = [], [], [], True
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        self.balanced &= bool(self.open) and self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def parsed():
    return Page(page(document()))


def test_the_page_is_well_formed_and_takes_nothing_from_outside(parsed):
    assert parsed.balanced
    assert parsed.open == []
    for _, attributes in parsed.tags:
        for key in ("src", "href", "srcset", "action", "data", "poster", "xlink:href"):
            assert attributes.get(key, "data:,").startswith("data:,")
    text = page(document())
    assert not re.search(r"https?://|@import|url\(", text)


def test_text_from_models_and_names_is_never_markup(parsed):
    assert len(parsed.all("script")) == 2
    assert "b" not in {tag for tag, _ in parsed.tags}
    assert any("<script>alert(1)</script>" in text for tag, text in parsed.texts if tag == "p")


def test_an_answer_cannot_hide_the_end_of_the_embedded_numbers():
    """After ``<!-- <script>`` a browser looks for two ends of a script."""
    given = document()
    given["examples"][0]["answers"][0]["answer"] = "<!-- <script> & </script>"
    (embedded,) = [text for tag, text in Page(page(given)).texts if tag == "script" and text.startswith("{")]
    assert "<" not in embedded
    assert json.loads(embedded) == given


@pytest.mark.parametrize(
    ("value", "text"),
    [(16000.0, "16000"), (1234567.8, "1234568"), (-20480.4, "−20480"), (999.96, "1000"), (0.12345, "0.1235"), (7, "7")],
)
def test_large_numbers_are_written_out_and_sorted_as_numbers(value, text):
    assert shown(value) == (text, repr(float(value)))


def test_p_values_and_signs_are_written_as_people_write_them():
    assert [p_value(p)[0] for p in (9e-5, 0.0012, 1.0)] == ["&lt; 0.001", "0.001", "1.000"]
    assert p_value(9e-5)[1] == "9e-05"
    text, key = shown({"value": -0.0001, "low": -0.25, "high": 0.0004, "n": 3})
    assert text == '<span title="n = 3">0.000 <span class=interval>[−0.250, 0.000]</span></span>'
    assert key == "-0.0001"


def test_forty_two_methods_look_different_and_their_points_are_not_hidden_from_readers(parsed):
    names = [{"name": str(i)} for i in range(42)]
    references = [{"name": name, "role": "reference"} for name in ("base", "utility", "safety")]
    styles = _styles([*references, *names])
    assert len(set(styles)) == 45
    assert len({mark(shape, 0, 0) for _, shape in styles}) == len(MARKS) + len(REFERENCE_MARKS)
    assert {colour for colour, _ in styles[:3]} == {GREY}
    assert GREY not in {colour for colour, _ in styles[3:]}
    (front,) = [one for one in parsed.all("svg") if one.get("class") == "front"]
    assert front["role"] == "group"  # the parts of an img are not read out


def test_the_page_holds_the_numbers_of_the_json(parsed):
    (embedded,) = [text for tag, text in parsed.texts if tag == "script" and text.startswith("{")]
    assert json.loads(embedded) == document()
    cells = [attributes["data-sort"] for attributes in parsed.all("td")]
    assert cells == ["", "0.125", "", "0.875", "", "0.375", "", "", "", ""]
    tips = [attributes["data-tip"] for attributes in parsed.all("g") if "data-tip" in attributes]
    assert len(tips) == 4
    assert tips[1] == "A @ 0.5: refusal 0.500 [0.450, 0.550], n = 100; NLL 0.750 [0.700, 0.800], n = 100"


def tips_of(entry):
    text = page(document() | {"fronts": [], "pencils": [entry]})
    return [one["data-tip"] for one in Page(text).all("g") if "data-tip" in one]


def test_the_pencil_says_every_number_on_hover():
    tips = tips_of(pencil())
    assert tips[:3] == ["rank 1: λ = 1000", "rank 2: λ = 12.5", "rank 5: λ = 0.25"]
    assert tips[4] == "largest λ, cut at 0.50: safety energy 0.875, utility energy 0.300"
    assert tips[6] == "this merge: safety energy 0.900, utility energy 0.400"
    assert tips[9] == "head: 0.500 kept"
    assert tips[10:12] == ["layer 0, attn.q<b>: 0.250 kept", "layer 0, mlp.up: 1.250 kept"]
    assert tips[14] == "layer 1, mlp.up: nothing to keep"
    assert len(tips) == 3 + 3 + 1 + 9


def test_a_relearned_patch_is_not_said_to_be_kept():
    entry = pencil(dim=None, spectrum=None, curve=None, effective_rank=None, patch_norm_kept=2.9)
    text = page(document() | {"fronts": [], "pencils": [entry]})
    assert "This merge has 2.9 times the safety patch&#x27;s norm; on held-out rows" in text
    assert "Norm kept" not in text
    assert "norm kept" not in text
    assert "Re-learned patch, layer by module" in text
    assert "layer 0, mlp.up: 1.250 times the safety patch's norm" in tips_of(entry)
    named = {row["what"] for row in pencil_tables([entry])[0]["rows"]}
    assert "norm over that of the safety patch, of mlp.up, layer 0" in named
    assert not any(name.startswith("kept of") for name in named)
    assert "Norm kept over norm of the patch, layer by module" in page(with_pencils())


def test_the_map_is_darkest_where_most_was_kept_and_a_plot_is_one_stop_of_the_tab_key():
    found = Page(page(with_pencils()))
    assert found.balanced
    assert "b" not in {tag for tag, _ in found.tags}
    tiles = [one.get("fill-opacity") for one in found.all("rect")][:9]
    assert tiles == [None, None, "0.4", "0.2", "1.0", None, "0.1", None, None]
    stops = [one["tabindex"] for one in found.all("g") if one.get("class") == "point"][4:]
    assert stops == ["0", "-1", "-1"] * 2 + ["0"] + ["0"] + ["-1"] * 8


def test_a_cell_without_a_pencil_says_so_plainly():
    said = " ".join(text for tag, text in Page(page(with_pencils())).texts if tag == "p")
    assert "The result of this merge (cell older) holds no spectrum and no map, so none is shown." in said
    assert "kept 0.75 of the patch's norm; on held-out rows 0.9 of its safety energy" in said
    assert "The first of 3 seeds is shown." in said
    bare = pencil(spectrum=None, curve=None, held_out=None, effective_rank=None)
    said = " ".join(text for tag, text in Page(page(document() | {"pencils": [bare]})).texts if tag == "p")
    assert "Its result holds no spectrum and no held-out energies." in said
    assert len(tips_of(bare)) == 9


def test_an_older_study_without_pencils_still_has_its_page():
    assert "Spectrum" not in page(document())


def test_the_numbers_of_the_pencil_are_in_the_csv(tmp_path):
    (tmp_path / "study.json").write_text(json.dumps(with_pencils()))
    write_report(tmp_path)
    text = (tmp_path / "tables.csv").read_text(encoding="utf-8")
    lines = {row[1].partition(": ")[2]: row[3] for row in csv.reader(text.splitlines())}
    assert lines["λ at rank 2"] == "12.5"
    assert lines["held-out utility tax kept, cut at 0.500"] == "0.3"
    assert lines["kept of mlp.up, layer 0"] == "1.25"
    assert lines["kept of head"] == "0.5"


@pytest.mark.parametrize(
    ("ends", "texts"),
    [((-2.5, 1.2), ["10⁻²", "10⁻¹", "10⁰", "10¹"]), ((0.1, 1.4), ["2", "5", "10", "20"]), ((0.01, 0.02), None)],
)
def test_ticks_of_a_logarithmic_axis_lie_inside_and_are_never_too_few(ends, texts):
    found = log_ticks(ends)
    assert texts is None or [text for _, text in found] == texts
    assert 2 <= len(found) <= 8
    assert all(ends[0] <= place <= ends[1] for place, _ in found)
    assert len(log_ticks((-40.0, 3.0))) <= 8


def test_only_what_is_significant_is_bold(parsed):
    assert len(parsed.all("strong")) == 1
    text = page(document() | {"tables": [document()["tables"][0] | {"best": {}}]})
    assert Page(text).all("strong") == []


def test_harmful_prompts_are_folded_and_others_are_not(parsed):
    folds = parsed.all("details")
    assert [("open" in one) for one in folds[:2]] == [False, True]
    assert folds[0]["class"] == "harmful"


def test_of_many_prompts_of_a_kind_the_first_is_shown():
    kinds = ["utility", "harmful", "utility", "borderline", "borderline"]
    asked = [{"suite": f"s{i}", "kind": kind, "prompt": "p", "answers": []} for i, kind in enumerate(kinds)]
    folds = Page(page(document() | {"examples": asked})).all("details")
    assert [("open" in one) for one in folds[:5]] == [True, False, False, True, False]


def test_empty_tables_and_fronts_leave_no_trace(parsed):
    sections = [attributes.get("id") for attributes in parsed.all("section")]
    assert sections == ["front0", "table0", "examples", "provenance"]


def test_the_csv_holds_the_same_numbers():
    lines = list(csv.reader(tables_csv(document()["tables"]).splitlines()))
    assert lines[0] == ["table", "row", "column", "value", "low", "high", "n"]
    assert lines[2][:4] == ["Scores", "1: A <b>", "refusal", "0.875"]
    assert lines[4][3:] == ["undefined", "", "", ""]


def test_a_report_is_written_from_the_json_alone(tmp_path):
    (tmp_path / "study.json").write_text(json.dumps(document()))
    write_report(tmp_path)
    assert (tmp_path / "index.html").read_text(encoding="utf-8") == page(document())
    assert (tmp_path / "fronts.png").read_bytes().startswith(b"\x89PNG")
    front = document()["fronts"][0]
    points = [{key: point[key] for key in ("model", "x", "y")} for line in front["series"] for point in line["points"]]
    columns = [{"key": "model", "label": "model"}, *({"key": key, "label": front[key]["label"]} for key in "xy")]
    tables = [*document()["tables"], {"title": front["title"], "columns": columns, "rows": points}]
    assert (tmp_path / "tables.csv").read_text(encoding="utf-8") == tables_csv(tables)
    assert len(points) == 4
    with pytest.raises(InputError, match="expected a study"):
        write_report(tmp_path / "nowhere")


@pytest.mark.parametrize("ends", [(0.0, 1.0), (-0.03, 0.07), (2.0, 30.0), (0.5, 0.5001)])
def test_ticks_are_few_and_inside(ends):
    found = ticks(ends)
    assert 2 <= len(found) <= 8
    assert all(ends[0] <= value <= ends[1] for value in found)


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, two):
    high, low = sorted((luminance(one), luminance(two)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_colours_have_enough_contrast_in_light_and_dark():
    from src.report.html_style import STYLE

    light, dark = STYLE.split("@media (prefers-color-scheme:dark)")[0:2]
    for text in (light, dark.split("*{")[0]):
        found = dict(re.findall(r"--(\w+):(#[0-9a-f]{3,6})", text))
        full = {k: v if len(v) == 7 else "#" + "".join(2 * c for c in v[1:]) for k, v in found.items()}
        for key in ("fg", "soft", "link", *(f"c{i}" for i in range(8))):
            assert contrast(full[key], full["bg"]) >= 4.5, key
            assert key.startswith("c") or contrast(full[key], full["raise"]) >= 4.5, key


def browser():
    """A page of headless Chromium through Playwright or Selenium; a reason where there is none."""
    sync = pytest.importorskip("playwright.sync_api", reason="needs Playwright and Debian's chromium")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no chromium is installed")
    return sync, path


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_works_in_a_browser(tmp_path, width, scheme):
    sync, path = browser()
    (tmp_path / "study.json").write_text(json.dumps(with_pencils()))
    write_report(tmp_path)
    with sync.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=path, args=["--no-sandbox"])
        shown = chromium.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        problems, asked = [], []
        shown.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        shown.on("pageerror", lambda error: problems.append(str(error)))
        shown.on("request", lambda request: asked.append(request.url))
        shown.goto((tmp_path / "index.html").as_uri())
        assert shown.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        heads = shown.locator("#table0 th button")
        heads.nth(1).focus()
        shown.keyboard.press("Enter")
        first = [row.split("\t")[0].split("\n")[0] for row in shown.locator("#table0 tbody tr").all_inner_texts()]
        assert first[:3] == ["base", "B", "A <b>"]
        heads.nth(1).click()
        assert shown.locator("#table0 tbody td").first.inner_text() == "A <b>"
        shown.locator(".point").nth(1).focus()
        assert "A @ 0.5: refusal 0.500" in shown.locator("#tip").inner_text()
        shown.locator(".point").nth(2).hover()
        assert "A @ 0.75" in shown.locator("#tip").inner_text()
        shown.locator("#pencil0 .point").first.focus()
        pressed = [("Home", "rank 1: λ = 1000"), ("ArrowRight", "rank 2"), ("End", "rank 5"), ("Tab", "cut at 0.00")]
        for key, said in pressed:
            shown.keyboard.press(key)
            assert said in shown.locator("#tip").inner_text()
        shown.locator("#pencil0 .tile").nth(3).hover()
        assert "layer 0, attn.q<b>: 0.250 kept" in shown.locator("#tip").inner_text()
        shown.locator("#pencil0 .reached").last.locator(".point").first.focus()
        shown.keyboard.press("ArrowDown")
        assert "layer 0, attn.q<b>" in shown.locator("#tip").inner_text()
        assert not shown.locator("details.harmful .prompt").is_visible()
        shown.emulate_media(media="print")
        assert shown.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        chromium.close()
    assert problems == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []


def test_twenty_methods_of_the_picture_have_twenty_colours_and_sixty_look_different():
    styles = [series_style(number) for number in range(60)]
    assert len({style["color"] for style in styles[:20]}) == 20
    assert len({(style["color"], style["marker"]) for style in styles}) == 60
