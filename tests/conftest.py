"""Shared fixtures: a micro teacher in Stable Diffusion's format, and bundles built once per session."""

from __future__ import annotations

import gc
import inspect
import os
import random
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from hypothesis import HealthCheck, settings

from . import exports
from .commands import made_anew, made_once

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# `ci` uses the same examples everywhere and no deadline, so that a busy machine causes no failure.
# `campaign` (make campaign) uses new examples in every run.
_SLOW = [HealthCheck.too_slow]
settings.register_profile("ci", derandomize=True, deadline=None, database=None, suppress_health_check=_SLOW)
settings.register_profile("campaign", deadline=None, max_examples=1000, print_blob=True, suppress_health_check=_SLOW)
settings.load_profile("campaign" if os.environ.get("PNP_TRT_CAMPAIGN") else "ci")


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return the folder ``name``, shared by all xdist workers; the first caller fills it with ``make``."""
    return once_in(shared_root(factory), name, make)


def shared_root(factory: pytest.TempPathFactory) -> Path:
    """Return the temporary folder that all xdist workers of the run share."""
    root = factory.getbasetemp()
    return root.parent if "PYTEST_XDIST_WORKER" in os.environ else root


def once_in(root: Path, name: str, make: Callable[[Path], object]) -> Path:
    """Return the folder ``name`` below ``root``, shared by all processes; the first caller fills it with ``make``."""
    folder, state = root / "shared" / name, root / "shared-state"
    folder.parent.mkdir(parents=True, exist_ok=True)
    state.mkdir(exist_ok=True)
    done = state / f"{name.replace('/', '-')}.done"
    with FileLock(done.with_suffix(".lock")):
        if not done.exists():
            make(folder)
            done.touch()
    return folder


def finished(root: Path, kind: str) -> list[Path]:
    """Return the folders ``kind/NAME`` below ``root`` that are complete."""
    marks = (root / "shared-state").glob(f"{kind}-*.done")
    return [root / "shared" / kind / mark.stem.removeprefix(f"{kind}-") for mark in marks]


#: fixtures that load, train or export a model
HEAVY = {"micro_base", "micro_sdxl", "clip_folder", "bundle", "bundles", "compiled", "jobs", "smoke", "parts", "folder",
         "forker", "weights", "browser"}  # fmt: skip
#: folders and files whose tests take more than a few tenths of a second each: they run U-Nets or plot figures
SLOW = ("campaign", "distill", "swap", "precision", "integrations", "test_layers.py", "test_module_parity.py",
        "test_lower.py", "test_weights.py", "test_guides.py", "test_report.py", "test_figures.py", "test_cost.py",
        "test_replacing.py", "test_fidelity.py", "test_eyes.py")  # fmt: skip


#: The files with the most CPU time (2026-11-26), longest first.  Workers take whole files in this order, so that no
#: worker runs a long file alone at the end.
LONGEST = (
    "campaign/test_campaign.py", "models/families/test_sdxl_tools.py", "cli/test_sizes.py",
    "precision/int8/test_calibrate.py", "build/test_sizes.py", "bundle/test_faults.py", "distill/test_processes.py",
    "build/swap/test_lora_formula.py", "backends/test_tensorrt.py", "backends/test_torch.py",
    "distill/test_guidance.py",
)  # fmt: skip


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the longest files first; mark tests that need no model or separate process ``fast`` (``make test-fast``)."""
    place = {config.rootpath / "tests" / name: n for n, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))
    if "fast" not in config.option.markexpr:
        return  # reading the source of every test takes a while
    for item in items:
        if isinstance(item, pytest.Function) and not item.get_closest_marker("slow"):
            source = inspect.getsource(item.function)
            builds = re.search(r"subprocess|getfixturevalue|build\(|export\(|\"build\"", source)
            heavy = builds or HEAVY & set(item.fixturenames)
            if not heavy and not set(SLOW) & set(item.path.parts):
                item.add_marker("fast")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Seed every test, so that its random numbers do not depend on earlier tests in the process."""
    random.seed(0)
    _freeze_libraries()
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


_FROZEN: set[str] = set()
gc.set_threshold(50_000, 20, 20)  # collect rarely: tests leave little garbage, and a collection is slow


def _freeze_libraries() -> None:
    """Exclude the objects of large libraries, about a million, from garbage collection.

    Timing code collects often; this makes the suite a fifth faster.
    """
    loaded = {"torch", "diffusers", "transformers", "onnxscript", "torch.onnx._internal.exporter", "matplotlib"}
    if new := (loaded & sys.modules.keys()) - _FROZEN:
        _FROZEN.update(new)
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def other_kernels() -> Iterator[None]:
    """Disable ONNX Runtime's graph optimisation if ``PNP_TRT_TEST_KERNELS=plain`` is set.

    Its release builds choose kernels by the processor alone, and no variable changes that.  Unoptimised graphs use
    other kernels for convolutions and attention, with other rounding, as another processor would.
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


