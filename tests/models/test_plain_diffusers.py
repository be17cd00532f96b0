"""Plain diffusers loads the bundled model, and models saved by its recipe, without a ``torch_dtype``."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from benchmarks.emoji.stages import write_pipeline
from pnp_trt.assets import ROOT

EMOJI = ROOT / "emoji"


@pytest.fixture(scope="module")
def saved_by_the_recipe(micro_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The micro teacher, saved by the recipe's last stage."""
    out = tmp_path_factory.mktemp("recipe")
    (out / "tokenizer").mkdir()
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(EMOJI / "tokenizer" / name, out / "tokenizer" / name)
    context = SimpleNamespace(out=out, tokenizer=CLIPTokenizer.from_pretrained(EMOJI / "tokenizer"))
    write_pipeline(
        context, UNet2DConditionModel.from_pretrained(micro_base / "unet"),
        CLIPTextModel.from_pretrained(micro_base / "text_encoder"),
        AutoencoderTiny.from_pretrained(micro_base / "vae"), out / "saved",
    )  # fmt: skip
    return out / "saved"


@pytest.mark.parametrize("folder", ["bundled", "recipe"])
def test_plain_diffusers_generates(folder: str, saved_by_the_recipe: Path) -> None:
    path = EMOJI if folder == "bundled" else saved_by_the_recipe
    pipe = StableDiffusionPipeline.from_pretrained(path, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    assert {n.dtype for n in (pipe.unet, pipe.text_encoder, pipe.vae)} == {torch.float32}
    generator = torch.Generator().manual_seed(0)
    image = np.asarray(pipe("red apple, noto style", num_inference_steps=2, generator=generator).images[0])
    assert image.std() > 1  # not a single colour


def test_a_requested_dtype_is_used() -> None:
    pipe = StableDiffusionPipeline.from_pretrained(EMOJI, safety_checker=None, torch_dtype=torch.float16)
    assert {n.dtype for n in (pipe.unet, pipe.text_encoder, pipe.vae)} == {torch.float16}
