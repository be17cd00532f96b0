"""Bundles sampled with every schedule and from images, compared with diffusers' pipelines; threads and cancelling."""

from __future__ import annotations

import functools
import itertools
import re
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import pnp_trt
from pnp_trt.errors import InputError
from pnp_trt.runtime.pipeline import Pipeline
from pnp_trt.sampling.schedules import SCHEDULES

from ..bundles import reseal

PROMPTS = ["a red apple", "a cat"]


@pytest.fixture(scope="module")
def plain(micro_bundles: Path) -> Pipeline:
    return Pipeline.load(micro_bundles / "plain", provider="cpu")


@pytest.fixture(scope="module")
def guided(micro_bundles: Path) -> Pipeline:
    return Pipeline.load(micro_bundles / "guided", provider="cpu")


@pytest.fixture(scope="module")
def start_image() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (32, 32, 3), np.uint8)


Edit = Callable[[dict[str, Any]], None]


@pytest.fixture
def edited(micro_bundles: Path, tmp_path: Path) -> Callable[[str, Edit], Path]:
    """Return a function that copies a bundle, edits the copy's manifest and seals it again."""

    def make(name: str, edit: Edit) -> Path:
        folder = Path(shutil.copytree(micro_bundles / name, tmp_path / name))
        reseal(folder, edit, files=False)
        return folder

    return make


def theirs(kind: str, base: Path, schedule: str, **changes: Any) -> Any:
    """Return diffusers' pipeline with its scheduler for ``schedule``, from the teacher's config with changes."""
    import diffusers

    pipeline, config = opened(kind, base)
    pipeline.scheduler = getattr(diffusers, SCHEDULES.get(schedule).diffusers_class).from_config(config, **changes)
    return pipeline


@functools.cache
def opened(kind: str, base: Path) -> tuple[Any, Any]:
    """Load a diffusers pipeline and return it with its scheduler's config."""
    import diffusers

    pipeline = getattr(diffusers, kind).from_pretrained(base, safety_checker=None, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, pipeline.scheduler.config


#: what users change in a scheduler's config
CHANGES: dict[str, dict[str, Any]] = {
    "trailing": {"timestep_spacing": "trailing"},
    "leading": {"timestep_spacing": "leading"},
    "v-trailing": {"timestep_spacing": "trailing", "prediction_type": "v_prediction"},
    "v-leading": {"timestep_spacing": "leading", "prediction_type": "v_prediction"},
    "v-zero-snr": {"timestep_spacing": "trailing", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
}


@pytest.mark.parametrize(
    ("schedule", "changes"),
    # diffusers' Heun does not read rescale_betas_zero_snr
    [pair for pair in itertools.product(SCHEDULES, CHANGES) if pair != ("heun", "v-zero-snr")],
)
def test_images_equal_those_of_diffusers(
    schedule: str, changes: str, micro_base: Path, edited: Callable[[str, Edit], Path]
) -> None:
    options = CHANGES[changes]
    folder = edited("plain", lambda m: m["scheduler"].update(options))
    ours = Pipeline.load(folder, provider="cpu", schedule=schedule)
    noise = ours.noise([4, 5])
    latents = ours.denoise(ours.encode(PROMPTS), noise, steps=7, guidance=3.0, method="cfg")
    reference = theirs("StableDiffusionPipeline", micro_base, schedule, **options)(
        PROMPTS, num_inference_steps=7, guidance_scale=3.0, latents=torch.from_numpy(noise), output_type="latent"
    ).images.numpy()
    np.testing.assert_allclose(latents, reference, rtol=0, atol=1e-4 * np.abs(reference).max())


@pytest.mark.parametrize("strength", [0.35, 0.8, 1.0])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_image_to_image_equals_that_of_diffusers(
    schedule: str, strength: float, plain: Pipeline, start_image: np.ndarray, micro_base: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_img2img as module

    noise = plain.noise([4, 5])
    image = plain.encode_image(start_image[None])
    table = plain.schedule(10, schedule).start(strength)
    latents = plain.denoise(
        plain.encode(PROMPTS), noise, steps=10, guidance=3.0, method="cfg", schedule=table, image=image
    )
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: torch.from_numpy(noise))
    reference = theirs("StableDiffusionImg2ImgPipeline", micro_base, schedule, timestep_spacing="trailing")(
        PROMPTS, image=[Image.fromarray(start_image)] * 2, strength=strength, num_inference_steps=10,
        guidance_scale=3.0, output_type="latent",
    ).images.numpy()  # fmt: skip
    np.testing.assert_allclose(latents, reference, rtol=0, atol=1e-4 * np.abs(reference).max())


def test_a_variational_encoder_returns_its_mean() -> None:
    from diffusers import AutoencoderKL

    from pnp_trt.models.wrappers import VaeEncoder

    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=8, scaling_factor=0.18).eval()
    x = torch.rand(2, 3, 8, 8) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(VaeEncoder(vae)(x), vae.encode(x).latent_dist.mean * 0.18)


def test_a_low_strength_stays_near_the_image(plain: Pipeline, start_image: np.ndarray) -> None:
    start = plain.encode_image(start_image[None])
    distances = []
    for strength in (0.1, 0.5, 1.0):
        table = plain.schedule(20).start(strength)
        latents = plain.denoise(
            plain.encode(PROMPTS[:1]), plain.noise([0]), steps=20, guidance=1.0, schedule=table, image=start
        )
        distances.append(float(np.linalg.norm(latents - start)))
    assert distances[0] < distances[1] < distances[2]


def test_parameters_record_the_schedule_and_the_starting_image(
    plain: Pipeline, start_image: np.ndarray, tmp_path: Path
) -> None:
    parameters = plain("a cat", steps=4, schedule="dpm++")[0].parameters
    assert parameters["schedule"] == "dpm++" and "init" not in parameters
    Image.fromarray(start_image).save(tmp_path / "start.png")
    from_file = plain("a cat", steps=4, schedule="euler", init=tmp_path / "start.png", strength=0.5)[0]
    assert from_file.parameters["init"] == str(tmp_path / "start.png") and from_file.parameters["strength"] == 0.5
    from_array = plain("a cat", steps=4, schedule="euler", init=start_image, strength=0.5)[0]
    assert np.array_equal(from_file.pixels, from_array.pixels)


def test_an_image_of_another_size_is_resized_with_a_warning(plain: Pipeline, tmp_path: Path) -> None:
    Image.new("RGBA", (64, 48), (255, 0, 0, 0)).save(tmp_path / "large.png")
    with pytest.warns(UserWarning, match="is 64 × 48 and was resized to the engine's 32 × 32"):
        clear = plain("a cat", steps=4, init=tmp_path / "large.png", strength=0.25)[0]
    white = np.full((32, 32, 3), 255, np.uint8)
    assert np.array_equal(clear.pixels, plain("a cat", steps=4, init=white, strength=0.25)[0].pixels)


def test_bad_images_are_refused(plain: Pipeline, guided: Pipeline, start_image: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / "no.png").write_text("not an image")
    Image.fromarray(start_image).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:200])
    for init, message in (
        (tmp_path / "none.png", "none.png does not exist"),
        (tmp_path / "no.png", "no.png is not an image that can be read; give a PNG"),
        (tmp_path / "cut.png", "cut.png cannot be read"),
        (tmp_path, "is not a file"),
        (start_image.astype(np.float32), r"is float32 of shape \[32, 32, 3\]; pass uint8"),
    ):
        with pytest.raises(InputError, match=message):
            plain("a cat", steps=4, init=init)
    with pytest.raises(InputError, match=r"'guided' has no VAE encoder.*pnp-trt build .* --image-to-image --force"):
        guided("a cat", steps=4, init=start_image)
    with pytest.raises(InputError, match="no starting image was given"):
        plain("a cat", steps=4, strength=0.5)
    with pytest.raises(InputError, match="strength is 1.5; it must be above 0 and at most 1"):
        plain("a cat", steps=4, init=start_image, strength=1.5)


