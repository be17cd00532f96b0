"""Render a results document: compact tables for a terminal, one self-contained HTML page for a reviewer.

Both are rendered only from the document of `pnp_trt.bench.results`. The page needs no network and runs no script: its
charts are inline SVG whose colours are CSS variables, its images are data URIs, and its raw numbers are a download.
"""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...bundle.store import write_text
from ...sampling.methods import uses_guidance
from . import tables
from .charts import Chart, page_colours
from .charts_bars import compute_chart, latency_charts, roofline_charts
from .charts_fidelity import pareto_charts, scale_charts
from .charts_serving import serving_charts
from .findings import headlines, sentences, serving_sentences, time_sentences
from .terminal import render_terminal
from .words import method_legend, three_digits

__all__ = ["render_html", "render_terminal", "sentences"]

#: text that identifies a page
PAGE_MARK = b"<title>pnp-trt bench"
TEMPLATE = "report.html.j2"
UNIT_NOTE = (
    "MACs are multiply-accumulates of one forward at batch 1; one MAC is two floating-point operations. "
    "Convolutions and linear layers are in both columns, the attention products (queries × keys, probabilities × "
    "values) only where named. M is 10⁶, G is 10⁹, T is 10¹²."
)
PAPER_NOTE = (
    "The paper (Hsiao et al., CVPR 2024) prints 338.7 for the teacher, + 116.5 for its full and + 7.79 for its tiny "
    "guide, and 677.5 for CFG, labelled “FLOPs, trillion”. Counted on the SD 1.x U-Net, those are giga-MACs per "
    "step without the attention products: 338.61 without them, 401.64 with. Compare them with the column “without "
    "attention”. The paper does not publish its tiny guide's architecture; the tiny guide here is this project's own."
)


