"""The ablation of gains: its cells, its comparisons, and its page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from benchmarks.emoji import gains  # noqa: E402
from benchmarks.emoji.runner import captions  # noqa: E402
from pnp_trt.models.bases import resolve  # noqa: E402

from .test_tables import ROOT, Eyes  # noqa: E402


def test_the_w_of_equal_strength_is_interpolated() -> None:
    curve = {2.0: 0.1, 3.0: 0.2, 5.0: 0.3}
    assert gains.equal_strength(curve, 0.15) == 2.5 and gains.equal_strength(curve, 0.25) == 4.0
    assert gains.equal_strength(curve, 0.05) is None and gains.equal_strength(curve, 0.31) is None


def test_the_gains_are_constants_the_table_and_its_root() -> None:
    variants = gains.gains([4.0, 1.0])
    assert variants == {"none": None, "1.3": [1.3], "1.6": [1.6], "root of the table": [2.0, 1.0], "table": [4.0, 1.0]}


def test_a_run_on_the_micro_teacher(
    micro_base: Path, micro_guide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gains, "resolve", lambda _: resolve(str(micro_base)))
    monkeypatch.setattr(gains, "SCALES", (2.0, 3.0))
    monkeypatch.setattr(gains, "STEPS", {2.0: (16,), 3.0: (16, 4)})
    monkeypatch.setattr(gains, "real_images", lambda rows, _: np.random.default_rng(0).integers(
        0, 256, (len(rows), 32, 32, 3), dtype=np.uint8))  # fmt: skip
    options: dict[str, Any] = dict(images=4, seeds=2, extract=Eyes(), command="a command")
    where = (micro_guide, [2.0, 1.0], tmp_path, ROOT / "judge.safetensors", tmp_path / "gains.json")
    document = gains.measure(*where, **options)
    assert len(document["cells"]) == 6 * 3  # CFG and five gains
    by = {(r["gain"], r["steps"], r["w"]): r for r in document["cells"]}
    assert by["table", 4, 3.0]["seeds"] == 2 and by["table", 16, 2.0]["seeds"] == 1
    # a gain changes the images, and a constant gives other images than the table
    psnr = {name: by[name, 16, 3.0]["distance_to_cfg"]["psnr_db"]["value"] for name in ("none", "1.6", "table")}
    assert len(set(psnr.values())) == 3
    assert 0 <= by["cfg", 16, 3.0]["chroma"] <= 1 and "gain_over_cfg" not in by["cfg", 16, 3.0]
    text = gains.page(document)
    assert "guide's KID is " in text and "w = 3 has 2 sets of noise" in text
    assert text.count("\n| table | 3 |") == 2 and "2.00, 1.00" in text and "a command" in text
    assert str(tmp_path) not in text
    assert gains.measure(*where, **options, processes=2)["cells"] == document["cells"]


def test_a_fine_tune_is_measured_with_its_own_captions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gains, "TUNED_STEPS", {3.0: (2,)})
    monkeypatch.setattr(gains, "FeatureExtractor", lambda _device: Eyes())
    seen: list[str] = []

    def real(rows: Any, _cache: Path) -> np.ndarray:
        seen.extend(a.style for a in rows)
        return np.random.default_rng(0).integers(0, 256, (len(rows), 64, 64, 3), dtype=np.uint8)

    monkeypatch.setattr(gains, "real_images", real)
    out = tmp_path / "r.json"
    arguments = ["measure", "--table", "2,1", "--images", "4", "--seeds", "1", "--json", str(out)]
    gains.main([*arguments, "--base", "emoji-flat"])
    tuned = json.loads(out.read_text())
    assert set(seen) == {"flat"} and tuned["settings"]["base"] == "emoji-flat"
    assert tuned["provenance"]["command"].endswith("--base emoji-flat")
    # the U-Net is the fine-tune's: the same captions and noise give other images with the base's
    monkeypatch.setattr(gains, "STEPS", {3.0: (2,)})
    monkeypatch.setattr(gains, "captions", lambda _name, images: captions("emoji-flat", images))
    gains.main(arguments)
    document = json.loads(out.read_text())
    kids = [next(c for c in d["cells"] if c["gain"] == "cfg")["kid"]["value"] for d in (tuned, document)]
    assert kids[0] != kids[1]
    text = gains.page(document, [tuned])
    assert text.index("## 2 steps") < text.index("## In emoji-flat") < text.index("### 2 steps")
    assert "benchmarks/results/emoji-gains-flat.json" in text and "4 of its captions" in text
    row = next(c for c in tuned["cells"] if c["gain"] == "none")["gain_over_cfg"]["R@1"]
    assert f"{100 * row['value']:+.1f} [{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]" in text
