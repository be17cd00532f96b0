"""Outputs of a results document: tables for a terminal, sentences, and a self-contained page."""

from __future__ import annotations

import base64
import io
import json
import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from pnp_trt.bench import results
from pnp_trt.bench.measure.latency import BOUNDARY
from pnp_trt.bench.metrics.definitions import KID, PSNR_TO_CFG_DB
from pnp_trt.bench.report import charts_bars, tables
from pnp_trt.bench.report import page as report
from pnp_trt.bench.report.charts_fidelity import pareto_charts, scale_charts
from pnp_trt.bench.report.fidelity_points import Point, compute_points, front, headline_w, latency_points
from pnp_trt.bench.report.words import estimate, interval, three_digits

from . import fake_document


@cache
def _made() -> str:
    return json.dumps(fake_document.make())


def make(**change: Any) -> dict[str, Any]:
    """Return the fake document; `change` replaces some of its keys."""
    return json.loads(_made()) | change


EMPTY = {key: [] for key in ("cost", "methods_cost", "published", "engines", "latency", "cold_start", "serving",
                             "fidelity", "left_out")} | {"images": None, "device": None}  # fmt: skip


def text_of(doc: dict[str, Any], width: int = 100) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(report.render_terminal(doc))
    return console.export_text()


class Page(HTMLParser):
    """Collects elements and text of a page, and checks that every element is closed."""

    VOID = frozenset({"meta", "link", "img", "br", "use", "path"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words)).replace("\N{WORD JOINER}", "")


def draw(doc: dict[str, Any], folder: Path) -> tuple[Page, str]:
    html = report.render_html(doc, folder / "report.html").read_text(encoding="utf-8")
    return Page(html), html


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, str]:
    return draw(make(), tmp_path_factory.mktemp("page"))


# ----------------------------------------------------------------------------------------------------- terminal


def test_terminal_tables_and_closing_sentences() -> None:
    text = text_of(make())
    assert re.search(r"teacher +step +859\.52 +401\.64 +338\.61", text)
    assert re.search(r"emoji-tiny +guided +20 +0\.53 \[0\.5\d, 0\.53\]", text)
    assert re.search(r"guided +20 +3 +20 +0\.108 \[0\.102, 0\.115\] +17 \[14, 20\] +21\.1 \[20\.6, 21\.7\]", text)
    assert re.search(
        r"teacher \+ full guide, per step +GMACs without attention +455\.2 +TFLOPs +455\.03 +−0\.04 %", text
    )
    assert "emoji-tiny: guided takes 0.52 of CFG's time per loop at batch 8" in text
    assert "guide-tiny: one guided step computes 51.0 % of CFG's MACs." in text
    assert re.search(r"energy per image +no NVIDIA GPU is here", text)
    assert "not evaluated" not in text
    assert "not evaluated in this run: --quick skips" in text_of(fake_document.make(quality=False)).replace("\n", " ")


@pytest.mark.parametrize("width", [100, 130])
def test_terminal_tables_show_every_figure_in_full(width: int) -> None:
    doc = make()
    lines = text_of(doc, width).splitlines()
    assert max(map(len, lines)) <= width
    for table in tables.terminal_tables(doc):
        for row in table.rows:
            figures = row[table.words :]
            assert any(all(one in line for one in figures) for line in lines), (table.title, row)


def test_a_narrow_terminal_shows_every_figure() -> None:
    assert "".join(text_of(make(), 60).split()).count("0.53") >= 2


def test_doubtful_results_are_qualified() -> None:
    row = next(row for row in make()["latency"] if row["method"] == "guided")
    row |= {"ratio_to_cfg": 0.98, "ratio_to_cfg_interval": [0.9, 1.05], "spread": 0.3}
    (sentence,) = report.sentences(make(latency=[row], methods_cost=[], serving=[]))
    assert "not a statistically significant difference" in sentence
    assert "the timing was noisy (interquartile range 30.0 % of the median)" in sentence


@pytest.mark.parametrize(("share", "said"), [(0.6, False), (1.0, False), (3.95, True), (None, False)])
def test_a_loop_that_is_faster_than_possible_is_explained(share: float | None, said: bool) -> None:
    row = make()["latency"][0] | {"share_of_least": share}
    sentences = report.sentences(make(latency=[row], methods_cost=[], serving=[]))
    assert any("the device was busy while its peaks were measured" in sentence for sentence in sentences) is said


