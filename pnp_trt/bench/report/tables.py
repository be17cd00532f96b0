"""The tables of a results document as strings, with one unit and one number of decimals per column.

The terminal and the HTML page use the same tables; a builder returns None if the document has nothing to show.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...sampling.methods import GUIDED, METHODS
from ..metric import METRICS
from .words import (
    ARRIVALS,
    DASH,
    POLICIES,
    decimals_of,
    estimate,
    file_size,
    method_name,
    number,
    percent,
    ratio,
    three_digits,
    unit_of,
)

Document = Mapping[str, Any]
#: percentiles of a queue's latencies
_PERCENTILES = ("p50", "p95", "p99")


@dataclass(frozen=True)
class Table:
    """Title, column headings, rows of cells, the number of leading text columns, and notes below the table."""

    title: str
    head: list[str]
    rows: list[list[str]]
    words: int
    notes: tuple[str, ...] = ()


def _table(title: str, columns: Mapping[str, list[str] | None], words: int, notes: Iterable[str] = ()) -> Table | None:
    """Build a table from columns, leaving out those that are None, and columns of figures that contain only dashes.

    Returns None if there are no rows.
    """
    shown = {
        name: cells
        for place, (name, cells) in enumerate(columns.items())
        if cells is not None and (place < words or any(cell != DASH for cell in cells))
    }
    rows = [list(cells) for cells in zip(*shown.values(), strict=True)]
    if not rows:
        return None
    return Table(title, list(shown), rows, sum(name in shown for name in list(columns)[:words]), tuple(notes))


def cost_table(doc: Document) -> Table | None:
    """Parameters and MACs of every network."""
    rows = doc["cost"]
    if not rows:
        return None
    # use the teacher's prefix even if the decoder, which runs once per image, computes more
    unit, scale, _ = unit_of([next((r["macs"] for r in rows if r["network"] == "teacher"), rows[0]["macs"])])
    decimals = max(1, decimals_of([row[key] / scale for row in rows for key in ("macs", "macs_without_attention")]))
    size, size_scale, size_decimals = unit_of([row["parameters"] for row in rows])
    columns: dict[str, list[str] | None] = {
        "network": [row["network"] for row in rows],
        "runs per": ["image" if row.get("per") == "image" else "step" for row in rows],
        f"parameters, {size}": [number(row["parameters"], size_decimals, size_scale) for row in rows],
        f"MACs, {unit}": [number(row["macs"], decimals, scale) for row in rows],
        f"MACs without attention, {unit}": [number(row["macs_without_attention"], decimals, scale) for row in rows],
    }
    return _table("Cost of one forward at batch 1", columns, 2)


def method_table(doc: Document) -> Table | None:
    """MACs of every method, per step and per image."""
    rows = doc["methods_cost"]
    if not rows:
        return None
    keys = ("macs_per_step", "macs_per_step_without_attention")
    unit, scale, decimals = unit_of([row[key] for row in rows for key in keys if key in row])
    large, large_scale, large_decimals = unit_of([row["macs_per_image"] for row in rows])
    plain = [row.get("macs_per_step_without_attention") for row in rows]
    columns: dict[str, list[str] | None] = {
        "method": [method_name(row) for row in rows],
        "steps": [str(row["steps"]) for row in rows],
        "NFE": [_evaluations(row) for row in rows],
        f"per step, {unit}": [number(row["macs_per_step"], decimals, scale) for row in rows],
        "without attention": [number(value, decimals, scale) for value in plain],
        f"per image, {large}": [number(row["macs_per_image"], large_decimals, large_scale) for row in rows],
        "of CFG": [percent(row.get("ratio_to_cfg")) for row in rows],
    }
    included = rows[0].get("image_includes") or []
    note = f"Of CFG: all steps together. NFE: model evaluations per image. An image includes {' and '.join(included)}."
    return _table("MACs per method at batch 1", columns, 1, [note] if included else [])


def _evaluations(row: Mapping[str, Any]) -> str:
    evaluations = row.get("evaluations")
    return DASH if evaluations is None else f"{evaluations:g}"


def published_table(doc: Document) -> Table | None:
    """Published figures beside ours, with numbered notes below, each only once."""
    rows = doc["published"]
    notes = list(dict.fromkeys(row["note"] for row in rows if row.get("note")))
    marks = {note: f" [{place}]" for place, note in enumerate(notes, 1)}
    differences = [row.get("relative_difference") for row in rows]
    columns: dict[str, list[str] | None] = {
        "figure": [row["what"] + marks.get(row.get("note") or "", "") for row in rows],
        "unit": [row["unit"] for row in rows],
        "published": [f"{row['published']:,.6g}" for row in rows],  # no more decimals than in the paper
        "printed as": [row.get("published_unit_printed") or DASH for row in rows],
        "counted here": [number(row["counted"], 2) for row in rows],
        "difference": [DASH if d is None else f"{100 * d:+.2f} %".replace("-", "−") for d in differences],
    }
    notes = [f"[{i}] {note}." for i, note in enumerate(notes, 1)]
    return _table("Published figures, counted again", columns, 2, notes)


def engine_table(doc: Document) -> Table | None:
    """File sizes of the engines and, where the inspector reports them, memory, layers and reformats."""
    rows = doc["engines"]
    columns: dict[str, list[str] | None] = {
        "engine": [row["engine"] for row in rows],
        "network": [row.get("network") or DASH for row in rows],
        "backend": [row.get("backend") or DASH for row in rows],
        "precision": [row.get("precision") or DASH for row in rows],
        "target": [row.get("target") or DASH for row in rows],
        "engine file": [file_size(row.get("file_bytes")) for row in rows],
        "graph": [file_size(row.get("graph_bytes")) for row in rows],
        "device memory": [file_size(row.get("device_memory_bytes")) for row in rows],
        "layers": [number(row.get("layers"), 0) for row in rows],
        "reformats": [number(row.get("reformats"), 0) for row in rows],
    }
    engines: dict[str, dict[str, None]] = {}  # engines by note, to list those with the same note in one sentence
    for row in rows:
        if row.get("note"):
            engines.setdefault(row["note"], {})[row["engine"]] = None
    return _table("Engines", columns, 5, [f"{', '.join(names)}: {note}." for note, names in engines.items()])


def latency_table(doc: Document) -> Table | None:
    """Every latency figure, the ratio first."""
    return _table("Latency, medians", _latency_columns(doc["latency"]), 2)


def short_latency_tables(doc: Document) -> list[Table | None]:
    """One table per batch size, with the columns that fit a terminal of 100 columns."""
    tables = []
    for batch in sorted({row["batch"] for row in doc["latency"]}):
        columns = _latency_columns([row for row in doc["latency"] if row["batch"] == batch], ratio_decimals=2)
        for name in ("batch", "least, ms", "loop p50, ms", "p90", "p99", "spread", "peak memory"):
            del columns[name]
        tables.append(_table(f"Latency at batch {batch}, medians", columns, 2))
    return tables


def _latency_columns(rows: Sequence[Mapping[str, Any]], ratio_decimals: int = 3) -> dict[str, list[str] | None]:
    decimals = decimals_of([row.get("p50_ms_per_step", row["p50_ms"]) for row in rows])
    energy = [row.get("energy_j_per_image") for row in rows]
    return {
        "engine": [row["engine"] for row in rows],
        "method": [row["method"] for row in rows],
        "batch": [str(row["batch"]) for row in rows],
        "steps": [str(row["steps"]) for row in rows],
        "of CFG's time": [ratio(row, ratio_decimals) for row in rows],
        "ms / step": [number(row.get("p50_ms_per_step"), decimals) for row in rows],
        "ms / image": [number(row.get("p50_ms_per_image"), 0 if decimals < 2 else 1) for row in rows],
        "images / s": [_rate(row) for row in rows],
        "least / p50": [percent(row.get("share_of_least"), 0) for row in rows],
        "least, ms": [number(row.get("least_ms"), decimals) for row in rows],
        "loop p50, ms": [number(row["p50_ms"], decimals) for row in rows],
        "p90": [number(row.get("p90_ms"), decimals) for row in rows],
        "p99": [number(row.get("p99_ms"), decimals) for row in rows],
        "spread": [percent(row.get("spread")) for row in rows],
        "peak memory": [file_size(row.get("peak_memory_bytes")) for row in rows],
        "J / image": [DASH if value is None else three_digits(value) for value in energy],
    }


def _rate(row: Mapping[str, Any]) -> str:
    rate = row.get("images_per_s")
    return DASH if rate is None else three_digits(rate)


def cold_table(doc: Document) -> Table | None:
    """Seconds from a process's start to its first image."""
    rows = doc["cold_start"]
    columns: dict[str, list[str] | None] = {
        "engine": [row["engine"] for row in rows],
        "median, s": [number(row["p50_s"], 2) for row in rows],
        "all, s": [", ".join(f"{value:.2f}" for value in row["seconds"]) for row in rows],
        "of that imports, s": [number(row.get("imports_s"), 2) for row in rows],
    }
    notes = dict.fromkeys(f"Measured: {row['boundary']}." for row in rows if row.get("boundary"))
    return _table("Cold start", columns, 1, notes)


