"""Cold starts of a micro model, in real processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from pnp_trt.bench.measure import coldstart
from pnp_trt.errors import InputError, PnpError


def test_a_row_has_all_fields(micro_bundles: Path) -> None:
    seen: list[tuple[int, int]] = []
    row = coldstart.measure(
        str(micro_bundles / "guided"), rounds=1, steps=1, provider="cpu", progress=lambda *done: seen.append(done)
    )
    assert set(row) == {"engine", "seconds", "p50_s", "imports_s", "boundary"}
    assert row["engine"] == "guided" and len(row["seconds"]) == 1 and row["p50_s"] == row["seconds"][0] > 0
    assert row["imports_s"] > 0
    assert seen == [(2, 4), (4, 4)]


def test_medians_leave_out_the_warm_up(engines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times, spent = iter([9.0, 1.0, 5.0, 2.0]), iter([9.0, 0.1, 0.3, 0.2])
    commands: list[list[str]] = []
    monkeypatch.setattr(coldstart, "start", lambda words: (commands.append(list(words)), next(times))[1])
    monkeypatch.setattr(coldstart, "imports_of", lambda words: next(spent))
    row = coldstart.measure("guided", rounds=3)
    assert (row["seconds"], row["p50_s"], row["imports_s"]) == ([1.0, 5.0, 2.0], 2.0, 0.2)  # the first is warm-up
    assert commands[0][:4] == ["sample", "a red apple", "--engine", "guided"] and "--steps" not in commands[0]


def test_imports_are_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    log = "import time: self [us] | cumulative | imported package\nimport time:   1500 |  1500 |   _io\n"
    log += "a warning\nimport time:    500 |  2000 | site\n"
    monkeypatch.setattr(coldstart, "_run", lambda command: log)
    assert coldstart.imports_of(["sample"]) == pytest.approx(0.002)


def test_failures_are_reported(engines: Path, tmp_path: Path) -> None:
    with pytest.raises(PnpError, match="a cold start failed: .*none"):
        coldstart.start(["sample", "a cat", "--engine", str(tmp_path / "none"), "--out", str(tmp_path)])
    with pytest.raises(InputError, match="no engine named 'nope'"):
        coldstart.measure("nope", rounds=1)
    with pytest.raises(InputError, match="rounds must be at least 1, got 0"):
        coldstart.measure("guided", rounds=0)