@pytest.fixture(autouse=True)
def shared_traces(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Share one trace per architecture in the whole run, if this process has imported the exporter."""
    if "pnp_trt.build.onnx_export" in sys.modules:
        exports.share(partial(once, tmp_path_factory))


@dataclass
class Result:
    """The exit code and output of a command."""

    code: int
    out: str
    err: str


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run ``pnp-trt ARGS`` in this process, through the real entry point."""
    from pnp_trt.cli.app import main

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["pnp-trt", *map(str, arguments)])
        monkeypatch.setattr("typer.main.get_command", made_anew if "--help" in arguments else made_once)
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
    """Save a random teacher with a few hundred thousand weights, in diffusers' format of Stable Diffusion."""
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
    # with CLIP's initialisation, text states of different prompts hardly differ; the tests need different ones
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
    exports.share(partial(once, tmp_path_factory))
    return once(tmp_path_factory, "base/micro", make_micro_base)


@pytest.fixture(scope="session")
def micro_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A micro SDXL: two text encoders, the second with pad ``!``, pooled text and sizes; do not write into it."""
    exports.share(partial(once, tmp_path_factory))
    return once(tmp_path_factory, "sdxl/micro-sdxl", make_micro_sdxl)


def make_micro_sdxl(folder: Path, seed: int = 3) -> None:
    """Save a random micro SDXL to ``folder``."""
    import torch
    from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    from pnp_trt.assets import ROOT

    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32, attention_head_dim=2, norm_num_groups=8, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 24,
    )  # fmt: skip
    first, second = (
        CLIPTextConfig(
            vocab_size=49408, hidden_size=width, intermediate_size=32, projection_dim=24, num_hidden_layers=2,
            num_attention_heads=2, bos_token_id=49406, eos_token_id=49407, pad_token_id=pad, hidden_act=activation,
        )
        for width, pad, activation in ((12, 49407, "quick_gelu"), (20, 0, "gelu"))
    )  # fmt: skip
    text, text_2 = CLIPTextModel(first), CLIPTextModelWithProjection(second)
    with torch.no_grad():  # with CLIP's initialisation, text states of different prompts hardly differ
        text.get_input_embeddings().weight.normal_(std=1.0)
        text_2.get_input_embeddings().weight.normal_(std=1.0)
    vae = AutoencoderTiny(
        latent_channels=4, encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1),
    )  # fmt: skip
    with torch.no_grad():  # keep pixels in the middle of their range, so that they are not clipped
        vae.decoder.layers[-1].weight.mul_(4)
        vae.decoder.layers[-1].bias.fill_(0.5)
    tokenizer, tokenizer_2 = (
        CLIPTokenizer.from_pretrained(ROOT / "emoji" / "tokenizer", **pad) for pad in ({}, {"pad_token": "!"})
    )
    pipeline = StableDiffusionXLPipeline(
        unet=unet, text_encoder=text, text_encoder_2=text_2, vae=vae,
        tokenizer=tokenizer, tokenizer_2=tokenizer_2, scheduler=DDIMScheduler.from_pretrained(ROOT / "emoji/scheduler"),
    )  # fmt: skip
    pipeline.save_pretrained(folder, safe_serialization=True)


def make_micro_guide(base: Path, folder: Path) -> Path:
    """Save a guide with non-zero residuals for the micro teacher in ``base``."""
    import torch

    from pnp_trt.models.bases import resolve
    from pnp_trt.models.guides import TinyGuide

    torch.manual_seed(1)  # before the guide initialises its weights, which must not depend on earlier tests
    guide = TinyGuide.from_unet(resolve(str(base)).unet(), rank=4, embed_dim=8)
    with torch.no_grad():
        for adapter in guide.adapters:
            adapter.expand.weight.normal_(std=0.1)
    guide.save_pretrained(folder)
    return folder


def make_micro_bundle(base: Path, guide: Path | None, folder: Path) -> None:
    """Build a bundle of the micro teacher with ``guide``, or without a guide and with a VAE encoder."""
    from pnp_trt.build.builder import build
    from pnp_trt.build.spec import BuildSpec

    if guide is None:
        build(BuildSpec(str(base), "none", out=folder, image_to_image=True))
    else:
        build(BuildSpec(str(base), str(guide), out=folder))


def make_micro_bundles(base: Path, guide: Path, home: Path) -> Path:
    """Build the bundles ``plain`` (with a VAE encoder) and ``guided`` of the micro teacher below ``home``."""
    make_micro_bundle(base, None, home / "plain")
    make_micro_bundle(base, guide, home / "guided")
    return home


@pytest.fixture(scope="session")
def micro_guide(micro_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A guide with non-zero residuals for the micro teacher; do not write into it."""
    return once(tmp_path_factory, "guide/micro-guide", partial(make_micro_guide, micro_base))