def render_html(doc: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Write the report of `doc` atomically as one HTML file at `path`, and return the path."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["unbroken"] = _unbroken
    environment.filters["safe_chart"] = _safe
    raw = json.dumps(doc, ensure_ascii=False, indent=1).encode()
    page = environment.get_template(TEMPLATE).render(
        doc=doc,
        headlines=headlines(doc),
        sentences=[*time_sentences(doc), *serving_sentences(doc)],
        images=_images(doc["images"]),
        pareto=pareto_charts(doc),
        scales=scale_charts(doc),
        fidelity=tables.fidelity_table(doc),
        latency_charts=latency_charts(doc),
        roofline_charts=roofline_charts(doc),
        latency=tables.latency_table(doc),
        compute_chart=compute_chart(doc),
        cost=tables.cost_table(doc),
        published=tables.published_table(doc),
        methods=tables.method_table(doc),
        engines=tables.engine_table(doc),
        cold=tables.cold_table(doc),
        serving=tables.serving_table(doc),
        serving_charts=serving_charts(doc),
        serving_setting=_serving(doc),
        left_out=tables.left_out_table(doc),
        method_colours=list(page_colours().items()),
        method_legend=_legend(doc),
        unit_note=UNIT_NOTE,
        paper_note=PAPER_NOTE,
        image_includes=[name for row in doc["methods_cost"][:1] for name in row.get("image_includes", [])],
        boundary=next((row["boundary"] for row in doc["latency"] if row.get("boundary")), None),
        timing=_timing(doc),
        peaks=_peaks(doc["device"]),
        commands=_commands(doc),
        provenance=_provenance_pairs(doc["provenance"]),
        settings=_settings_pairs(doc["settings"]),
        raw="data:application/json;base64," + base64.b64encode(raw).decode(),
    )
    target = Path(path)
    write_text(page, target)
    return target


def _safe(chart: Chart) -> Any:
    import markupsafe

    return markupsafe.Markup(chart.svg)  # drawn by matplotlib, which escapes every label


def _unbroken(text: str) -> str:
    """Keep an interval such as "0.53–0.56" on one line."""
    return re.sub(r"(?<=\d)–(?=\d)", "\N{WORD JOINER}–\N{WORD JOINER}", text)


def _images(images: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the grid grouped by w, that of the first row first; each image has a data URI and a description.

    Images without guidance have no w and are in the first group.
    """
    if images is None:
        return None
    first = next((row["guidance"] for row in images["rows"] if row.get("guidance") is not None), None)
    groups: dict[Any, list[dict[str, Any]]] = {first: []}
    for row in images["rows"]:
        description = " ".join(row["label"].split())
        shown = [
            {"uri": f"data:image/png;base64,{png}", "alt": f"{description}: {column}"}
            for png, column in zip(row["png"], images["columns"], strict=False)
        ]
        w = first if row.get("guidance") is None or not uses_guidance(row.get("method", "")) else row["guidance"]
        groups.setdefault(w, []).append({"label": row["label"], "images": shown})
    titled = [("" if w is None else f"w = {w:g}", rows) for w, rows in groups.items()]
    return {"columns": images["columns"], "groups": titled, "caption": images["caption"]}


def _legend(doc: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Descriptions of the methods in the document, by short name."""
    methods = {row["method"] for part in ("latency", "fidelity", "methods_cost") for row in doc[part]}
    return [(name, description) for name, description in method_legend().items() if name in methods]


def _timing(doc: Mapping[str, Any]) -> str | None:
    rounds = sorted({row["rounds"] for row in doc["latency"] if "rounds" in row})
    warmup = sorted({row["warmup"] for row in doc["latency"] if "warmup" in row})
    if not rounds:
        return None
    return (
        f"{' or '.join(map(str, rounds))} rounds after {' or '.join(map(str, warmup)) or 'no'} warm-up runs of each "
        "case; every round runs each case once, in an order that rotates. The ratio to CFG is taken within each round, "
        "then the median over rounds; its interval is a seeded bootstrap over rounds."
    )


def _serving(doc: Mapping[str, Any]) -> str | None:
    """Describe the timing and the requests in sentences."""
    serving = next(iter(doc.get("serving") or ()), None)
    if serving is None:
        return None
    steps, w = (", ".join(f"{value:g}" for value in serving[key]) for key in ("steps", "guidance"))
    return (
        f"{serving['boundary']}. Each queue has {serving['requests']:,} requests of {steps} steps and w {w}, which "
        f"arrive one by one (Poisson) or {serving['burst']} at the same moment (bursts), at shares of the capacity of "
        f"step-level batching; a network call has up to {serving['slots']} rows."
    )


def _peaks(device: Mapping[str, Any] | None) -> str | None:
    """Describe the device's measured peaks in a sentence."""
    if device is None:
        return None
    peaks = [
        f"{three_digits(device[key] / 1e9)} {unit}"
        for key, unit in (("peak_macs_per_s", "G MACs/s"), ("peak_bytes_per_s", "GB/s"))
        if device.get(key) is not None
    ]
    if not peaks:
        return None
    return f"Measured peaks of this device ({device['name']}): {' and '.join(peaks)}. How: {device['how']}."


def _commands(doc: Mapping[str, Any]) -> list[str]:
    """Commands that repeat the run: check out the commit, if there is one, and run the same command."""
    commit = doc["provenance"].get("commit")
    return [*([f"git checkout {commit}"] if commit else []), doc["provenance"]["command"]]


def _settings_pairs(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    def text(value: Any) -> str:
        if isinstance(value, list):
            return ", ".join(map(text, value))
        if isinstance(value, dict):
            return "; ".join(
                f"{key.replace('_', ' ')}: {text(item)}" for key, item in value.items() if item is not None
            )
        return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)

    return [(key.replace("_", " "), text(value)) for key, value in settings.items() if value not in (None, [], "")]


def _provenance_pairs(provenance: Mapping[str, Any]) -> list[tuple[str, str]]:
    load = provenance.get("load_average")
    commit = provenance.get("commit")
    if commit and provenance.get("uncommitted_changes"):
        commit += " with uncommitted changes"
    cores = f"{provenance.get('cores')}"
    if provenance.get("usable_cores") not in (None, provenance.get("cores")):
        cores += f", {provenance['usable_cores']} usable"
    pairs = [
        ("Measured", str(provenance.get("date", "")).replace("T", " ").replace("+00:00", " UTC")),
        ("Processor", provenance.get("cpu")),
        ("Cores", cores),
        ("Accelerator", provenance.get("device") or "none"),
        ("Load average when written", " / ".join(f"{value:.2f}" for value in load) if load else None),
        ("Platform", provenance.get("platform")),
        ("pnp-trt", provenance.get("package")),
        ("Commit", commit),
        ("Python", provenance.get("python")),
        *provenance.get("packages", {}).items(),
    ]
    return [(str(name), str(value)) for name, value in pairs if value]