def serving_table(doc: Document) -> Table | None:
    """Every queue of requests, by arrivals, load and batching policy."""
    engines = doc.get("serving") or ()
    rows = [(one, row) for one in engines for row in one["queues"]]
    if not rows:
        return None
    least = min(min(one["steps"]) for one in engines)
    columns: dict[str, list[str] | None] = {
        "engine": [one["engine"] for one, _ in rows] if len(engines) > 1 else None,
        "arrivals": [ARRIVALS.get(row["arrivals"], row["arrivals"]) for _, row in rows],
        "batching": [POLICIES.get(row["policy"], row["policy"]) for _, row in rows],
        "load": [percent(row["load"], 0) for _, row in rows],
        "images / s": [_queue_figure(row["images_per_s"]) for _, row in rows],
        **{f"{p}, s": [_queue_figure((row["latency_s"] or {}).get(p)) for _, row in rows] for p in _PERCENTILES},
        **{
            f"admitted {p}": [_queue_figure((row["admission_s"] or {}).get(p)) for _, row in rows]
            for p in _PERCENTILES[:2]
        },
        f"{least} steps p95": [
            _queue_figure(next((n["p95"] for n in row["latency_s_by_steps"] if n["steps"] == least), None))
            for _, row in rows
        ],
        "padding": [percent(row["padding_share"], 0) for _, row in rows],
    }
    notes = [
        f"{one['engine']}: {', '.join(f'{POLICIES.get(p, p)} {three_digits(rate)}' for p, rate in rates.items())} "
        "images per second at most; the load is a share of step by step's. – : above the policy's capacity."
        for one in engines
        for rates in [one["capacity_per_s"]]
    ]
    return _table("Serving, seconds from arrival to image and to the first step", columns, 3, notes)


