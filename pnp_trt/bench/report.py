"""Draw a results document: compact tables for a terminal, one self-contained HTML page for a reviewer.

Both are drawn from the document of `pnp_trt.bench.results` alone. The page needs no network and runs no script: its
charts are inline SVG whose colours are CSS variables, its pictures are data URIs, its raw numbers a download.
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pnp_trt.artifacts import write_text
from pnp_trt.bench.charts import compute_chart, latency_charts
from pnp_trt.bench.tables import (
    cost_table,
    fidelity_table,
    interval,
    largest_batches,
    latency_table,
    method_table,
    percent,
    plural,
)
from pnp_trt.errors import InputError

if TYPE_CHECKING:
    from rich.console import RenderableType

TEMPLATE = "report.html.j2"
UNIT_NOTE = (
    "MACs are multiply-accumulates of one forward at batch 1; one MAC is two floating-point operations. "
    "Convolutions and linear layers are in both columns, the attention products (queries × keys, probabilities × "
    "values) only where named. M is 10⁶, G is 10⁹, T is 10¹²."
)
PAPER_NOTE = (
    "The paper (Hsiao et al., CVPR 2024) prints 338.7 for the teacher, + 116.5 for its full and + 7.79 for its tiny "
    "guide, and 677.5 for CFG, labelled “FLOPs, trillion”. Counted again on the SD 1.x U-Net, those are giga-MACs per "
    "step without the attention products: 338.61 without them, 401.64 with. Compare them with the column “without "
    "attention”. The paper does not publish its tiny guide's architecture; the tiny guide here is this project's own."
)
#: Interquartile range over median above which a latency is called noisy.
NOISY = 0.1


@dataclass(frozen=True)
class PictureGrid:
    """Pictures to show side by side, the same prompt and seed down each column.

    columns: a caption per column, usually the prompt.  rows: (label, pictures uint8 [N, H, W, 3]) from top to bottom,
    teacher CFG first.  caption: how they were made, in a sentence.
    """

    columns: Sequence[str]
    rows: Sequence[tuple[str, np.ndarray]]
    caption: str = ""

    def __post_init__(self) -> None:
        for label, pictures in self.rows:
            if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[-1] != 3:
                raise InputError(
                    f"The pictures of '{label}' must be uint8 [N, H, W, 3], got {pictures.dtype} {pictures.shape}."
                )
            if len(pictures) != len(self.columns):
                raise InputError(
                    f"'{label}' has {len(pictures)} pictures for {len(self.columns)} columns; give one a column."
                )


def sentences(doc: Mapping[str, Any]) -> list[str]:
    """What was found, in plain words: time, compute, and whether quality was evaluated."""
    found = _time_sentences(doc)
    for row in doc["methods_cost"]:
        if row["method"] == "guided" and row.get("ratio_to_cfg"):
            found.append(f"{row['guide']}: one guided step computes {percent(row['ratio_to_cfg'])} of CFG's MACs.")
    if not doc["task_quality_evaluated"]:
        found.append("The quality of the pictures was not evaluated in this run.")
    return found


def _time_sentences(doc: Mapping[str, Any]) -> list[str]:
    """One per engine, at its largest batch; says where a difference is inside its interval or the timing was noisy."""
    found = []
    for row in largest_batches(doc):
        text = f"{row['engine']}: guided costs {row['ratio_to_cfg']:.2f} of CFG's time per step at batch {row['batch']}"
        bounds = row.get("ratio_to_cfg_interval")
        if bounds:
            text += f" (95 % interval {interval(row, 2)}, {plural(row['rounds'], 'round')})"
            if bounds[0] <= 1 <= bounds[1]:
                text += ", which is no difference that this run can tell"
        if (row.get("spread") or 0) > NOISY:
            text += f"; the timing was noisy (interquartile range {percent(row['spread'])} of the median)"
        found.append(text + ".")
    return found


# ----------------------------------------------------------------------------------------------------- terminal


def render_terminal(doc: Mapping[str, Any]) -> RenderableType:
    """The tables of `doc` as one rich renderable, closed by what they say in plain words."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    def table(title: str, names: Sequence[str], rows: Sequence[Sequence[str]], words: int) -> Table:
        made = Table(title=title, title_justify="left", title_style="bold", box=None, header_style="dim")
        made.pad_edge = False
        for number, name in enumerate(names):
            made.add_column(name, justify="left" if number < words else "right", overflow="fold")
        for row in rows:
            made.add_row(*(Text(cell) for cell in row))
        return made

    parts: list[RenderableType] = []
    for found in (cost_table(doc), method_table(doc), latency_table(doc, short=True), fidelity_table(doc)):
        if found is not None:
            parts += [table(found["title"], found["head"], found["rows"], found["words"]), Text()]
    parts += [Text(sentence) for sentence in sentences(doc)]
    return Group(*parts)


# --------------------------------------------------------------------------------------------------------- HTML


