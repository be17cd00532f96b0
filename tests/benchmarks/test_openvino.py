"""ONNX Runtime against OpenVINO: the record of a small engine, named after its base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("openvino")

from benchmarks import openvino


def test_a_record_is_named_after_its_base(micro_bundles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino, "RESULTS", tmp_path)
    words = ["--engine", str(micro_bundles / "plain"), "--batches", "2", "--rounds", "3", "--jobs", "unet"]
    openvino.main(words)
    assert [p.name for p in tmp_path.glob("*.json")] == ["openvino-plain.json"]
    record = json.loads((tmp_path / "openvino-plain.json").read_text())
    (row,) = record["rows"]
    assert (row["job"], row["batch"]) == ("unet", 2) and row["difference"] < 1e-4
    ratios = sorted(a / b for a, b in zip(row["seconds"]["onnxruntime"], row["seconds"]["openvino"], strict=True))
    assert len(ratios) == 3 and row["ratio"] == pytest.approx(ratios[1])
