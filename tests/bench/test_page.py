"""The page in a real browser, on a phone and on a desk, in light and dark."""

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
    """A run without KID and without a second batch."""
    browser.chromium()
    doc = fake_document.make(quality=False, batches=(1,), published=[])
    doc["settings"]["quick"] = True
    return report.render_html(doc, tmp_path_factory.mktemp("page") / "quick.html")


def test_the_console_stays_empty(page: Path, quick: Path) -> None:
    assert browser.console(page) == []
    assert browser.console(quick) == []


@pytest.mark.parametrize(("width", "dark"), [(360, False), (360, True), (1280, False), (1280, True)])
def test_every_figure_is_there_and_nothing_sticks_out(page: Path, width: int, dark: bool) -> None:
    found = browser.probe(page, width, dark=dark)
    assert found["width"] == width
    assert found["scroll"] <= width
    assert found["sticksOut"] == []
    assert {name: len(charts) for name, charts in found["figures"].items()} == FIGURES
    for charts in found["figures"].values():
        assert all(200 < w < width and h > 80 and title for w, h, title in charts)
    assert found["clipped"] == []
    assert found["overlaps"] == []
    assert found["blind"] == []
    red = int(found["background"].removeprefix("rgb(").partition(",")[0])
    assert (red < 60) == dark


def test_a_quick_run_has_its_figures_too(quick: Path) -> None:
    found = browser.probe(quick, 360)
    assert {name: len(charts) for name, charts in found["figures"].items()} == FIGURES | {
        "figure-latency": 2, "figure-roofline": 1,
    }  # fmt: skip
    assert "PSNR" in found["figures"]["figure-pareto"][0][2]
    assert (found["clipped"], found["overlaps"], found["sticksOut"]) == ([], [], [])


def test_the_probes_notice_what_is_wrong(page: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    wrong = '<img alt="far" src="https://example.invalid/a.png"><div style="width: 90rem">wide</div></main>'
    text = page.read_text(encoding="utf-8").replace("</main>", wrong)
    bad.write_text(text.replace(">cfg-interval<", ">cfg-interval-cfg-interval-cfg-interval<"), encoding="utf-8")
    assert any("example.invalid" in line for line in browser.console(bad))
    found = browser.probe(bad, 1280)
    assert found["scroll"] > 1280
    assert found["sticksOut"] == ["DIV."]
    assert found["blind"] == ["far"]
    assert found["clipped"]
