"""A guide from outside the package, with ``distill guidance``, ``build`` and ``sample``.

Oracle: diffusers' own U-Net with the residual, computed in numpy, as its ``mid_block_additional_residual``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from safetensors.numpy import load_file

from pnp_trt.models.bases import resolve
from pnp_trt.runtime.images import read_parameters

from ..conftest import Result


def test_distil_build_and_sample(pnp_trt: Callable[..., Result], micro_base: Path, tmp_path: Path) -> None:
    prompts, guide, bundle = tmp_path / "prompts.txt", tmp_path / "mine", tmp_path / "bundle"
    prompts.write_text("a red apple\na blue car\nthe yellow house on a hill\n")
    done = pnp_trt(
        "distill", "guidance", "--guide", "channel", "--base", micro_base, "--prompts", prompts, "--out", guide,
        "--num-states", 40, "--steps", 20, "--batch", 8, "--warmup", 1, "--lr", 0.05, "--ema", 0.5, "--grid-steps", 0,
    )  # fmt: skip
    assert done.code == 0, done.err
    done = pnp_trt("build", "--base", micro_base, "--guide", guide, "--out", bundle)
    assert done.code == 0, done.err
    done = pnp_trt("sample", "a red apple", "--engine", bundle, "--steps", 2, "--quiet", "--out", tmp_path / "images")
    assert done.code == 0, done.err
    assert read_parameters(Path(done.out.strip()))["method"] == "guided"

    rng = np.random.default_rng(0)
    feed = {
        "sample": rng.standard_normal((2, 4, 8, 8), np.float32),
        "timestep": np.array([400, 900]),
        "encoder_hidden_states": rng.standard_normal((2, 77, 32), np.float32),
        "guidance": np.array([1.0, 7.0], np.float32),
    }
    (output,) = ort.InferenceSession(bundle / "unet.onnx", providers=["CPUExecutionProvider"]).run(None, feed)
    weights = load_file(guide / "diffusion_pytorch_model.safetensors")
    bias = feed["encoder_hidden_states"].mean(1) @ weights["bias.weight"].T + weights["bias.bias"]
    residual = ((feed["guidance"] - 1) / 4)[:, None] * bias
    unet = resolve(str(micro_base)).unet()
    inputs = [torch.from_numpy(feed[name]) for name in ("sample", "timestep", "encoder_hidden_states")]
    with torch.no_grad():
        plain = unet(*inputs).sample.numpy()
        size = (2, unet.config.block_out_channels[-1], 4, 4)
        added = torch.from_numpy(np.broadcast_to(residual[:, :, None, None], size).copy())
        # diffusers adds the mid block's residual only together with residuals of all four skips
        skips = (torch.zeros(1),) * 4
        expected = unet(
            *inputs, down_block_additional_residuals=skips, mid_block_additional_residual=added
        ).sample.numpy()
    assert np.abs(output - expected).max() < 1e-4 * np.abs(expected).max()
    change = np.abs(expected - plain).max(axis=(1, 2, 3))
    assert change[0] == 0 and change[1] > 0.01  # no change at w = 1; the guide is trained for higher w
