"""The campaign's report: rows as JSON, and counts by area and class."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from .case import CLASSES

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "campaign"


def counts(rows: list[dict[str, Any]]) -> dict[str, Counter[str]]:
    """Count the cases of each class by area."""
    table: dict[str, Counter[str]] = {}
    for row in rows:
        table.setdefault(row["area"], Counter())[row["class"]] += 1
    return table


def render(rows: list[dict[str, Any]]) -> str:
    """Render the table by area, followed by every failed case."""
    table = counts(rows)
    total = sum(table.values(), Counter())
    width = max([len(a) for a in table] + [4])
    lines = [" ".join([f"{'area':{width}}", f"{'cases':>6}", *(f"{c.lower():>10}" for c in CLASSES)])]
    for area, numbers in [*sorted(table.items()), ("all", total)]:
        cells = (f"{numbers[c] or '·':>10}" for c in CLASSES)
        lines.append(" ".join([f"{area:{width}}", f"{sum(numbers.values()):>6}", *cells]))
    failed = [r for r in rows if r["class"] != "OK"]
    return "\n".join([*lines, *map(describe, failed)])


def describe(row: dict[str, Any]) -> str:
    """Describe one failed case in one line."""
    return f"{row['class']} {row['area']}: {row['name']}: {row['detail']}"


def write(rows: list[dict[str, Any]], folder: Path = FOLDER, **facts: Any) -> Path:
    """Write ``report.json``: counts by area, every row, and provenance."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "report.json"
    path.write_text(json.dumps({**_summary(rows, facts), "rows": rows}, indent=1) + "\n")
    return path


def record(rows: list[dict[str, Any]], path: Path, **facts: Any) -> None:
    """Write counts by area, and area, name and class of failed cases: a record without local paths."""
    failed = [{k: r[k] for k in ("area", "name", "class")} for r in rows if r["class"] != "OK"]
    path.write_text(json.dumps({**_summary(rows, facts), "failed": failed}, indent=1) + "\n")


def _summary(rows: list[dict[str, Any]], facts: dict[str, Any]) -> dict[str, Any]:
    areas = {
        a: {c: n[c] for c in CLASSES if n[c]} | {"cases": sum(n.values())} for a, n in sorted(counts(rows).items())
    }
    return {**facts, "cases": len(rows), "areas": areas}


def add(rows: list[dict[str, Any]], folder: Path) -> None:
    """Add rows to the report of this session; safe for concurrent processes."""
    from filelock import FileLock

    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "report.lock"):
        path = folder / "report.json"
        new = {(r["area"], r["name"]) for r in rows}
        old = json.loads(path.read_text())["rows"] if path.exists() else []
        every = [r for r in old if (r["area"], r["name"]) not in new] + rows
        write(every, folder)
        (folder / "report.txt").write_text(render(every) + "\n")
