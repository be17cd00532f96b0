"""The results document (written whole, read with care, true to its schema) and what is drawn from it."""

from __future__ import annotations

import base64
import copy
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from pnp_trt.bench import report, results
from pnp_trt.bench.cost import method_rows
from pnp_trt.bench.latency import BOUNDARY, LatencyRow
from pnp_trt.errors import InputError, PnpError

COST = [
    {
        "network": "teacher",
        "parameters": 859_520_964,
        "macs": 401_640_000_000,
        "macs_without_attention": 338_610_000_000,
    },
    {"network": "guide-tiny", "parameters": 8_000_000, "macs": 7_900_000_000, "macs_without_attention": 7_500_000_000},
]


def latency_row(method: str, batch: int, ms: float, ratio: float | None, **change: Any) -> LatencyRow:
    values: dict[str, Any] = {
        "engine": "emoji-guided" if method == "guided" else "emoji",
        "method": method,
        "batch": batch,
        "steps": 8,
        "guidance": 3.0,
        "p50_ms": ms,
        "p90_ms": 1.1 * ms,
        "p99_ms": 1.2 * ms,
        "p50_ms_per_step": ms / 8,
        "p50_ms_per_picture": (ms + 5) / batch,
        "spread": 0.03,
        "encode_p50_ms": 2.0,
        "decode_p50_ms": 3.0,
        "ratio_to_cfg": ratio,
        "ratio_to_cfg_interval": None if ratio is None else (ratio - 0.01, ratio + 0.01),
        "ratio_reference": None if ratio is None else "emoji/cfg",
        "rounds": 3,
        "warmup": 1,
        "boundary": BOUNDARY,
        "raw": [
            {"round": i, "position": 0, "encode_ms": 2.0, "loop_ms": ms * (1 + i / 10), "decode_ms": 3.0}
            for i in range(3)
        ],
    }
    return LatencyRow(**(values | change))


def make(**change: Any) -> dict[str, Any]:
    latency = [
        latency_row(method, batch, ms * batch, ratio)
        for batch in (1, 4)
        for method, ms, ratio in (("cfg", 1000.0, 1.0), ("unguided", 500.0, 0.5), ("guided", 530.0, 0.53))
    ]
    values: dict[str, Any] = {"cost": COST, "methods_cost": method_rows(COST, steps=8), "latency": latency}
    return results.document(["pnp-trt", "bench", "--engine", "a b"], **(values | change))


def text_of(doc: dict[str, Any], width: int = 110) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(report.render_terminal(doc))
    return console.export_text()


class Page(HTMLParser):
    """Collects what the tests ask about, and checks that every element is closed."""

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
        return [attributes for found, attributes in self.tags if found == tag]

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words)).replace("\N{WORD JOINER}", "")


def draw(doc: dict[str, Any], folder: Path, pictures: report.PictureGrid | None = None) -> tuple[Page, str]:
    html = report.render_html(doc, folder / "report.html", pictures).read_text(encoding="utf-8")
    return Page(html), html


# ------------------------------------------------------------------------------------------------------ results


