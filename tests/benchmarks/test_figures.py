"""The sampling loop of the figures against diffusers' pipeline, and the model card against its JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from benchmarks.emoji import figures  # noqa: E402  (needs torch)
from benchmarks.emoji.data import BASE_STYLES, STYLES, split  # noqa: E402
from benchmarks.emoji.figures import Ask, Sampler  # noqa: E402
from pnp_trt.errors import InputError  # noqa: E402

TOKENIZER = Path(figures.__file__).parents[2] / "pnp_trt" / "assets" / "emoji" / "tokenizer"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion folder with the bundled model's kinds of networks and a few thousand random weights."""
    from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=8, out_channels=8, block_out_channels=(16, 16), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16, attention_head_dim=2, norm_num_groups=8,
    )  # fmt: skip
    vae = AutoencoderTiny(
        latent_channels=8, encoder_block_out_channels=(8,) * 3, num_encoder_blocks=(0, 0, 0),
        decoder_block_out_channels=(8,) * 3, num_decoder_blocks=(1, 1, 1), scaling_factor=2.5,
    )  # fmt: skip
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408, hidden_size=16, intermediate_size=16, projection_dim=16, num_hidden_layers=1,
            num_attention_heads=2, bos_token_id=49406, eos_token_id=49407, pad_token_id=49407,
        )
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip
    pipeline = StableDiffusionPipeline(
        vae, text, CLIPTokenizer.from_pretrained(TOKENIZER), unet, scheduler, None, None, requires_safety_checker=False
    )
    path = tmp_path_factory.mktemp("model")
    pipeline.save_pretrained(path)
    return path


@pytest.mark.parametrize("w", [1.0, 3.0])
def test_the_loop_equals_diffusers_pipeline(folder: Path, w: float) -> None:
    from diffusers import StableDiffusionPipeline

    rows = [Ask("red-apple", "noto", 5), Ask("panda", "twemoji", 6)]
    noise = torch.stack([torch.randn((8, 16, 16), generator=torch.Generator().manual_seed(a.seed)) for a in rows])
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        [a.prompt for a in rows], latents=noise, guidance_scale=w, num_inference_steps=3, output_type="np"
    ).images
    ours = Sampler(folder)(rows, w, 3)
    assert ours.shape == (2, 64, 64, 3) and ours.dtype == np.uint8
    assert np.abs(ours / 255.0 - theirs).max() < 0.02


def test_an_image_does_not_depend_on_its_batch(folder: Path) -> None:
    rows = figures.asks(["red-apple", "panda", "fish"], BASE_STYLES, 3)
    sampler = Sampler(folder)
    apart = np.concatenate([sampler([a], 2.0, 2) for a in rows])
    assert np.abs(sampler(rows, 2.0, 2, batch=2).astype(int) - apart).max() <= 1


def test_asks_are_round_robin() -> None:
    train = split()["train"]
    rows = figures.asks(train, BASE_STYLES, 2 * len(train))
    assert len({(a.concept, a.style) for a in rows}) == len({a.seed for a in rows}) == 2 * len(train)
    assert {a.style for a in rows[:2]} == {"noto", "twemoji"}
    assert rows[:7] == figures.asks(train, BASE_STYLES, 7)


def row(value: float, half: float = 0.02, gain: float | None = None) -> dict[str, Any]:
    def estimate(v: float) -> dict[str, float]:
        return {"value": v, "low": v - half, "high": v + half, "count": 9}

    out = {"kid": estimate(1 - value), "R@1": estimate(value), "R@5": estimate(value), "chroma": 0.2, "ranks": [1, 2]}
    if gain is not None:
        out["gain_over_w1"] = {k: estimate(gain) for k in ("kid", "R@1", "R@5")}
    return out


@pytest.mark.parametrize(
    ("by_w", "helps", "apart"),
    [
        ({"1": row(0.2), "3": row(0.5, gain=0.3)}, True, True),
        ({"1": row(0.2), "3": row(0.23, gain=0.03)}, True, False),
        ({"1": row(0.2), "3": row(0.21, gain=0.01)}, False, False),
        ({"1": row(0.5), "3": row(0.2, gain=-0.3)}, False, False),
    ],
)
def test_verdict_and_card_follow_the_intervals(by_w: dict[str, Any], helps: bool, apart: bool, tmp_path: Path) -> None:
    verdict = figures.verdict(by_w)
    assert {v["helps"] for v in verdict.values()} == {helps} and {v["apart"] for v in verdict.values()} == {apart}
    real = row(0.8)
    real |= {"kid_same_captions_other_jitter": real["kid"], "kid_other_captions": real["kid"]}
    one = {"by_w": by_w, "real": real, "verdict": verdict}
    document = {
        "sets": {"train": one, "held_out": one, "held_out_colour_shape": one},
        "fine_tunes": {"flat": one},
        "autoencoder": row(0.8) | {"psnr_db": {"value": 24.0, "low": 23.0, "high": 25.0, "count": 9}},
        "provenance": {
            "weights_sha256": {"unet/x.safetensors": "abc"}, "judge_sha256": "def", "date": "2026-11-21T00:00:00",
            "command": "python -m benchmarks.emoji.figures",
            "device": {"processor": "a processor", "threads": 2}, "versions": {"torch": "2", "diffusers": "0"},
        },
        "settings": {"steps": 20, "precision": "float32"},
        "candidates": 584,
        "split": {k: len(v) for k, v in split().items()},
        "styles": {s.word: {"package": s.package, "licence": s.licence} for s in STYLES.values()},
    }  # fmt: skip
    figures.write_card(json.loads(json.dumps(document)), tmp_path / "README.md")
    card = (tmp_path / "README.md").read_text()
    assert ("**yes**" in card) == helps and ("scales do not overlap" in card) == apart
    assert "CC-BY-4.0" in card and "20.0 % [18.0, 22.0]" in card


def test_evaluate_refuses_invalid_arguments(folder: Path, tmp_path: Path) -> None:
    where = (tmp_path / "judge.safetensors", tmp_path, tmp_path / "out.json")
    with pytest.raises(InputError, match="got 2 and 20"):
        figures.evaluate(folder, {}, *where, images=2)
    with pytest.raises(InputError, match="unknown fine-tune 'oil'; known: flat, 3d"):
        figures.evaluate(folder, {"oil": tmp_path}, *where)
    with pytest.raises(InputError, match="no alignment head"):
        figures.evaluate(folder, {}, *where)
