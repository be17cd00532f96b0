"""Labels of figures may be any text: dollar signs, TeX, control characters, glyphs that no font has."""

from __future__ import annotations

import html
import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pnp_trt.bench.report.charts_bars import compute_chart, latency_charts, roofline_charts
from pnp_trt.bench.report.charts_fidelity import pareto_charts, scale_charts
from pnp_trt.visualize.maps import draw_maps
from pnp_trt.visualize.record import FeatureMap, Recording
from pnp_trt.visualize.run import VisualizeRequest, visualize
from pnp_trt.visualize.strength import draw_strength

from ..bench import fake_document

HOSTILE = [
    r"$\frac$",
    "$x^{$",
    "a $5 coin and a $10 note",
    r"\textbf{x} % # _ ^",
    "\x1b[2J\x00\n",
    "🧑‍🚀日本\ue000\U0010ffff",
]


def recording() -> Recording:
    layers = [FeatureMap("skip-0", 4, 8, 8, True), FeatureMap("mid", 4, 4, 4, True)]
    values = np.ones((1, 2, 2))
    maps = [[[np.ones((layer.height, layer.width), np.float32)] * 2 for layer in layers]]
    return Recording(
        [2.0], [900, 400], layers, values, values, values / 2, [0, 1], maps, [np.zeros((8, 8, 3), np.uint8)]
    )


@pytest.mark.parametrize("title", HOSTILE)
def test_any_title_is_drawn_as_text(title: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for image in (draw_maps(recording(), [0, 1], title), draw_strength(recording(), title)):
            assert image.dtype == np.uint8 and image.min() < 100


def test_a_pair_of_dollar_signs_is_not_a_formula() -> None:
    """In a formula, the dollar signs would not be drawn, so less ink would be used."""
    images = [draw_strength(recording(), text) for text in ("$aa$", "aa", r"\$aa\$")]
    assert all((images[0] != other).any() for other in images[1:])
    ink = [int((image[:40] < 128).sum()) for image in images]
    assert ink[0] > ink[1]


@pytest.mark.parametrize("name", [r"$\frac$", "$x^{$", "$5 or $10", r"\textbf{x}"])
def test_engine_names_are_drawn_as_text(name: str) -> None:
    document: dict[str, Any] = fake_document.make()
    engines = sorted({row["engine"] for part in ("latency", "fidelity") for row in document[part]})
    for part in ("latency", "fidelity"):
        for row in document[part]:
            row["engine"] = name + str(engines.index(row["engine"]))
    charts = [*latency_charts(document), *roofline_charts(document), *pareto_charts(document), *scale_charts(document)]
    charts += [chart] if (chart := compute_chart(document)) is not None else []
    written = "".join(re.findall(r"<text[^>]*>([^<]*)", "".join(chart.svg for chart in charts)))
    assert f"{name}0" in html.unescape(written)


def test_users_matplotlib_settings_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib as mpl

    monkeypatch.setitem(mpl.rcParams, "text.usetex", True)
    assert draw_strength(recording(), "$x^{$").shape[2] == 3
    assert mpl.rcParams["text.usetex"] is True


@pytest.mark.parametrize("prompt", ["x" * 100_000, "a " * 50_000, r"$\frac$"], ids=["word", "words", "formula"])
def test_prompts_of_any_length_are_visualized(prompt: str, micro_base: Path, micro_guide: Path, tmp_path: Path) -> None:
    result = visualize(VisualizeRequest(str(micro_guide), (prompt,), (2.0,), 2, str(micro_base), out=tmp_path))
    assert len(result.text) < 1500
    assert json.loads(result.files[2].read_text())["parameters"]["prompts"] == [prompt]
