"""A LoRA for few steps against the stage-2 guide: the measurement on few images, and its page."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("efficientnet_lite_pytorch")

from safetensors.torch import save_file  # noqa: E402  (needs torch)

from benchmarks.emoji import gpu_steps, step_lora  # noqa: E402
from pnp_trt.assets import ROOT as ASSETS  # noqa: E402
from pnp_trt.models.bases import resolve  # noqa: E402
from tests.test_words import findings, prose  # noqa: E402


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """Files as ``gpu_train`` writes them: a LoRA with small changes, and a guide."""
    torch.manual_seed(0)
    unet = gpu_steps.add_lora(resolve("emoji").unet())
    with torch.no_grad():
        for p in (p for p in unet.parameters() if p.requires_grad):
            p.add_(0.02 * torch.randn_like(p))
    out = tmp_path / "gpu"
    out.mkdir()
    save_file({k: v.contiguous() for k, v in gpu_steps.lora_state(unet).items()}, out / "step-lora-8.safetensors")
    part = {"steps": 3, "batch": 256, "rank": 8, "log": [1]}
    parts = {"step lora 16": part, "step lora 8": part, "guide step lora": part, "guide tiny": part}
    (out / "train.json").write_text(json.dumps({"parts": parts}))
    shutil.copytree(ASSETS / "guides/emoji-tiny", tmp_path / "guides/step-lora-8")
    return tmp_path


def test_rows_are_measured_and_the_page_is_written(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fewer = {m: (name, kind, 2) for m, (name, kind, _) in step_lora.METHODS.items()}
    monkeypatch.setattr(step_lora, "METHODS", fewer)
    monkeypatch.setattr(step_lora, "real_images", lambda rows, cache: noise(len(rows)))
    out, page = trained / "r.json", trained / "page.md"
    step_lora.main(
        ["measure", "--from", str(trained / "gpu"), "--guides", str(trained / "guides"), "--images", "4",
         "--batch", "4", "--cache", str(trained / "cache"), "--json", str(out)]
    )  # fmt: skip
    document = json.loads(out.read_text())
    rows = {(r["method"], r["w"]): r for r in document["rows"]}
    assert len(rows) == len(fewer) * len(step_lora.SCALES)
    assert [rows[m, 3.0]["evaluations"] for m in ("cfg", "cfg+lora", "none", "tiny+lora")] == [4, 4, 2, 2]
    # the LoRA affects only its own rows; here CFG has the same number of steps as its reference, so both are equal
    assert rows["cfg", 3.0]["distance_to_cfg"]["feature_cosine"]["value"] == pytest.approx(1)
    assert rows["cfg+lora", 3.0]["distance_to_cfg"]["psnr_db"]["value"] < 60
    assert rows["none", 3.0]["kid"] == rows["none", 5.0]["kid"]
    assert set(document["training"]) == {"step lora 16", "step lora 8", "guide step lora"}
    step_lora.main(["report", "--json", str(out), "--document", str(page)])
    text = page.read_text()
    assert text.count("| tiny guide, step LoRA | 2 | 2 |") == 2 and "rank 8" in text
    assert not findings(prose(text))

    with pytest.raises(SystemExit):
        step_lora.main(["measure", "--from", str(trained / "none"), "--images", "4"])
    assert (
        "step-lora-8.safetensors does not exist; run: python -m benchmarks.emoji.gpu_train train"
        in capsys.readouterr().err
    )


def noise(count: int) -> Any:
    import numpy as np

    return np.random.default_rng(0).integers(0, 255, (count, 64, 64, 3)).astype(np.uint8)


def test_findings_follow_the_intervals() -> None:
    def row(method: str, gains: dict[str, tuple[float, float]]) -> dict[str, Any]:
        over = {
            k: {n: {"value": 0.0, "low": low, "high": high} for n in ("kid", "R@1")} for k, (low, high) in gains.items()
        }
        return {"method": method, "w": 3.0, "gain_over": over}

    text = step_lora.finding([
        row("cfg+lora", {"cfg": (0.1, 0.2)}), row("tiny", {}),
        row("tiny+lora", {"cfg": (-0.2, -0.1), "tiny-8": (-0.1, 0.1)}),
    ])  # fmt: skip
    assert "8 steps, *CFG, step LoRA* is shown to be better than *CFG* by KID" in text
    assert "8 steps, *tiny guide, step LoRA* is shown to be worse than *CFG* by KID" in text
    assert "*tiny guide, step LoRA* is not shown to differ from *tiny guide of stage 2*" in text
