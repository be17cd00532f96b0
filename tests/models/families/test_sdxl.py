"""SDXL from a folder to images, through the command line and the pipeline.

Oracle: diffusers' ``StableDiffusionXLPipeline`` on the same folder and the same noise.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion_xl import pipeline_stable_diffusion_xl_img2img as img2img
from PIL import Image

from pnp_trt.bundle.store import open_bundle
from pnp_trt.errors import InputError
from pnp_trt.integrations.diffusers import apply_guide
from pnp_trt.models.bases import resolve
from pnp_trt.models.conditioning import encode_prompts
from pnp_trt.runtime.pipeline import Pipeline
from pnp_trt.runtime.text import ImageSizes

from ...conftest import Result
from .oracle import NEGATIVE, PROMPTS, assert_same, ours, theirs, with_schedule


@pytest.fixture(scope="module")
def plain(sdxl_plain: Path) -> Pipeline:
    return Pipeline.load(sdxl_plain, provider="cpu", threads=1)


@pytest.fixture(scope="module")
def guided(sdxl_guided: Path) -> Pipeline:
    return Pipeline.load(sdxl_guided, provider="cpu", threads=1)


@pytest.fixture
def pipe(micro_sdxl: Path) -> Any:
    return theirs(micro_sdxl)


@pytest.mark.parametrize(
    ("schedule", "size", "negative", "method"),
    [
        ("ddim", (32, 32), None, "cfg"), ("euler", (16, 48), NEGATIVE, "cfg"), ("dpm++", (48, 16), None, "cfg"),
        ("ddim", (32, 32), NEGATIVE, "cfg-two-passes"), ("euler", (32, 32), None, "unguided"),
    ],
)  # fmt: skip
def test_images_equal_those_of_diffusers(
    schedule: str, size: tuple[int, int], negative: list[str] | None, method: str, plain: Pipeline, pipe: Any
) -> None:
    images, noise = ours(plain, size, guidance=4.0, method=method, schedule=schedule, negative=negative)
    reference = with_schedule(pipe, schedule)(
        PROMPTS, negative_prompt=negative, num_inference_steps=3, guidance_scale=1.0 if method == "unguided" else 4.0,
        latents=noise, height=size[0], width=size[1], output_type="np",
    ).images  # fmt: skip
    assert_same(images, reference)


def test_images_of_given_sizes_and_crop_equal_those_of_diffusers(plain: Pipeline, pipe: Any) -> None:
    sizes = ImageSizes((512, 100), (7, 900), (2048, 64))
    images, noise = ours(plain, (32, 32), guidance=4.0, method="cfg", image_sizes=sizes)
    default_images, _ = ours(plain, (32, 32), guidance=4.0, method="cfg")
    reference = pipe(
        PROMPTS, num_inference_steps=3, guidance_scale=4.0, latents=noise, height=32, width=32, output_type="np",
        original_size=sizes.original, crops_coords_top_left=sizes.crop, target_size=sizes.target,
    ).images  # fmt: skip
    assert_same(images, reference)
    assert np.abs(images.astype(int) - default_images).max() > 2


@pytest.mark.parametrize(("schedule", "size"), [("ddim", (32, 32)), ("euler", (48, 32))])
def test_guided_images_equal_those_of_apply_guide(
    schedule: str, size: tuple[int, int], guided: Pipeline, pipe: Any, sdxl_guide: Path
) -> None:
    images, noise = ours(guided, size, guidance=5.0, schedule=schedule)
    unguided, _ = ours(guided, size, guidance=1.0, schedule=schedule)
    reference = apply_guide(with_schedule(pipe, schedule), sdxl_guide)(
        PROMPTS, num_inference_steps=3, guidance_scale=5.0, latents=noise, height=size[0], width=size[1],
        output_type="np",
    ).images  # fmt: skip
    assert_same(images, reference)
    assert np.abs(images.astype(int) - unguided).max() > 2


def test_a_full_interval_is_cfg_and_an_empty_one_is_unguided(plain: Pipeline) -> None:
    """With all timesteps inside the interval, images equal those of CFG; with none, the unguided ones."""
    inside, _ = ours(plain, (32, 32), guidance=4.0, method="cfg-interval", guided_interval=(0, 999))
    outside, _ = ours(plain, (32, 32), guidance=4.0, method="cfg-interval", guided_interval=(0, 0))
    assert np.array_equal(inside, ours(plain, (32, 32), guidance=4.0, method="cfg")[0])
    assert np.array_equal(outside, ours(plain, (32, 32), guidance=4.0, method="unguided")[0])


def test_the_manifest_describes_both_text_encoders(sdxl_plain: Path, micro_sdxl: Path) -> None:
    manifest = open_bundle(sdxl_plain).manifest
    assert manifest.family == "sdxl" and manifest.text_encoders == ("text_encoder", "text_encoder_2")
    assert manifest.tokens_of("text_encoder_2").pad == 0 and manifest.tokens.pad == 49407
    assert manifest.text.zero_empty_prompt
    outputs = manifest.networks["text_encoder_2"].outputs
    assert {name: shape for name, (_, shape) in outputs.items()} == {
        "hidden_states": ("batch", 77, 20), "text_embeds": ("batch", 24),
    }  # fmt: skip
    assert manifest.networks["unet"].inputs["time_ids"] == ("float32", ("batch", 6))
    assert set(manifest.base.sha256) == {"unet", "text_encoder", "text_encoder_2", "vae", "all"}


def test_prompts_are_encoded_as_in_distillation(plain: Pipeline, micro_sdxl: Path) -> None:
    """A bundle encodes prompts as distillation does for its teacher; the empty prompt becomes zeros."""
    conditions = encode_prompts(resolve(str(micro_sdxl)), PROMPTS, torch.device("cpu"))
    text = plain.encode(PROMPTS)
    np.testing.assert_allclose(text.states, conditions.states[:-1].numpy(), atol=1e-5)
    np.testing.assert_allclose(text.added["text_embeds"], conditions.pooled[:-1].numpy(), atol=1e-5)  # type: ignore[index]
    assert not conditions.states[-1].any() and conditions.time_ids.tolist() == [32, 32, 0, 0, 32, 32]  # type: ignore[union-attr]


def test_text_states_without_pooled_text_are_refused(plain: Pipeline) -> None:
    with pytest.raises(
        InputError, match="needs text_embeds of prompts, but got only text states; pass the result of encode"
    ):
        plain.denoise(np.asarray(plain.encode(["a"])), plain.noise([0]), steps=1, guidance=2.0)


def test_sample_applies_sizes_and_crop(
    cli: Callable[..., Result], sdxl_plain: Path, plain: Pipeline, tmp_path: Path
) -> None:
    done = cli("sample", "a cat", "--engine", sdxl_plain, "--steps", 2, "--size", "16x32", "--original-size", "64x48",
               "--crop", "0x8", "--negative", "dark", "--provider", "cpu", "--quiet", "--out", tmp_path,
               "--metadata", "json")  # fmt: skip
    assert done.code == 0, done.err
    path = Path(done.out.strip())
    metadata = json.loads(path.with_suffix(".json").read_text())
    assert (metadata["original_size"], metadata["crop"], "target_size" in metadata) == ("64x48", "0x8", False)
    sizes = ImageSizes((64, 48), (0, 8))
    (expected,) = plain("a cat", steps=2, size=(16, 32), negative="dark", image_sizes=sizes)
    assert np.array_equal(np.asarray(Image.open(path)), expected.pixels)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--crop", "3", "--crop is '3'; give two whole numbers of pixels, such as 1024x768"),
        ("--original-size", "0x10", "the original size is 0x10; give two whole numbers from 1 to 65536"),
        ("--target-size", "1x99999", "the target size is 1x99999; give two whole numbers"),
    ],
)
def test_bad_sizes_are_refused(
    cli: Callable[..., Result], option: str, value: str, message: str, sdxl_plain: Path, tmp_path: Path
) -> None:
    done = cli("sample", "a cat", "--engine", sdxl_plain, option, value, "--out", tmp_path)
    assert done.code == 2 and message in " ".join(done.err.split()), done.err


def test_size_conditions_are_refused_by_engines_without_them(
    cli: Callable[..., Result], engines: Path, tmp_path: Path
) -> None:
    done = cli(
        "sample", "a cat", "--engine", engines / "plain", "--crop", "1x1", "--provider", "cpu", "--out", tmp_path
    )
    assert done.code == 2 and "takes no original size, crop or target size" in " ".join(done.err.split()), done.err


def test_verify_compares_every_output(cli: Callable[..., Result], sdxl_guided: Path) -> None:
    done = cli("verify", sdxl_guided)
    assert done.code == 0 and "text_encoder_2" in done.out, (done.out, done.err)


def test_the_torch_backend_gives_the_same_images(
    cli: Callable[..., Result], micro_sdxl: Path, sdxl_guide: Path, guided: Pipeline, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    done = cli("build", "--base", micro_sdxl, "--guide", sdxl_guide, "--backend", "torch", "--image-to-image",
               "--out", tmp_path / "torch")  # fmt: skip
    assert done.code == 0, done.err
    torch_pipe = Pipeline.load(tmp_path / "torch", provider="cpu", threads=1)
    images, _ = ours(torch_pipe, (32, 32), guidance=5.0)
    expected, _ = ours(guided, (32, 32), guidance=5.0)
    assert np.abs(images.astype(int) - expected).max() <= 1

    # image to image, compared with diffusers' pipeline with the guide
    image = np.random.default_rng(3).integers(0, 256, (32, 32, 3), np.uint8)
    noise = torch_pipe.noise([0, 1])
    latents = torch_pipe.denoise(
        torch_pipe.encode(PROMPTS[:2]), noise, steps=10, guidance=5.0, image=torch_pipe.encode_image(image[None]),
        schedule=torch_pipe.schedule(10).start(0.5),
    )  # fmt: skip
    monkeypatch.setattr(img2img, "randn_tensor", lambda *_, **__: torch.from_numpy(noise))
    kind = diffusers.StableDiffusionXLImg2ImgPipeline
    other = apply_guide(kind.from_pretrained(micro_sdxl, local_files_only=True), sdxl_guide)
    reference = other(
        PROMPTS[:2], image=[Image.fromarray(image)] * 2, strength=0.5, num_inference_steps=10, guidance_scale=5.0,
        output_type="latent",
    ).images.numpy()  # fmt: skip
    np.testing.assert_allclose(latents, reference, rtol=0, atol=1e-4 * np.abs(reference).max())
