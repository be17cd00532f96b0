"""A base-model family from outside the package, with ``build`` and ``sample``.

Oracle: diffusers' DDIM scheduler around the network, run by PyTorch with classifier-free guidance.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pnp_trt.bundle.store import open_bundle
from pnp_trt.runtime.pipeline import Pipeline

from ..conftest import Result


@pytest.fixture
def folder(micro_base: Path, tmp_path: Path) -> Path:
    from convolution_family import ConvolutionDenoiser

    base = tmp_path / "convolution"
    shutil.copytree(micro_base, base)
    shutil.rmtree(base / "unet")
    torch.manual_seed(3)
    network = ConvolutionDenoiser(8, 4, 4, 32)
    network.save_pretrained(base / "unet")
    index = json.loads((base / "model_index.json").read_text()) | {"_class_name": "ConvolutionPipeline"}
    (base / "model_index.json").write_text(json.dumps(index))
    return base


def test_build_and_sample(pnp_trt: Callable[..., Result], folder: Path, tmp_path: Path) -> None:
    from convolution_family import ConvolutionDenoiser
    from diffusers import DDIMScheduler

    bundle = tmp_path / "bundle"
    done = pnp_trt("build", "--base", folder, "--guide", "none", "--out", bundle)
    assert done.code == 0, done.err
    done = pnp_trt("sample", "a red cat", "--engine", bundle, "--steps", 4, "--seed", 2, "--guidance", 4, "--quiet",
                   "--schedule", "ddim", "--provider", "cpu", "--out", tmp_path / "images")  # fmt: skip
    assert done.code == 0, done.err
    pixels = np.asarray(Image.open(done.out.strip()).convert("RGB"))

    assert open_bundle(bundle).manifest.base.name == str(folder)
    pipe = Pipeline.load(bundle, provider="cpu", threads=1)
    text = torch.from_numpy(np.concatenate([pipe.encode([""]), pipe.encode(["a red cat"])]))
    network = ConvolutionDenoiser.from_pretrained(folder / "unet").eval()
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(4)
    x = torch.from_numpy(pipe.noise([2]))
    with torch.no_grad():
        for t in scheduler.timesteps:
            empty, full = network(torch.cat([x, x]), t.repeat(2), text).chunk(2)
            x = scheduler.step(empty + 4 * (full - empty), t, x).prev_sample
    expected = pipe.decode(x.numpy())[0]
    assert np.abs(pixels.astype(int) - expected.astype(int)).max() <= 1
    assert expected.std() > 1


def test_without_the_package_the_folder_is_refused(folder: Path, cli: Callable[..., Result], tmp_path: Path) -> None:
    done = cli("build", "--base", folder, "--guide", "none", "--out", tmp_path / "no")
    assert done.code == 2, (done.out, done.err)
