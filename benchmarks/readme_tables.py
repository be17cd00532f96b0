"""The README's measured tables, written from the recorded results: ``python -m benchmarks.readme_tables``.

The text between ``<!-- bench:NAME -->`` and ``<!-- /bench -->`` is replaced by the table NAME of :data:`TABLES`.
``--check`` writes nothing and exits with 1 if the README differs from its records.
"""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import records
from pnp_trt.bench import results
from pnp_trt.bench.report.words import DASH, is_reference, method_labels, plural, three_digits
from pnp_trt.bundle.store import write_text
from pnp_trt.errors import InputError, PnpError
from pnp_trt.sampling.methods import METHODS

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
HEADLINE_W = 3.0
_REGION = re.compile(r"<!-- bench:(?P<name>[\w-]+) -->\n(?P<text>.*?)<!-- /bench -->", re.DOTALL)
_MARK = re.compile(r"<!-- (?:bench:[\w-]+|/bench) -->")
_LABELS = method_labels()
#: the guide's row is the last of the sampling methods, next to the rivals that it is compared with
_ORDER = sorted(_LABELS, key=lambda name: (name not in METHODS, name == "guided"))

Document = Mapping[str, Any]


def cost(doc: Document) -> str:
    """Parameters and MACs per step of each network, from a document of ``pnp-trt bench``."""
    rows = [row for row in doc["cost"] if row.get("per", "step") == "step"]
    largest = max((row["macs"] for row in rows), default=0)
    unit, scale, digits = ("G", 1e9, 2) if largest >= 1e10 else ("M", 1e6, 1)
    cells = [
        [row["network"], f"{row['parameters'] / 1e6:,.3f}",
         *(f"{row[key] / scale:,.{digits}f}" for key in ("macs", "macs_without_attention"))]
        for row in rows
    ]  # fmt: skip
    head = ["network", "parameters, M", f"MACs a step, {unit}", f"without attention products, {unit}"]
    return _markdown(head, cells, 1)


