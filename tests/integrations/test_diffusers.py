"""A guide in diffusers' pipelines: the engine's images, one evaluation per step, and the pipeline is restored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pnp_trt.assets import ROOT
from pnp_trt.errors import InputError
from pnp_trt.integrations.diffusers import WIDTH, GuidedUNet, apply_guide, read_guidance, remove_guide
from pnp_trt.models.guides import FullGuide, TinyGuide
from pnp_trt.models.guides.sharpener import without_sharpener
from pnp_trt.runtime.pipeline import Pipeline

from ..models.test_guides import stirred

PROMPTS = ["a red apple", "a cat"]


def load(folder: Path) -> Any:
    pipe = StableDiffusionPipeline.from_pretrained(
        folder, safety_checker=None, local_files_only=True, torch_dtype=torch.float32
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(micro_base: Path) -> Any:
    return load(micro_base)


def latents(pipe: Any, noise: np.ndarray, w: float = 3.0, **options: Any) -> np.ndarray:
    options = {"num_inference_steps": 5} | options
    out = pipe(PROMPTS, guidance_scale=w, latents=torch.from_numpy(noise), output_type="latent", **options)
    return out.images.numpy()


def count(pipe: Any) -> list[int]:
    """Return a list to which every later U-Net evaluation appends its batch size."""
    batch_sizes: list[int] = []
    unet = pipe.unet.unet if isinstance(pipe.unet, GuidedUNet) else pipe.unet
    unet.conv_in.register_forward_pre_hook(lambda _, inputs: batch_sizes.append(len(inputs[0])))
    return batch_sizes


@pytest.mark.parametrize("schedule", ["ddim", "dpm++"])
def test_images_equal_those_of_the_engine(pipe: Any, micro_guide: Path, micro_bundles: Path, schedule: str) -> None:
    engine = Pipeline.load(micro_bundles / "guided", provider="cpu", schedule=schedule)
    if schedule == "dpm++":
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    assert apply_guide(pipe, micro_guide) is pipe
    noise = engine.noise([4, 5])
    batch_sizes = count(pipe)
    for w in (1.0, 3.0, 7.25):  # each call has its own w
        ours = engine.denoise(engine.encode(PROMPTS), noise, steps=5, guidance=w)
        np.testing.assert_allclose(latents(pipe, noise, w), ours, rtol=0, atol=1e-4 * np.abs(ours).max())
    assert batch_sizes == [2] * 15  # one evaluation per step


def test_the_bundled_guide_approximates_cfg() -> None:
    pipe = load(ROOT / "emoji")
    noise = np.random.default_rng(0).standard_normal((2, pipe.unet.config.in_channels, 8, 8), np.float32)
    plain, cfg = (latents(pipe, noise, w, num_inference_steps=8) for w in (1.0, 3.0))
    guided = latents(apply_guide(pipe, "emoji-tiny"), noise, num_inference_steps=8)
    assert np.linalg.norm(guided - cfg) < 0.9 * np.linalg.norm(plain - cfg)
    np.testing.assert_array_equal(latents(remove_guide(pipe), noise, num_inference_steps=8), cfg)


def test_remove_guide_restores_the_pipeline(pipe: Any, micro_guide: Path, tmp_path: Path) -> None:
    own, noise = pipe.unet, np.random.default_rng(0).standard_normal((2, 4, 8, 8), np.float32)
    before = latents(pipe, noise)
    apply_guide(pipe, micro_guide)
    assert not np.allclose(latents(pipe, noise), before)
    with pytest.raises(InputError, match=r"cannot be saved; call remove_guide\(pipe\) first"):
        pipe.save_pretrained(tmp_path / "no")
    apply_guide(pipe, micro_guide)  # replaces the first one
    assert pipe.unet.unet is own
    assert remove_guide(remove_guide(pipe)).unet is own and own.config.time_cond_proj_dim is None
    np.testing.assert_array_equal(latents(pipe, noise), before)
    pipe.save_pretrained(tmp_path / "yes", safe_serialization=True)
    np.testing.assert_array_equal(latents(load(tmp_path / "yes"), noise), before)


def test_other_pipelines_of_the_same_components_use_their_own_w(pipe: Any, micro_guide: Path) -> None:
    other = StableDiffusionImg2ImgPipeline(**apply_guide(pipe, micro_guide).components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    batch_sizes = count(other)
    start = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    images = [
        other("a cat", image=start, strength=0.5, guidance_scale=w, num_inference_steps=4, output_type="np",
              generator=torch.Generator().manual_seed(0)).images
        for w in (2.0, 8.0)
    ]  # fmt: skip
    assert batch_sizes == [1] * 4 and not np.array_equal(*images)


def test_sdxl_images_depend_on_w(micro_sdxl: Path) -> None:
    pipe = StableDiffusionXLPipeline.from_pretrained(micro_sdxl, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    guide = stirred(TinyGuide.from_unet(pipe.unet, rank=4, embed_dim=8))
    apply_guide(pipe, guide)
    batch_sizes = count(pipe)
    outputs = [
        pipe("a cat", guidance_scale=w, num_inference_steps=2, output_type="latent",
             generator=torch.Generator().manual_seed(0)).images
        for w in (2.0, 8.0)
    ]  # fmt: skip
    assert batch_sizes == [1] * 4 and not torch.equal(*outputs)


def test_the_full_guide_computes_its_hint_once_per_call(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    guide = stirred(FullGuide.from_unet(pipe.unet))
    noise = np.random.default_rng(0).standard_normal((2, 4, 8, 8), np.float32)
    calls: list[float] = []
    condition = FullGuide.condition

    def counted(self: FullGuide, guidance: Any, size: Any) -> Any:
        calls.append(float(guidance[0]))
        return condition(self, guidance, size)

    monkeypatch.setattr(FullGuide, "condition", counted)
    apply_guide(pipe, guide)
    assert not np.allclose(latents(pipe, noise, 2.0), latents(pipe, noise, 6.0))
    assert calls == [2.0, 6.0]


def test_a_guide_with_negative_prompts_uses_the_given_or_the_empty_one(pipe: Any) -> None:
    guide = stirred(TinyGuide.from_unet(pipe.unet, rank=4, embed_dim=8, negative_prompts=True))
    noise = np.random.default_rng(0).standard_normal((2, 4, 8, 8), np.float32)
    a = latents(apply_guide(pipe, guide), noise)
    b = latents(apply_guide(pipe, guide, negative="a red house, blurred"), noise)
    assert not np.allclose(a, b)
    np.testing.assert_array_equal(latents(apply_guide(pipe, guide, negative=""), noise), a)


def test_a_guide_with_a_sharpener_uses_only_a_given_negative_prompt(pipe: Any) -> None:
    guide = stirred(TinyGuide.from_unet(pipe.unet, rank=4, embed_dim=8, sharpener_width=8))
    noise = np.random.default_rng(0).standard_normal((2, 4, 8, 8), np.float32)
    plain, none = latents(apply_guide(pipe, guide), noise), latents(apply_guide(pipe, guide, negative=""), noise)
    np.testing.assert_array_equal(plain, none)
    assert not np.array_equal(latents(apply_guide(pipe, guide, negative="a red house, blurred"), noise), plain)
    np.testing.assert_array_equal(latents(apply_guide(pipe, without_sharpener(guide)), noise), plain)


@settings(max_examples=200)
@given(w=st.floats(1, 30), dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_w_is_read_back_from_diffusers_own_embedding(w: float, dtype: torch.dtype) -> None:
    embedding = StableDiffusionPipeline.get_guidance_scale_embedding(None, torch.tensor([w - 1, 2.0]), WIDTH).to(dtype)
    guidance = read_guidance(embedding)
    assert abs(float(guidance[0]) - w) < 2e-5 and float(guidance[1]) == 3.0


def test_incompatible_guides_and_options_are_refused(pipe: Any, micro_guide: Path, micro_base: Path) -> None:
    for name, message in (("emoji-tiny", "the guide does not fit this U-Net"), ("nope", "nope")):
        with pytest.raises(InputError, match=message):
            apply_guide(pipe, name)
    with pytest.raises(InputError, match="negative is 'rain', but the guide was distilled without"):
        apply_guide(pipe, micro_guide, negative="rain")
    with pytest.raises(InputError, match="NoneType does not leave guidance to its U-Net"):
        apply_guide(None, micro_guide)
    assert not isinstance(pipe.unet, GuidedUNet)
    apply_guide(pipe, micro_guide)
    with pytest.raises(InputError, match="guidance_scale is 0.5; it must be between 1 and 9"):
        pipe("a cat", guidance_scale=0.5, num_inference_steps=1)
    with pytest.raises(InputError, match="takes no cross_attention_kwargs"):
        pipe("a cat", num_inference_steps=1, cross_attention_kwargs={"scale": 0.5})
    own = remove_guide(pipe).unet
    own.register_to_config(time_cond_proj_dim=32)
    with pytest.raises(InputError, match="it needs no guide"):
        apply_guide(pipe, micro_guide)