def test_the_teachers_schedule_is_the_default(edited: Callable[[str, Edit], Path], plain: Pipeline) -> None:
    assert plain.default_schedule == "ddim" and plain.bundle.manifest.scheduler["_class_name"] == "DDIMScheduler"
    folder = edited("plain", lambda m: m["scheduler"].update(_class_name="EulerDiscreteScheduler"))
    euler = Pipeline.load(folder, provider="cpu")
    assert euler("a cat", steps=3)[0].parameters["schedule"] == "euler"
    assert np.array_equal(euler("a cat", steps=3)[0].pixels, plain("a cat", steps=3, schedule="euler")[0].pixels)
    assert Pipeline.load(folder, provider="cpu", schedule="ddim").default_schedule == "ddim"
    with pytest.raises(InputError, match=r"schedule is 'plms'; known: ddim, dpm\+\+, euler, heun, unipc, teacher"):
        Pipeline.load(folder, provider="cpu", schedule="plms")


def test_a_guide_distilled_for_ddim_steps_warns_under_another_schedule(edited: Callable[[str, Edit], Path]) -> None:
    def fast(manifest: dict[str, Any]) -> None:
        manifest["guide"]["sampling_steps"] = 3
        manifest["scheduler"]["_class_name"] = "EulerDiscreteScheduler"

    pipeline = Pipeline.load(edited("guided", fast), provider="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pipeline("a cat")[0].parameters["schedule"] == "ddim"
    with pytest.warns(UserWarning, match=re.escape("was distilled under DDIM and is run with dpm++")):
        pipeline("a cat", schedule="dpm++")


def test_threads_share_a_pipeline(plain: Pipeline) -> None:
    """Concurrent calls with different prompts, seeds, scales, schedules and steps give the same images as alone."""

    def generate(i: int) -> np.ndarray:
        prompts = PROMPTS[: 1 + i % 2]
        names = list(SCHEDULES)
        images = plain(prompts, steps=2 + i % 3, seed=i, guidance=1.5 + i, method="cfg", schedule=names[i % 3])
        return np.stack([p.pixels for p in images])

    alone = [generate(i) for i in range(6)]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(2):
            for got, expected in zip(pool.map(generate, range(6)), alone, strict=True):
                assert np.array_equal(got, expected)


def test_a_callback_that_returns_false_cancels(plain: Pipeline) -> None:
    calls: list[tuple[int, int]] = []

    def stop(done: int, total: int) -> bool:
        calls.append((done, total))
        return done < 3

    with pytest.raises(pnp_trt.Cancelled, match="cancelled after 3 of 8 steps"):
        plain("a cat", steps=8, callback=stop)
    assert calls == [(1, 8), (2, 8), (3, 8)]
    assert plain("a cat", steps=2, callback=lambda i, n: None)[0].pixels.shape == (32, 32, 3)