def test_each_part_may_be_missing(tmp_path: Path) -> None:
    whole = make()
    for part in ({}, *({key: whole[key]} for key in EMPTY)):
        doc = make(**(EMPTY | part))
        text_of(doc)
        page, _ = draw(doc, tmp_path)
        assert page.open == []


def test_null_and_absent_values_are_a_dash() -> None:
    doc = make()
    row = {key: doc["latency"][0][key] for key in ("engine", "method", "batch", "steps", "p50_ms")}
    table = tables.latency_table(make(latency=[row | {"ratio_to_cfg": None}, doc["latency"][1]]))
    assert table is not None
    assert table.rows[0][:4] == ["emoji-teacher", "cfg", "1", "20"]
    assert set(table.rows[0][4:]) - {"–"} == {f"{row['p50_ms']:.1f}"}


def test_an_outlier_is_counted_and_does_not_squeeze_the_bars() -> None:
    doc = make()
    row = doc["latency"][0]
    before = charts_bars.latency_charts(doc)[0].svg
    row["raw"][0] = {**row["raw"][0], "loop_ms": 40 * row["p50_ms"]}
    after = charts_bars.latency_charts(doc)[0].svg
    assert f"1 up to {three_digits(40 * row['p50_ms'])}" in after
    assert " up to " not in before and len(after) < 1.1 * len(before)


def test_numbers_keep_their_significant_digits() -> None:
    assert [three_digits(x) for x in (0.52, 4, 12.04, 99.96, 1498.2, 0)] == [
        "0.520",
        "4.00",
        "12.0",
        "100.0",
        "1,498",
        "0",
    ]
    row = {"engine": "a", "method": "guided", "ratio_to_cfg_interval": [0.5201, 0.5239]}
    assert interval(row, 2) == "0.520–0.524"
    assert (
        estimate({"value": -0.0071, "low": -0.009, "high": 0.0, "count": 5}, 3, sign=True) == "−0.007 [−0.009, +0.000]"
    )


# ------------------------------------------------------------------------------------------------------- charts


def test_the_front_has_only_points_that_no_other_beats() -> None:
    def point(x: float, y: float) -> Point:
        return Point("e", "cfg", 1, x, y, y, y)

    points = [point(1, 5), point(2, 6), point(2, 4), point(3, 4), point(4, 1)]
    assert [(p.x, p.y) for p in front(points, KID)] == [(1, 5), (2, 4), (4, 1)]
    assert [(p.x, p.y) for p in front(points, PSNR_TO_CFG_DB)] == [(1, 5), (2, 6)]


def test_only_timed_points_have_a_time() -> None:
    doc = make()
    assert headline_w(doc) == 3.0
    times = {(p.method, p.steps): p.x for p in latency_points(doc, KID)}
    assert set(times) == {
        ("cfg", 20), ("unguided", 20), ("guided", 20), ("cfg-interval", 20), ("cfg-fewer-steps", 10),
        ("cfg", 8), ("unguided", 8), ("guided", 8), ("cfg-interval", 8), ("cfg-fewer-steps", 4),
    }  # fmt: skip  # the others were not timed
    timed = next(row for row in doc["latency"] if row["method"] == "guided")
    assert times["guided", 20] == timed["p50_ms_per_image"]
    ten = next(row for row in doc["fidelity"] if row["method"] == "cfg" and row["guidance"] == 3.0) | {"steps": 10}
    halved = make(fidelity=[*doc["fidelity"], ten])  # CFG with ten steps was timed as cfg-fewer-steps
    assert ("cfg", 10) in {(p.method, p.steps) for p in latency_points(halved, KID)}
    assert len(compute_points(doc, KID)) == 15


def test_two_methods_with_one_point_share_its_label() -> None:
    doc = make()
    row = next(row for row in doc["fidelity"] if row["method"] == "cfg" and row["guidance"] == 3.0)
    alone = [row | {"steps": 31}, row | {"steps": 33, "macs_per_image": 10**9}]
    both = [*alone, row | {"steps": 31, "method": "cfg-fewer-steps"}]
    for rows in (alone, both):
        (chart,) = pareto_charts(make(fidelity=rows, latency=[]))
        assert len(re.findall(r">31<", chart.svg)) == 1


def test_without_kid_psnr_is_plotted() -> None:
    doc = fake_document.make(quality=False)
    assert [chart.title.partition(",")[0] for chart in pareto_charts(doc)] == ["PSNR to CFG", "PSNR to CFG"]
    assert len(scale_charts(doc)) == 3
    assert pareto_charts(make(fidelity=[])) == []


# --------------------------------------------------------------------------------------------------------- HTML