def render_html(doc: Mapping[str, Any], path: str | os.PathLike[str], pictures: PictureGrid | None = None) -> Path:
    """Write the report of `doc` as one HTML file at `path`, whole or not at all, and return the path."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["unbroken"] = _unbroken
    raw = json.dumps(doc, ensure_ascii=False, indent=1).encode()
    page = environment.get_template(TEMPLATE).render(
        doc=doc,
        provenance=_provenance_pairs(doc["provenance"]),
        headlines=_headlines(doc),
        sentences=_time_sentences(doc),
        cost=cost_table(doc),
        methods=method_table(doc),
        latency=latency_table(doc),
        fidelity=fidelity_table(doc),
        latency_charts=[_safe(chart) for chart in latency_charts(doc)],
        compute_chart=_safe(compute_chart(doc)),
        pictures=None if pictures is None else _picture_rows(pictures),
        unit_note=UNIT_NOTE,
        paper_note=PAPER_NOTE,
        picture_includes=[name for row in doc["methods_cost"][:1] for name in row.get("picture_includes", [])],
        boundary=next((row["boundary"] for row in doc["latency"] if row.get("boundary")), None),
        timing=_timing(doc),
        raw="data:application/json;base64," + base64.b64encode(raw).decode(),
    )
    target = Path(path)
    write_text(page, target)
    return target


def _safe(svg: str | None) -> Any:
    import markupsafe

    return None if svg is None else markupsafe.Markup(svg)  # drawn by matplotlib, which escapes every label


def _unbroken(text: str) -> str:
    """Keep an interval such as "0.53–0.56" on one line."""
    return re.sub(r"(?<=\d)–(?=\d)", "\N{WORD JOINER}–\N{WORD JOINER}", text)


def _picture_rows(grid: PictureGrid) -> dict[str, Any]:
    rows = [
        {
            "label": label,
            "pictures": [{"uri": _data_uri(one), "alt": f"{' '.join(label.split())}: {text}"} for one, text in pairs],
        }
        for label, pairs in ((label, list(zip(stack, grid.columns, strict=True))) for label, stack in grid.rows)
    ]
    return {"columns": list(grid.columns), "rows": rows, "caption": grid.caption}


def _data_uri(pixels: np.ndarray) -> str:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def _headlines(doc: Mapping[str, Any]) -> list[dict[str, str]]:
    """The few figures that a reader takes away, each with what it is and how sure it is."""
    found = []
    for row in largest_batches(doc):
        bounds = interval(row, 2)
        sure = f"95 % interval {bounds}, " if bounds else ""
        found.append(
            {
                "value": f"{row['ratio_to_cfg']:.2f} ×",
                "name": "CFG's time per step",
                "detail": f"{row['engine']}, batch {row['batch']}, {sure}{plural(row.get('rounds', 0), 'round')}",
            }
        )
    guided = [row for row in doc["methods_cost"] if row["method"] == "guided"]
    for row in guided:
        if row.get("ratio_to_cfg"):
            found.append(
                {
                    "value": percent(row["ratio_to_cfg"]),
                    "name": "of CFG's compute per step",
                    "detail": f"{row['guide']}, MACs with attention products",
                }
            )
    sizes = {row["network"]: row["parameters"] for row in doc["cost"]}
    for row in guided:
        if sizes.get("teacher") and row["guide"] in sizes:
            share = sizes[row["guide"]] / sizes["teacher"]
            found.append(
                {
                    "value": percent(share),
                    "name": "of the teacher's parameters",
                    "detail": f"{row['guide']}, {sizes[row['guide']]:,} trained; the teacher stays as it is",
                }
            )
    return found


def _timing(doc: Mapping[str, Any]) -> str | None:
    if not doc["latency"]:
        return None
    rounds = sorted({row["rounds"] for row in doc["latency"] if "rounds" in row})
    warmup = sorted({row["warmup"] for row in doc["latency"] if "warmup" in row})
    if not rounds:
        return None
    return (
        f"{' or '.join(map(str, rounds))} rounds after {' or '.join(map(str, warmup)) or 'no'} warm-up passes of each "
        "case; every round runs each case once, in an order that rotates. The ratio to CFG is taken within each round, "
        "then the median over rounds; its interval is a seeded bootstrap over rounds."
    )


def _provenance_pairs(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    load = found.get("load_average")
    commit = found.get("commit")
    if commit and found.get("uncommitted_changes"):
        commit += " with uncommitted changes"
    cores = f"{found.get('cores')}"
    if found.get("usable_cores") not in (None, found.get("cores")):
        cores += f", {found['usable_cores']} usable"
    pairs = [
        ("Measured", str(found.get("date", "")).replace("T", " ").replace("+00:00", " UTC")),
        ("Processor", found.get("cpu")),
        ("Cores", cores),
        ("Accelerator", found.get("device") or "none"),
        ("Load average when written", " / ".join(f"{value:.2f}" for value in load) if load else None),
        ("Platform", found.get("platform")),
        ("pnp-trt", found.get("package")),
        ("Commit", commit),
        ("Python", found.get("python")),
        *found.get("packages", {}).items(),
    ]
    return [(str(name), str(value)) for name, value in pairs if value]