def latency(doc: Document) -> str:
    """Time per image by method and batch, at the largest number of steps at which CFG was timed."""
    cfg = [row for row in doc["latency"] if row["method"] == "cfg"]
    if not cfg:
        raise InputError("the record has no timed CFG; run: make bench")
    steps = max(row["steps"] for row in cfg)
    rows = {}
    for row in doc["latency"]:
        if row["steps"] == (max(steps // 2, 1) if row["method"] == "cfg-fewer-steps" else steps):
            rows[row["method"], row["engine"], row["batch"]] = row
    batches = sorted({batch for _, _, batch in rows})
    cases = sorted({key[:2] for key in rows}, key=lambda case: (_rank(case[0]), case[1]))
    several = {method for method, _ in cases if sum(one[0] == method for one in cases) > 1}
    cells = []
    for method, engine in cases:
        name = _LABELS.get(method, method) + (f" ({engine})" if method in several else "")
        timed = [rows.get((method, engine, batch)) for batch in batches]
        evaluations = next((row["evaluations"] for row in timed if row and row.get("evaluations") is not None), None)
        cells.append([name, DASH if evaluations is None else f"{evaluations:g}", *map(_time, timed)])
    table = _markdown(["method", "NFE", *(f"batch {batch}" for batch in batches)], cells, 1)
    rounds = min(row["rounds"] for row in cfg)
    p = doc["provenance"]
    where = p.get("device") or f"{p['cpu']}, {plural(p.get('usable_cores') or p['cores'], 'core')}"
    caption = (
        f"Milliseconds per image of {plural(steps, 'step')} with text encoding and decoding, medians; after the dot "
        f"the loop's time relative to CFG's, paired by round, with its 95 % interval ({plural(rounds, 'round')}). "
        f"NFE: model evaluations per image. {where}; {p['date'][:10]}."
    )
    return f"{table}\n{textwrap.fill(caption, 120)}\n"


def _time(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return DASH
    text = three_digits(row.get("p50_ms_per_image", row["p50_ms"] / row["batch"]))
    if is_reference(row) or row["ratio_to_cfg"] is None:
        return text
    ratio, bounds = f"{row['ratio_to_cfg']:.2f}", row.get("ratio_to_cfg_interval")
    return f"{text} · {ratio}" + (f" [{bounds[0]:.2f}, {bounds[1]:.2f}]" if bounds else "")


def kid(doc: Document) -> str:
    """KID by method and steps at w = 3, with intervals, from a document of ``pnp-trt bench``."""
    rows = [row for row in doc["fidelity"] if row.get("kid")]
    rows = [row for row in rows if row["method"] == "unguided" or row["guidance"] == HEADLINE_W]
    if not rows:
        raise InputError(f"the record has no KID at w = {HEADLINE_W:g}; run: make bench")
    steps = sorted({row["steps"] for row in rows}, reverse=True)
    cases = sorted({(row["method"], row["engine"]) for row in rows}, key=lambda case: (_rank(case[0]), case[1]))
    several = {method for method, _ in cases if sum(one[0] == method for one in cases) > 1}
    values_by_case = {(row["method"], row["engine"], row["steps"]): row["kid"] for row in rows}
    cells = []
    for method, engine in cases:
        name = _LABELS.get(method, method) + (f" ({engine})" if method in several else "")
        values = [values_by_case.get((method, engine, one)) for one in steps]
        cells.append(
            [name, *("" if v is None else f"{v['value']:.3f} [{v['low']:.3f}, {v['high']:.3f}]" for v in values)]
        )
    counts = " or ".join(str(one) for one in sorted({row["kid"]["count"] for row in rows}))
    table = _markdown(["", *(plural(one, "step") for one in steps)], cells, 1)
    return f"{table}\n{counts} images a cell, w = {HEADLINE_W:g}, 95 % intervals.\n"


def guides(record: Document) -> str:
    """KID of guides over steps at w = 3, from the record of ``make tables``."""
    names = {
        ("A", "cfg"): "teacher, CFG (2 NFE per step)", ("A", "tiny"): "teacher + tiny guide (1 NFE per step)",
        ("A", "tiny-stage2"): "teacher + tiny guide after stage 2",
        ("C", "none"): "teacher, no guidance (1 NFE per step)",
    }  # fmt: skip
    kids = {
        (group["table"], group["method"], group["steps"]): group["kid"]["value"]
        for group in record["groups"]
        if group["base"] == "emoji" and group["captions"] == "train" and group["w"] == HEADLINE_W
        and group["interval"] is None
    }  # fmt: skip
    steps = (50, 16, 8, 4)
    cells = []
    for case, name in names.items():
        values = [kids.get((*case, one)) for one in steps]
        cells.append([name, *("" if value is None else f"{value:.4f}" for value in values)])
    return _markdown(["", *(plural(one, "step") for one in steps)], cells, 1)


#: Name of a region -> its record, and the function that writes its table.
TABLES: dict[str, tuple[str, Callable[[Document], str]]] = {
    "cost": ("cost-emoji.json", cost),
    "latency": ("emoji-bench.json", latency),
    "kid": ("emoji-bench.json", kid),
    "guides": ("emoji-tables.json", guides),
}


def fill(text: str, read: Callable[[str], Document]) -> str:
    """Return ``text`` with every region rewritten; ``read`` returns the record of a file name.

    Raises:
        InputError: if a region is unknown or not closed.
    """
    if len(_MARK.findall(text)) != 2 * len(_REGION.findall(text)):
        raise InputError("a bench region is not closed; end each with <!-- /bench -->")

    def draw(region: re.Match[str]) -> str:
        name = region["name"]
        if name not in TABLES:
            raise InputError(f"unknown region 'bench:{name}'; available: {', '.join(TABLES)}")
        file, make = TABLES[name]
        return f"<!-- bench:{name} -->\n{make(read(file))}<!-- /bench -->"

    return _REGION.sub(draw, text)


def read_record(file: str, folder: Path = RESULTS) -> Document:
    """Read a record of ``benchmarks/results``; those of `pnp-trt bench` are checked against their schema."""
    if file.endswith("-bench.json") or file.startswith("cost-"):
        return results.read(folder / file)
    return records.read(folder / file)


def _rank(method: str) -> int:
    return _ORDER.index(method) if method in _ORDER else len(_ORDER)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]], words: int) -> str:
    """A Markdown table; columns after the first ``words`` are right-aligned."""
    rule = ["---" if place < words else "---:" for place in range(len(head))]
    lines = [f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in (head, rule, *rows)]
    return "\n".join(re.sub(r"  +", " ", line) for line in lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrite the README, or with ``--check`` report whether it agrees with its records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the README differs")
    options = parser.parse_args(arguments)
    before = options.readme.read_text(encoding="utf-8")
    try:
        after = fill(before, lambda file: read_record(file, options.results))
    except PnpError as error:
        print(f"readme_tables: {error}", file=sys.stderr)
        return error.exit_code
    if before == after:
        print(f"{options.readme} agrees with its records")
    elif options.check:
        print(f"{options.readme} differs from its records; run: python -m benchmarks.readme_tables", file=sys.stderr)
        return 1
    else:
        write_text(after, options.readme)
        print(f"{options.readme} written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
