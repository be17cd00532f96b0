"""Shared fixtures: a micro teacher in Stable Diffusion's format, and bundles built once a session."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# `ci` tries the same examples everywhere and measures no time: a busy machine is not a failure.
# `campaign` (make campaign) tries new examples at every run.
_SLOW = [HealthCheck.too_slow]
settings.register_profile("ci", derandomize=True, deadline=None, database=None, suppress_health_check=_SLOW)
settings.register_profile("campaign", deadline=None, max_examples=1000, print_blob=True, suppress_health_check=_SLOW)
settings.load_profile("campaign" if os.environ.get("PNP_TRT_CAMPAIGN") else "ci")


@pytest.fixture(scope="session", autouse=True)
def other_kernels() -> Iterator[None]:
    """ONNX Runtime without graph optimisation, where ``PNP_TRT_TEST_KERNELS=plain`` asks for it.

    Its release builds choose kernels by the processor alone and honour no variable; its unoptimised graphs run
    convolutions and attention by other kernels, with other rounding, as another processor would.
    """
    if os.environ.get("PNP_TRT_TEST_KERNELS") != "plain":
        yield
        return
    import onnxruntime as ort

    class Plain(ort.InferenceSession):
        def __init__(self, model: Any, sess_options: Any = None, *rest: Any, **options: Any) -> None:
            sess_options = sess_options or ort.SessionOptions()
            sess_options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            super().__init__(model, sess_options, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ort, "InferenceSession", Plain)
        yield


@dataclass
class Result:
    """What a command did."""

    code: int
    out: str
    err: str


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run ``pnp-trt ARGS`` in this process, through the real entry point."""
    from pnp_trt.cli.app import main

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["pnp-trt", *map(str, arguments)])
        capfd.readouterr()
        try:
            main()
            code = 0
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
        captured = capfd.readouterr()
        return Result(code, captured.out, captured.err)

    return run


def make_micro_base(folder: Path, seed: int = 0) -> Path:
    """A random teacher of a few hundred thousand weights, saved as diffusers saves Stable Diffusion."""
    import torch
    from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from pnp_trt.assets import ROOT

    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32, attention_head_dim=2, norm_num_groups=8,
    )  # fmt: skip
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408, hidden_size=32, intermediate_size=64, projection_dim=32, num_hidden_layers=1,
            num_attention_heads=2, bos_token_id=49406, eos_token_id=49407, pad_token_id=49407,
        )
    )  # fmt: skip
    # initialised as CLIP is, prompts of an untrained encoder hardly differ; the tests need ones that do
    with torch.no_grad():
        text.get_input_embeddings().weight.normal_(std=1.0)
    vae = AutoencoderTiny(
        latent_channels=4, encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1),
    )  # fmt: skip
    pipeline = StableDiffusionPipeline(
        unet=unet, text_encoder=text, vae=vae, tokenizer=CLIPTokenizer.from_pretrained(ROOT / "emoji" / "tokenizer"),
        scheduler=DDIMScheduler.from_pretrained(ROOT / "emoji" / "scheduler"), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="session")
def micro_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A micro teacher's folder; do not write into it."""
    return make_micro_base(tmp_path_factory.mktemp("base") / "micro")


@pytest.fixture(scope="session")
def micro_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A micro SDXL: two text encoders, pooled text and sizes; do not write into it."""
    import torch
    from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    from pnp_trt.assets import ROOT

    torch.manual_seed(3)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32, attention_head_dim=2, norm_num_groups=8, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 16,
    )  # fmt: skip
    text = CLIPTextConfig(
        vocab_size=49408, hidden_size=16, intermediate_size=32, projection_dim=16, num_hidden_layers=2,
        num_attention_heads=2, bos_token_id=49406, eos_token_id=49407, pad_token_id=49407,
    )  # fmt: skip
    vae = AutoencoderTiny(
        latent_channels=4, encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1),
    )  # fmt: skip
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "emoji" / "tokenizer")
    pipeline = StableDiffusionXLPipeline(
        unet=unet, text_encoder=CLIPTextModel(text), text_encoder_2=CLIPTextModelWithProjection(text), vae=vae,
        tokenizer=tokenizer, tokenizer_2=tokenizer, scheduler=DDIMScheduler.from_pretrained(ROOT / "emoji/scheduler"),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("sdxl") / "micro-sdxl"
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def make_micro_guide(base: Path, folder: Path) -> Path:
    """A guide for the micro teacher in ``base``, whose residuals are not zero."""
    import torch

    from pnp_trt.models.bases import resolve
    from pnp_trt.models.guides import TinyGuide

    torch.manual_seed(1)  # before the guide draws its own weights: they must not depend on which tests ran first
    guide = TinyGuide.from_unet(resolve(str(base)).unet(), rank=4, embed_dim=8)
    with torch.no_grad():
        for adapter in guide.adapters:
            adapter.expand.weight.normal_(std=0.1)
    guide.save_pretrained(folder)
    return folder


def make_micro_bundles(base: Path, guide: Path, home: Path) -> Path:
    """The bundles ``plain`` (with a VAE encoder) and ``guided`` of the micro teacher, below ``home``."""
    from pnp_trt.build.builder import build
    from pnp_trt.build.spec import BuildSpec

    build(BuildSpec(str(base), "none", out=home / "plain", image_to_image=True))
    build(BuildSpec(str(base), str(guide), out=home / "guided"))
    return home


@pytest.fixture(scope="session")
def micro_guide(micro_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A guide for the micro teacher whose residuals are not zero."""
    return make_micro_guide(micro_base, tmp_path_factory.mktemp("guide") / "micro-guide")


@pytest.fixture(scope="session")
def micro_bundles(micro_base: Path, micro_guide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the bundles ``plain`` (with a VAE encoder) and ``guided`` of the micro teacher; read it only."""
    return make_micro_bundles(micro_base, micro_guide, tmp_path_factory.mktemp("engines"))


@pytest.fixture
def engines(micro_bundles: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``micro_bundles`` as the engines' home."""
    monkeypatch.setenv("PNP_TRT_ENGINES", str(micro_bundles))
    return micro_bundles


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of random weights with its tokenizer, as transformers saves it; do not write into it."""
    import shutil

    import torch
    from transformers import CLIPConfig, CLIPModel

    from pnp_trt.assets import ROOT

    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
             "projection_dim": 8}  # fmt: skip
    text = small | {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
    config = CLIPConfig(text_config=text, vision_config=small | {"image_size": 16, "patch_size": 8}, projection_dim=8)
    folder = tmp_path_factory.mktemp("clip") / "tiny"
    model = CLIPModel(config)
    with torch.no_grad():  # initialised as CLIP is, prompts of an untrained one hardly differ
        model.text_model.embeddings.token_embedding.weight.normal_(std=1.0)
    model.save_pretrained(folder)
    for file in (ROOT / "emoji" / "tokenizer").iterdir():
        shutil.copy(file, folder)
    return folder