def _queue_figure(value: float | None) -> str:
    return DASH if value is None else f"{value:.2f}"


def fidelity_table(doc: Document, *, short: bool = False) -> Table | None:
    """Metrics of the images, with 95 % intervals in brackets."""
    rows = doc["fidelity"]
    several = len({(row["engine"], row["method"]) for row in rows}) > len({row["method"] for row in rows})
    columns: dict[str, list[str] | None] = {
        "engine": [row["engine"] for row in rows] if several or not short else None,
        "method": [row["method"] for row in rows],
        "steps": [str(row["steps"]) for row in rows],
        "w": [number(row["guidance"], 1).removesuffix(".0") for row in rows],
        "NFE": [_evaluations(row) for row in rows],
    }
    for metric in METRICS.values():
        if metric.short or not short:
            columns[metric.head] = [
                estimate(row.get(metric.key), metric.decimals, metric.scale, sign=metric.signed) for row in rows
            ]
    counts = sorted({row["images"] for row in rows if "images" in row})
    per_row = f", {' or '.join(map(str, counts))} images per row" if counts else ""
    return _table(f"Fidelity, 95 % intervals in brackets{per_row}", columns, 2)


def left_out_table(doc: Document) -> Table | None:
    """Everything that was requested but not measured, and why."""
    rows = doc["left_out"]
    columns: dict[str, list[str] | None] = {
        "what": [row["what"] for row in rows],
        "why": [row["why"] for row in rows],
    }
    return _table("Left out", columns, 2)


def terminal_tables(doc: Document) -> list[Table]:
    """Return all non-empty tables of `doc`, in reading order and short enough for a terminal."""
    tables: Sequence[Table | None] = (
        cost_table(doc),
        published_table(doc),
        method_table(doc),
        engine_table(doc),
        *short_latency_tables(doc),
        cold_table(doc),
        serving_table(doc),
        fidelity_table(doc, short=True),
        left_out_table(doc),
    )
    return [table for table in tables if table is not None]


def loops(doc: Document) -> dict[int, list[Mapping[str, Any]]]:
    """Group the latency rows by the requested number of steps, the largest first.

    CFG at equal compute runs half the steps, and is grouped with the loops that it is compared with.
    """
    rows = doc["latency"]
    requested = sorted({row["steps"] for row in rows if _divisor(row) == 1}, reverse=True)
    groups: dict[int, list[Mapping[str, Any]]] = {steps: [] for steps in requested}
    for row in rows:
        steps = row["steps"]
        if (divisor := _divisor(row)) > 1:
            steps = next((n for n in requested if max(n // divisor, 1) == steps), steps)
        groups.setdefault(steps, []).append(row)
    return groups


def _divisor(row: Mapping[str, Any]) -> int:
    """Return the factor by which a row's method runs fewer steps than requested."""
    return METHODS.get(row["method"]).step_divisor if row["method"] in METHODS else 1


def largest_batches(doc: Document) -> list[Mapping[str, Any]]:
    """Return each engine's guided row with a ratio at the largest batch size, and of those the longest loop."""
    best: dict[str, Mapping[str, Any]] = {}
    for row in doc["latency"]:
        if row["method"] != GUIDED.name or row["ratio_to_cfg"] is None:
            continue
        current = best.get(row["engine"])
        if current is None or (row["batch"], row["steps"]) > (current["batch"], current["steps"]):
            best[row["engine"]] = row
    return list(best.values())
