"""A record of real size that was stopped continues with the step that is missing; no model is made here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import realsize, realsize_report


def test_a_stopped_run_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def run(words: list[str]) -> dict[str, Any]:
        if words[0] == "plug" and made.count("plug") == 0:
            made.append("plug")
            raise KeyboardInterrupt
        made.append(words[0])
        return {"seconds": 10.0 if words[0] == "build" else 1.0, "peak_memory_bytes": 1}

    monkeypatch.setattr(realsize, "run", run)
    out = tmp_path / "record.json"
    words = ["--base", "random:sdxl", "--part", "run", "--work", str(tmp_path / "work"), "--out", str(out)]
    with pytest.raises(KeyboardInterrupt):
        realsize.main(words)
    assert made == ["build", "plug"] and not out.exists()
    realsize.main(words)
    assert made == ["build", "plug", "plug", "sample", "build", "sample"]
    found = json.loads(out.read_text())
    assert found["plug_to_build"] == 0.1 and list(found["steps"])[:2] == ["build", "plug"]
    assert not any((tmp_path / "work").iterdir())
    realsize.main(words)
    assert len(made) == 6  # the record is there
    realsize.main([*words, "--again", "--guided-only"])
    assert made[6:] == ["build", "plug", "verify"]


def test_the_page_is_of_the_records() -> None:
    text = realsize_report.PAGE.read_text(encoding="utf-8")
    assert text == realsize_report.page()
    record = json.loads((realsize.RESULTS / "realsize-sd15-tiny-run.json").read_text(encoding="utf-8"))
    step = record["steps"]["plug"]
    gib = step["peak_memory_bytes"] / 1024**3
    assert f"| Stable Diffusion 1.5 | plug | {step['seconds']:.0f} | {gib:.1f} |" in text