def test_document_matches_its_published_schema() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(results.SCHEMA_FILE.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(json.loads(json.dumps(make(fidelity=[{"kid": 0.4}], pictures={"seeds": [0]}))), schema)
    broken = make()
    del broken["latency"][0]["ratio_to_cfg"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(json.loads(json.dumps(broken)), schema)


def test_provenance_says_who_measured() -> None:
    found = make()["provenance"]
    assert found["command"] == "pnp-trt bench --engine 'a b'"
    assert found["date"].endswith("+00:00")
    assert found["packages"]["numpy"] == np.__version__
    assert found["cores"] >= 1
    assert found["cpu"]


def test_quality_is_only_evaluated_when_it_was() -> None:
    assert make()["task_quality_evaluated"] is False
    assert make(fidelity=[{"method": "guided", "kid": 0.4}])["task_quality_evaluated"] is True


def test_write_and_read_back(tmp_path: Path) -> None:
    doc = make()
    path = results.write(doc | {"settings": {"w": np.float32(3), "at": tmp_path}}, tmp_path / "new" / "bench.json")
    assert [entry.name for entry in path.parent.iterdir()] == ["bench.json"]
    again = results.read(path)
    assert again["latency"] == json.loads(json.dumps(doc["latency"]))
    assert again["settings"] == {"w": 3.0, "at": str(tmp_path)}


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = results.write(make(), tmp_path / "bench.json")
    before = path.read_bytes()
    with pytest.raises(PnpError, match="cannot be written"):
        results.write(make(settings={"w": float("nan")}), path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["bench.json"]


def test_unwritable_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        results.write(make(), tmp_path / "file" / "bench.json")


def test_cut_short_and_foreign_files_are_refused(tmp_path: Path) -> None:
    whole = results.write(make(), tmp_path / "bench.json").read_text(encoding="utf-8")
    path = tmp_path / "bad.json"
    doc = json.loads(whole)
    without_row_key = copy.deepcopy(doc)
    del without_row_key["cost"][1]["macs"]
    cases = {
        whole[: len(whole) // 2]: "not complete JSON .*cut short",
        "": "not complete JSON",
        "[]": "names no schema",
        json.dumps(doc | {"schema": "pnp-trt/bench/2"}): "'pnp-trt/bench/2', this version reads 'pnp-trt/bench/1'",
        json.dumps({key: value for key, value in doc.items() if key != "latency"}): "lacks the key 'latency'",
        json.dumps(doc | {"cost": {}}): "'cost' is a dict, not a list",
        json.dumps(without_row_key): "row 1 of 'cost' lacks macs",
    }
    for content, message in cases.items():
        path.write_text(content, encoding="utf-8")
        with pytest.raises(InputError, match=message):
            results.read(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not text"):
        results.read(path)
    with pytest.raises(InputError, match="cannot be read"):
        results.read(tmp_path / "absent.json")


# ----------------------------------------------------------------------------------------------------- terminal


def test_terminal_tables_and_closing_sentence() -> None:
    text = text_of(make())
    assert re.search(r"teacher +step +859\.5\d* +401\.64 +338\.61", text)
    assert re.search(r"emoji-guided +guided +4 +0\.530 +0\.520–0\.540", text)
    assert "emoji-guided: guided costs 0.53 of CFG's time per step at batch 4" in text
    assert "guide-tiny: one guided step computes 51.0 % of CFG's MACs." in text
    assert "was not evaluated" in text


def test_narrow_terminal_drops_no_figure() -> None:
    assert "".join(text_of(make(), 60).split()).count("0.53") >= 2


def test_doubtful_results_are_called_so() -> None:
    row = latency_row("guided", 1, 900.0, 0.98, ratio_to_cfg_interval=(0.9, 1.05), spread=0.3)
    (sentence,) = report.sentences(make(latency=[row], methods_cost=[], fidelity=[{"kid": 1.0}]))
    assert "no difference that this run can tell" in sentence
    assert "the timing was noisy (interquartile range 30.0 % of the median)" in sentence


def test_each_part_may_be_missing(tmp_path: Path) -> None:
    empty = {"cost": [], "methods_cost": [], "latency": [], "fidelity": []}
    for part in ({}, {"cost": COST}, {"latency": [latency_row("guided", 1, 5.0, None)]}, {"fidelity": [{"kid": 0.5}]}):
        doc = make(**(empty | part))
        text_of(doc)
        page, _ = draw(doc, tmp_path)
        assert page.open == []


# --------------------------------------------------------------------------------------------------------- HTML


def test_page_is_self_contained(tmp_path: Path) -> None:
    page, html = draw(make(), tmp_path)
    assert page.open == []
    assert not page.all("script")
    loads = [value for _, attributes in page.tags for key, value in attributes.items() if key in ("src", "href")]
    loads += [value for _, attributes in page.tags if (value := attributes.get("xlink:href"))]
    assert all(value is not None and value.startswith(("data:", "#")) for value in loads)
    assert "@import" not in html
    assert re.findall(r"url\((?!#)[^)]*\)", html) == []
    assert any(one.get("name") == "viewport" for one in page.all("meta"))
    assert "prefers-color-scheme: dark" in html


def test_page_shows_everything(tmp_path: Path) -> None:
    page, html = draw(make(), tmp_path)
    assert [len(page.all(tag)) for tag in ("h1", "h2")] == [1, 5]
    assert len(page.all("svg")) == 3  # latency at two batch sizes, compute
    for wanted in (
        "0.53 ×",
        "51.0 %",
        "task_quality_evaluated: false",
        BOUNDARY,
        "pnp-trt bench --engine 'a b'",
        "338.61",
        "giga-MACs",
        "this project's own",
        "95 % interval 0.52–0.54",
    ):
        assert wanted in page.text, wanted
    assert "currentColor" in html
    assert "var(--guided)" in html
    assert not re.search(r"#0[123]0[123]0[1234]\b", html), "a drawing colour was left in a chart"


def test_no_two_elements_share_an_id(tmp_path: Path) -> None:
    page, html = draw(make(), tmp_path)
    ids = [value for _, attributes in page.tags if (value := attributes.get("id"))]
    assert len(ids) == len(set(ids))
    used = {*re.findall(r"url\(#([^)]+)\)", html), *re.findall(r'href="#([^"]+)"', html)}
    assert used <= set(ids)


def test_raw_results_can_be_downloaded_from_the_page(tmp_path: Path) -> None:
    doc = make()
    page, _ = draw(doc, tmp_path)
    (link,) = [one for one in page.all("a") if one.get("download")]
    held = base64.b64decode(str(link["href"]).partition("base64,")[2])
    assert json.loads(held) == json.loads(json.dumps(doc))


def test_names_are_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>&"
    rows = [latency_row("cfg", 1, 5.0, 1.0, engine=evil), latency_row("guided", 1, 3.0, 0.6, engine=evil + "2")]
    grid = report.PictureGrid([evil], [(evil, np.zeros((1, 8, 8, 3), np.uint8))], evil)
    doc = make(latency=rows, cost=[COST[0] | {"network": evil}, *COST], fidelity=[{"method": evil}])
    doc["provenance"]["command"] = evil
    page, html = draw(doc, tmp_path, grid)
    assert "<script" not in html
    assert page.open == []
    assert evil in page.text


def test_pictures_are_embedded_side_by_side(tmp_path: Path) -> None:
    from io import BytesIO

    from PIL import Image

    pictures = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    grid = report.PictureGrid(
        ["red apple", "cat"], [("teacher, CFG", pictures), ("guided", pictures[::-1])], "8 steps."
    )
    page, _ = draw(make(), tmp_path, grid)
    images = page.all("img")
    assert [one["alt"] for one in images] == [
        "teacher, CFG: red apple",
        "teacher, CFG: cat",
        "guided: red apple",
        "guided: cat",
    ]
    held = base64.b64decode(str(images[3]["src"]).partition("base64,")[2])
    assert np.array_equal(np.asarray(Image.open(BytesIO(held))), pictures[0])


def test_wrong_pictures_are_refused() -> None:
    with pytest.raises(InputError, match="must be uint8"):
        report.PictureGrid(["a"], [("guided", np.zeros((1, 8, 8, 3)))])
    with pytest.raises(InputError, match="2 pictures for 1 columns"):
        report.PictureGrid(["a"], [("guided", np.zeros((2, 8, 8, 3), np.uint8))])


def test_fidelity_rows_show_values_with_intervals(tmp_path: Path) -> None:
    rows = [{"method": "guided", "kid": {"value": 0.41, "low": 0.38, "high": 0.44, "count": 400}, "curve": [1, 2]}]
    page, _ = draw(make(fidelity=rows), tmp_path)
    assert "0.410 [0.380, 0.440]" in page.text
    assert "task_quality_evaluated: true" in page.text
