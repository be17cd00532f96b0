"""Negative prompts through a sharpener: the measurement on few images, and guides that it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("efficientnet_lite_pytorch")

from benchmarks.emoji import negative  # noqa: E402  (needs torch)
from pnp_trt.models.guides.load import load_guide  # noqa: E402
from pnp_trt.models.guides.sharpener import with_new_sharpener  # noqa: E402


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The bundled guide with a random sharpener."""
    torch.manual_seed(0)
    guide = with_new_sharpener(load_guide("emoji-tiny"), 8)
    torch.nn.init.normal_(guide.sharpener.leave.weight, std=0.05)
    guide.save_pretrained(tmp_path / "guide")
    return tmp_path / "guide"


def test_the_gain_of_a_row_is_the_difference_of_both_guides(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    negative.main(["--guide", str(folder), "--images", "4", "--steps", "2", "--json", str(out)])
    document = json.loads(out.read_text())
    assert [row["w"] for row in document["rows"]] == list(negative.SCALES)
    for row in document["rows"]:
        gain = row["sharpener"]["psnr_db"]["value"] - row["without"]["psnr_db"]["value"]
        assert row["sharpener"]["gain"]["psnr_db"]["value"] == pytest.approx(gain, abs=1e-6) and gain != 0
        assert set(row) == {"w", "sharpener", "without", "cfg, negative ignored"} and "gain" not in row["without"]


def test_cfg_with_negative_prompts_equals_diffusers() -> None:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    from benchmarks.emoji.cells import TEACHER
    from benchmarks.emoji.runner import captions
    from benchmarks.emoji.sampler import Sampler
    from pnp_trt.models.bases import resolve

    base, steps, w = resolve(TEACHER).folder, 3, 3.0
    sampler = Sampler(base)
    pixels = negative.sample(sampler, {"cfg": negative.cfg(sampler.unet, 4)}, 4, steps, w)["cfg"]
    pipe = StableDiffusionPipeline.from_pretrained(base, safety_checker=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    rows = captions("train", 4)
    noise = torch.stack([torch.randn((8, 16, 16), generator=torch.Generator().manual_seed(a.seed)) for a in rows])
    expected = pipe(
        prompt=[a.prompt for a in rows], negative_prompt=[a.prompt for a in rows[2:] + rows[:2]], latents=noise,
        num_inference_steps=steps, guidance_scale=w, output_type="np",
    ).images  # fmt: skip
    assert np.abs(pixels.astype(float) - np.round(expected * 255)).max() <= 1


def test_rivals_are_compared_with_the_sharpener_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Untrained rivals add nothing, so their images are those without guidance; the record names the baseline."""
    from safetensors.torch import save_file

    from benchmarks.emoji.rivals.train import make
    from pnp_trt.models.bases import resolve

    unet, out = resolve("emoji").unet(), tmp_path / "r.json"
    names = ("sharpener", "tiny+sharpener")
    for name in names:
        save_file(make(name, unet, 0).state_dict(), tmp_path / f"{name}.safetensors")
    record = {"rivals": {name: {"negative": True} for name in names}}
    (tmp_path / "train.json").write_text(json.dumps(record))
    arguments = ["--rivals", str(tmp_path), "--images", "4", "--steps", "2", "--json", str(out)]
    negative.main(arguments)
    document = json.loads(out.read_text())
    assert document["settings"]["baseline"] == "sharpener" and document["rivals"] == record["rivals"]
    for row in document["rows"]:
        assert row["tiny+sharpener"]["gain"]["psnr_db"]["value"] == pytest.approx(0, abs=1e-3)
        assert "gain" not in row["sharpener"] and row["sharpener"]["psnr_db"]["value"] < 60
    record["rivals"]["sharpener"] = {}
    (tmp_path / "train.json").write_text(json.dumps(record))
    with pytest.raises(SystemExit):
        negative.main(arguments)
    assert "must contain rivals trained with negative prompts" in capsys.readouterr().err


def test_a_guide_without_a_sharpener_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        negative.main(["--guide", "emoji-tiny", "--images", "4"])
    assert "has no sharpener; train one with: pnp-trt distill guidance --sharpen" in capsys.readouterr().err