def test_page_is_self_contained(drawn: tuple[Page, str]) -> None:
    page, html = drawn
    assert page.open == []
    assert not page.all("script")
    loads = [value for _, attributes in page.tags for key, value in attributes.items() if key in ("src", "href")]
    loads += [value for _, attributes in page.tags if (value := attributes.get("xlink:href"))]
    assert all(value is not None and value.startswith(("data:", "#")) for value in loads)
    assert "@import" not in html
    assert re.findall(r"url\((?!#)[^)]*\)", html) == []
    assert any(one.get("name") == "viewport" for one in page.all("meta"))
    assert "prefers-color-scheme: dark" in html


def test_page_shows_everything(drawn: tuple[Page, str]) -> None:
    page, html = drawn
    headings = ("Summary", "Fidelity against cost", "Images", "Fidelity", "Latency", "Cold start", "Serving", "Compute",
                "Engines", "Left out", "Reproduce")  # fmt: skip
    assert (len(page.all("h1")), len(page.all("h2"))) == (1, len(headings))
    for expected in (
        *headings, "0.52 ×", "51.0 %", "task_quality_evaluated: true", BOUNDARY, "pnp-trt bench --suite full",
        "338.61", "455.03", "giga-MACs", "this project's own", "61.3 G MACs/s", "tensorrt-rtx",
        "optimum is not installed", "files in the page cache", "0.104 [0.098, 0.110]",
    ):  # fmt: skip
        assert expected in page.text, expected
    assert "currentColor" in html
    assert "var(--guided)" in html
    assert not re.search(r"#0[123]0[123]0[1-9]\b|#000000\b", html), "a drawing colour was left in a chart"


def test_page_states_that_quality_was_not_evaluated(tmp_path: Path) -> None:
    doc = fake_document.make(quality=False)
    doc["settings"]["quick"] = True
    page, _ = draw(doc, tmp_path)
    assert "task_quality_evaluated: false" in page.text
    assert "--quick skips the images that KID needs" in page.text
    assert "A quick run" in page.text


def test_no_two_elements_share_an_id(drawn: tuple[Page, str]) -> None:
    page, html = drawn
    ids = [value for _, attributes in page.tags if (value := attributes.get("id"))]
    assert len(ids) == len(set(ids))
    used = {*re.findall(r"url\(#([^)]+)\)", html), *re.findall(r'href="#([^"]+)"', html)}
    assert used <= set(ids)


def test_raw_results_can_be_downloaded_from_the_page(tmp_path: Path) -> None:
    doc = make(**(EMPTY | {"cost": fake_document.COST}))
    page, _ = draw(doc, tmp_path)
    (link,) = [one for one in page.all("a") if one.get("download")]
    data = base64.b64decode(str(link["href"]).partition("base64,")[2])
    assert json.loads(data) == doc


def test_names_are_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>&\"'"
    doc = make()
    for part in ("latency", "engines", "cold_start", "serving", "fidelity"):
        for row in doc[part]:
            row["engine"] = evil + row["engine"]
    doc["cost"][0]["network"] = doc["left_out"][0]["why"] = doc["published"][0]["note"] = evil
    doc["images"]["columns"][0] = doc["images"]["rows"][0]["label"] = doc["images"]["caption"] = evil
    doc["provenance"]["command"] = doc["task_quality_reason"] = evil
    doc["settings"][evil] = evil
    page, html = draw(doc, tmp_path)
    assert "<script" not in html
    assert page.open == []
    assert evil in page.text


def test_images_of_other_scales_are_folded_away(drawn: tuple[Page, str]) -> None:
    page, html = drawn
    assert len(page.all("details")) == 1
    assert len(page.all("img")) == 4 * 8
    folded = html[html.index("<details>") : html.index("</details>")]
    assert "<summary>w = 8</summary>" in folded
    assert folded.count("<img") == 8


def test_images_are_embedded_side_by_side(tmp_path: Path) -> None:
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    rows = results.encode_images(
        [{"label": "teacher,\nCFG", "pixels": pixels}, {"label": "guided", "pixels": pixels[::-1]}]
    )
    strips = {"columns": ["red apple", "cat"], "rows": rows, "caption": "8 steps."}
    page, _ = draw(make(**(EMPTY | {"images": strips})), tmp_path)
    images = page.all("img")
    assert [one["alt"] for one in images] == [
        "teacher, CFG: red apple", "teacher, CFG: cat", "guided: red apple", "guided: cat",
    ]  # fmt: skip
    data = base64.b64decode(str(images[3]["src"]).partition("base64,")[2])
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), pixels[0])
