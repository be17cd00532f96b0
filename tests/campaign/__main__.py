"""``python -m tests.campaign``: run the campaign, print the table, write ``build/campaign/report.json``."""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from . import areas, report
from .case import Case
from .zygote import ROOT, Zygote


def select(area: list[str], only: str | None, quick: bool) -> list[Case]:
    """Return the cases of these areas whose names match a pattern."""
    chosen: list[Case] = []
    for name, cases in areas.load().items():
        if area and name not in area:
            continue
        chosen += areas.quick(cases) if quick else cases
    return [c for c in chosen if only is None or fnmatch.fnmatch(c.name, f"*{only}*")]


def run_all(zygote: Zygote, cases: list[Case], jobs: int) -> Iterator[dict[str, Any]]:
    """Yield rows in the order of ``cases``."""
    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(zygote.run, cases)


def digest_of(*folders: str) -> str:
    """Short digest of the Python files below these folders and of the code that builds the fixtures."""
    sources = sorted([*(p for f in folders for p in (ROOT / f).rglob("*.py")), ROOT / "tests" / "conftest.py"])
    return hashlib.sha256(b"".join(p.read_bytes() for p in sources)).hexdigest()[:12]


class Rows:
    """The rows of the current sources, appended to a file in the report's folder as cases finish.

    Args:
        folder: folder of the report.
        resume: keep existing rows.
    """

    def __init__(self, folder: Path, resume: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"rows-{digest_of('pnp_trt', 'tests/campaign')}.jsonl"
        if not resume:
            self._path.unlink(missing_ok=True)
        text = self._path.read_text() if self._path.exists() else ""
        self._kept = {(r["area"], r["name"]): r for r in map(json.loads, text.splitlines()) if r["class"] == "OK"}

    def of(self, case: Case) -> dict[str, Any] | None:
        """Return the row of a case that passed in an earlier run, or None."""
        return self._kept.get((case.area, case.name))

    def add(self, row: dict[str, Any]) -> None:
        """Append a row."""
        with self._path.open("a") as f:
            f.write(json.dumps(row) + "\n")


def fixtures() -> Path:
    """Return the fixtures of the current sources; build them on first use."""
    folder = report.FOLDER / f"fixtures-{digest_of('pnp_trt')}"
    if not (folder / "engines" / "guided" / "manifest.json").exists():
        print("building the fixtures (once for these sources)", file=sys.stderr)
        for old in report.FOLDER.glob("fixtures-*"):
            shutil.rmtree(old)
        subprocess.run([sys.executable, "-m", "tests.campaign.fixtures", str(folder)], cwd=ROOT, check=True)
    return folder


def main(arguments: list[str] | None = None) -> int:
    """Run the campaign; return 1 if a case failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description=__doc__)
    parser.add_argument("--area", action="append", default=[], choices=list(areas.load()), help="may be repeated")
    parser.add_argument("--only", metavar="PATTERN", help="only cases whose name contains this; * and ? are wildcards")
    parser.add_argument("--jobs", type=int, default=2, help="number of parallel cases")
    parser.add_argument("--quick", action="store_true", help="run only the fifth of the cases that make test runs")
    parser.add_argument("--resume", action="store_true", help="skip cases that passed before with the same sources")
    parser.add_argument("--list", action="store_true", help="print the cases and exit")
    parser.add_argument("--out", type=Path, default=report.FOLDER, help="folder of the report")
    parser.add_argument("--record", type=Path, help="also write counts and provenance here, without rows and paths")
    parser.add_argument("--fixtures", type=Path, help="folder of fixtures that are already built")
    options = parser.parse_args(arguments)
    cases = select(options.area, options.only, options.quick)
    if options.list:
        print("\n".join(f"{c.area}: {c.name}" for c in cases), f"{len(cases)} cases", sep="\n")
        return 0
    begun, journal = time.monotonic(), Rows(options.out, options.resume)
    resumed = [row for case in cases if (row := journal.of(case)) is not None]
    left = [case for case in cases if journal.of(case) is None]
    with tempfile.TemporaryDirectory(prefix="campaign-") as scratch:
        shutil.copytree(options.fixtures or fixtures(), Path(scratch) / "fixtures")
        zygote = Zygote(Path(scratch))
        try:
            rows = resumed + list(_printed(run_all(zygote, left, options.jobs), len(left), journal))
        finally:
            zygote.stop()
    from pnp_trt.bundle.provenance import provenance

    command = ["python", "-m", "tests.campaign", *(["--quick"] if options.quick else [])]
    command += [word for area in options.area for word in ("--area", area)]
    command += ["--only", options.only] if options.only else []
    facts = {
        "provenance": provenance(command), "seconds": round(time.monotonic() - begun), "jobs": options.jobs,
        "resumed": len(resumed), "cpu_seconds": round(sum(r["cpu_seconds"] for r in rows)),
    }  # fmt: skip
    path = report.write(rows, options.out, **facts)
    if options.record is not None:
        report.record(rows, options.record, **facts)
    print(report.render(rows), f"report: {path}", sep="\n")
    return int(any(r["class"] != "OK" for r in rows))


def _printed(rows: Iterator[dict[str, Any]], total: int, journal: Rows) -> Iterator[dict[str, Any]]:
    """Store every row; print every failed case and the progress after every 100 cases."""
    for number, row in enumerate(rows, 1):
        journal.add(row)
        if row["class"] != "OK":
            print(report.describe(row), flush=True)
        if number % 100 == 0:
            print(f"{number} of {total}", file=sys.stderr, flush=True)
        yield row


if __name__ == "__main__":
    sys.exit(main())
