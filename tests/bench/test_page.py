"""The report page in a real browser, at phone and desktop widths, in light and dark."""

from __future__ import annotations

from pathlib import Path

import pytest

from pnp_trt.bench.report import page as report

from . import browser, fake_document

FIGURES = {
    "figure-pareto": 2, "figure-scales": 3, "figure-latency": 6, "figure-roofline": 2, "figure-compute": 1,
    "figure-serving": 6,
}  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    browser.chromium()
    return report.render_html(fake_document.make(), tmp_path_factory.mktemp("page") / "full.html")


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run without KID and with one batch size."""
    browser.chromium()
    doc = fake_document.make(quality=False, batches=(1,), published=[])
    doc["settings"]["quick"] = True
    return report.render_html(doc, tmp_path_factory.mktemp("page") / "quick.html")


def test_the_console_stays_empty(page: Path, quick: Path) -> None:
    assert browser.console(page) == []
    assert browser.console(quick) == []


@pytest.mark.parametrize(("width", "dark"), [(360, False), (360, True), (1280, False), (1280, True)])
def test_every_figure_is_shown_and_fits_the_page(page: Path, width: int, dark: bool) -> None:
    layout = browser.probe(page, width, dark=dark)
    assert layout["width"] == width
    assert layout["scroll"] <= width
    assert layout["sticksOut"] == []
    assert {name: len(charts) for name, charts in layout["figures"].items()} == FIGURES
    for charts in layout["figures"].values():
        assert all(200 < w < width and h > 80 and title for w, h, title in charts)
    assert layout["clipped"] == []
    assert layout["overlaps"] == []
    assert layout["blind"] == []
    red = int(layout["background"].removeprefix("rgb(").partition(",")[0])
    assert (red < 60) == dark


def test_a_quick_run_has_its_figures(quick: Path) -> None:
    layout = browser.probe(quick, 360)
    assert {name: len(charts) for name, charts in layout["figures"].items()} == FIGURES | {
        "figure-latency": 2, "figure-roofline": 1,
    }  # fmt: skip
    assert "PSNR" in layout["figures"]["figure-pareto"][0][2]
    assert (layout["clipped"], layout["overlaps"], layout["sticksOut"]) == ([], [], [])


def test_the_probes_detect_errors(page: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    wrong = '<img alt="far" src="https://example.invalid/a.png"><div style="width: 90rem">wide</div></main>'
    text = page.read_text(encoding="utf-8").replace("</main>", wrong)
    bad.write_text(text.replace(">cfg-interval<", ">cfg-interval-cfg-interval-cfg-interval<"), encoding="utf-8")
    assert any("example.invalid" in line for line in browser.console(bad))
    layout = browser.probe(bad, 1280)
    assert layout["scroll"] > 1280
    assert layout["sticksOut"] == ["DIV."]
    assert layout["blind"] == ["far"]
    assert layout["clipped"]
