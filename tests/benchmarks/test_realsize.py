"""Benchmarks of real size: an interrupted run resumes with the missing step (no model is built here), and the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import realsize, realsize_report


def test_an_interrupted_run_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[str] = []

    def run(words: list[str]) -> dict[str, Any]:
        if words[0] == "plug" and commands.count("plug") == 0:
            commands.append("plug")
            raise KeyboardInterrupt
        commands.append(words[0])
        return {"seconds": 10.0 if words[0] == "build" else 1.0, "peak_memory_bytes": 1}

    monkeypatch.setattr(realsize, "run", run)
    out = tmp_path / "record.json"
    words = ["--base", "random:sdxl", "--part", "run", "--work", str(tmp_path / "work"), "--out", str(out)]
    with pytest.raises(KeyboardInterrupt):
        realsize.main(words)
    assert commands == ["build", "plug"] and not out.exists()
    realsize.main(words)
    assert commands == ["build", "plug", "plug", "sample", "build", "sample"]
    record = json.loads(out.read_text())
    assert record["plug_to_build"] == 0.1 and list(record["steps"])[:2] == ["build", "plug"]
    assert not any((tmp_path / "work").iterdir())
    realsize.main(words)
    assert len(commands) == 6  # the record exists
    realsize.main([*words, "--again", "--guided-only"])
    assert commands[6:] == ["build", "plug", "verify"]


def test_the_page_matches_the_records() -> None:
    text = realsize_report.PAGE.read_text(encoding="utf-8")
    assert text == realsize_report.page()
    record = json.loads((realsize.RESULTS / "realsize-sd15-tiny-run.json").read_text(encoding="utf-8"))
    step = record["steps"]["plug"]
    gib = step["peak_memory_bytes"] / 1024**3
    assert f"| Stable Diffusion 1.5 | plug | {step['seconds']:.0f} | {gib:.1f} |" in text