@pytest.fixture(scope="session")
def sharpened_guide(micro_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny guide with a sharpener, without zero weights; do not write into it."""
    return once(tmp_path_factory, "guide/sharpened", partial(make_sharpened_guide, micro_base))


def make_sharpened_guide(base: Path, folder: Path) -> None:
    """Save a tiny guide with a sharpener for the micro teacher in ``base``."""
    import torch

    from pnp_trt.models.bases import resolve
    from pnp_trt.models.guides import TinyGuide

    torch.manual_seed(4)
    guide = TinyGuide.from_unet(resolve(str(base)).unet(), rank=4, embed_dim=8, sharpener_width=8)
    with torch.no_grad():
        for p in guide.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    guide.save_pretrained(folder)


@pytest.fixture(scope="session")
def micro_bundles(micro_base: Path, micro_guide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the micro bundles ``plain`` (with a VAE encoder) and ``guided``; do not write into it."""
    guides = {"guided": micro_guide, "plain": None}
    # workers that need both at the same time start with different ones
    swap = os.environ.get("PYTEST_XDIST_WORKER", "").endswith(("1", "3"))
    for name in sorted(guides, reverse=swap):
        once(tmp_path_factory, f"engines/{name}", partial(make_micro_bundle, micro_base, guides[name]))
    return once(tmp_path_factory, "engines", lambda _: None)


@pytest.fixture
def engines(micro_bundles: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``micro_bundles``, with ``PNP_TRT_ENGINES`` set to it."""
    monkeypatch.setenv("PNP_TRT_ENGINES", str(micro_bundles))
    return micro_bundles


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP with random weights and its tokenizer, in transformers' format; do not write into it."""
    return once(tmp_path_factory, "clip/tiny", make_clip)


def make_clip(folder: Path) -> None:
    """Save a small random CLIP to ``folder``."""
    import shutil

    import torch
    from transformers import CLIPConfig, CLIPModel

    from pnp_trt.assets import ROOT

    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
             "projection_dim": 8}  # fmt: skip
    text = small | {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
    config = CLIPConfig(text_config=text, vision_config=small | {"image_size": 16, "patch_size": 8}, projection_dim=8)
    model = CLIPModel(config)
    with torch.no_grad():  # with CLIP's initialisation, text states of different prompts hardly differ
        model.text_model.embeddings.token_embedding.weight.normal_(std=1.0)
    model.save_pretrained(folder)
    for file in (ROOT / "emoji" / "tokenizer").iterdir():
        shutil.copy(file, folder)
