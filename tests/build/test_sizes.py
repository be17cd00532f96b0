"""Graphs with open sizes: the plan, the export, and parity at sizes other than the traced one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pnp_trt.backends.onnxruntime.backend import OrtNetwork
from pnp_trt.build.onnx_export import export
from pnp_trt.build.parity import relative_error
from pnp_trt.build.sizes import OpenAxis, plan_sizes
from pnp_trt.bundle.profiles import Profile
from pnp_trt.errors import InputError
from pnp_trt.graph.lower import for_onnxruntime_cpu
from pnp_trt.models.bases import resolve
from pnp_trt.models.guides import GUIDES
from pnp_trt.models.random import RandomBase
from pnp_trt.models.student import Student
from pnp_trt.models.teacher import Sizes
from pnp_trt.models.wrappers import VaeDecoder

#: sizes of Stable Diffusion 1.5
SD15 = Sizes((4, 64, 64), 768, 49408, 8, 64)


def plan(*texts: str, sizes: Sizes = SD15) -> Any:
    return plan_sizes([Profile.parse(t) for t in texts], sizes)


def test_models_state_the_multiple_of_their_sizes() -> None:
    assert resolve("random:sd15").sizes() == SD15
    assert resolve("emoji").sizes().multiple == 8


def test_without_sizes_no_axis_is_open() -> None:
    planned = plan("b1", "b2-8")
    assert (planned.default, planned.second, planned.open_axes) == ((512, 512), None, ())
    assert [p.as_dict() for p in planned.profiles] == [Profile.parse(t).as_dict() for t in ("b1", "b2-8")]
    one = plan("b1@512x512", "b2-8")
    assert (one.default, one.second, one.open_axes) == ((512, 512), None, ())
    latents = torch.zeros(2, 4, 64, 64)
    assert one.traced("unet", latents) is latents  # so the graph is byte-identical to the fixed one
    assert [p.name for p in one.for_any_batch().profiles] == ["b1-32@512x512"]
    assert plan().for_any_batch().profiles == ()


def test_only_axes_that_differ_are_open() -> None:
    planned = plan("b1", "b1@512x768")
    assert planned.open_axes == (OpenAxis("width", 3, 8, 12, 8),)
    assert (planned.default, planned.second) == ((512, 512), (512, 768))
    assert planned.named("unet", (2, 4, 64, 64)) == ["batch", 4, 64, "width"]
    assert planned.named("unet", (2, 4, 64, 64), output=True) == ["batch", 4, 64, "width"]
    assert planned.named("vae_decoder", (2, 3, 512, 512), output=True) == ["batch", 3, 512, "image_width"]
    assert tuple(planned.traced("unet", torch.zeros(2, 4, 64, 64)).shape) == (2, 4, 64, 96)
    prompt = torch.zeros(2, 77, 768)
    assert planned.traced("unet", prompt) is prompt


def test_the_open_axes_of_an_encoder_are_in_pixels() -> None:
    planned = plan("b1", "b1@512x768")
    assert planned.named("vae_encoder", (2, 3, 512, 512)) == ["batch", 3, 512, "width"]
    assert planned.named("vae_encoder", (2, 4, 64, 64), output=True) == ["batch", 4, 64, "latent_width"]
    assert tuple(planned.traced("vae_encoder", torch.zeros(2, 3, 512, 512)).shape) == (2, 3, 512, 768)


def test_prompt_chunks_open_the_token_axis_of_the_unet_only() -> None:
    planned = plan("b1").for_chunks(77, 3)
    assert planned.axes("unet") == (OpenAxis("tokens", 1, 1, 3, 77, rank=3),) and planned.axes("text_encoder") == ()
    assert planned.named("unet", (2, 77, 768)) == ["batch", "tokens", 768]
    assert planned.named("text_encoder", (2, 77, 768), output=True) == ["batch", 77, 768]
    assert tuple(planned.traced("unet", torch.zeros(2, 77, 768)).shape) == (2, 231, 768)
    assert plan("b1").for_chunks(77, 1) == plan("b1")


def test_the_models_own_size_is_the_default_if_it_is_legal() -> None:
    planned = plan("b1@256-768")
    assert planned.profiles[0].height == (256, 512, 768) and planned.default == (512, 512)
    assert planned.second == (256, 768)  # not square
    other = plan("b2@640-768")
    assert other.default == (768, 768) and other.second == (640, 768)


@pytest.mark.parametrize("text", ["b1@500", "b1@512x520", "b1@256-700", "b1@32"])
def test_illegal_sizes_are_refused_with_the_legal_ones(text: str) -> None:
    with pytest.raises(InputError, match=f"profile is '{text}', .* multiples of 64 pixels from 64 to 4096; .* 512x512"):
        plan("b1", text)


span = st.integers(1, 64).flatmap(lambda low: st.integers(low, 64).map(lambda high: (64 * low, 64 * high)))


@given(st.lists(st.tuples(span, span), min_size=1, max_size=3))
def test_every_plan_traces_and_checks_legal_sizes(ranges: list[Any]) -> None:
    planned = plan(*(f"b1@{h[0]}-{h[1]}x{w[0]}-{w[1]}" for h, w in ranges))
    for size in (planned.default, *([planned.second] if planned.second else [])):
        assert any(p.holds_size(size) for p in planned.profiles)
    assert (planned.second is None) == (not planned.open_axes)
    # the tracer treats an axis that is one step long as a constant
    assert all(a.high >= 2 and a.low < a.high for a in planned.open_axes)
    for p in planned.profiles:
        for low, best, high in (p.extent("height"), p.extent("width")):
            assert low <= best <= high


@pytest.fixture(scope="module")
def deep() -> Any:
    """A U-Net with three levels, whose sizes must be divisible by four."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(8, 8, 16), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=16,
        attention_head_dim=2, norm_num_groups=4,
    ).eval()  # fmt: skip


OPEN = (OpenAxis("height", 2, 1, 6, 4), OpenAxis("width", 3, 1, 6, 4))


def parity(module: nn.Module, inputs: dict[str, torch.Tensor], path: Path, sizes: list[tuple[int, int]]) -> float:
    """Return the worst error over ``sizes`` of a lowered graph that was traced at the largest size."""
    (name,) = (n for n, x in inputs.items() if x.ndim == 4)

    def at(height: int, width: int) -> dict[str, torch.Tensor]:
        g = torch.Generator().manual_seed(height * 100 + width)
        return inputs | {name: torch.randn(2, inputs[name].shape[1], height, width, generator=g)}

    export(module, at(24, 24), "y", path, OPEN)
    for_onnxruntime_cpu(path)
    onnx.checker.check_model(str(path), full_check=True)
    errors = []
    for size in sizes:
        with torch.no_grad():
            expected = module(**at(*size)).numpy()
        errors.append(relative_error(path, at(*size), expected))
    return float(np.max(errors))


@pytest.mark.parametrize("kind", ["tiny", "full"])
def test_guides_are_exact_at_sizes_that_were_not_traced(deep: Any, kind: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    guide = GUIDES[kind].from_unet(deep, negative_prompts=True)
    with torch.no_grad():
        for p in guide.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    student = Student(deep, guide).eval()
    vae = {"block_out_channels": [8, 8]}
    base = RandomBase("", tmp_path, configs={"unet": dict(deep.config), "vae": vae, "text_encoder": {"vocab_size": 9}})
    inputs = base.golden_inputs((4, 16, 16), (32, 32), 7, guided=True, negative=True)["unet"]
    assert parity(student, inputs, tmp_path / "unet.onnx", [(16, 16), (4, 24), (20, 8)]) < 1e-5


def test_autoencoder_kl_is_exact_at_sizes_that_were_not_traced(tmp_path: Path) -> None:
    """Stable Diffusion's decoder has attention over all positions and group norms."""
    from diffusers import AutoencoderKL

    torch.manual_seed(2)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16), latent_channels=4, norm_num_groups=4,
    ).eval()  # fmt: skip
    inputs = {"latents": torch.zeros(2, 4, 16, 16)}
    assert parity(VaeDecoder(vae), inputs, tmp_path / "vae.onnx", [(16, 16), (4, 24), (20, 8)]) < 1e-5


class Pool(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.avg_pool2d(x, 2) + x.mean()


def test_the_most_recently_used_sessions_stay_loaded_by_size(tmp_path: Path) -> None:
    export(Pool(), {"x": torch.zeros(2, 1, 24, 24)}, "y", tmp_path / "pool.onnx", OPEN)
    legal = Profile("any", 1, 1, 32, (4, 4, 24), (4, 4, 24), 4)
    network = OrtNetwork(tmp_path / "pool.onnx", "cpu", profiles=(legal,))
    network.max_loaded = 4
    assert network.describe().inputs == {"x": ("float32", ("batch", 1, "height", "width"))}
    for size in ((4, 4), (8, 4), (12, 4), (4, 4), (16, 4)):
        x = np.random.default_rng(0).standard_normal((1, 1, *size), np.float32)
        assert np.allclose(network(x=x), Pool()(torch.from_numpy(x)).numpy(), atol=1e-6)
    assert list(network._loaded) == [(None, size, None) for size in ((8, 4), (12, 4), (4, 4), (16, 4))]
    with pytest.raises(InputError, match="the latents are 6x4; pool.onnx takes 4-24x4-24 in steps of 4"):
        network(x=np.zeros((1, 1, 6, 4), np.float32))
    with pytest.raises(InputError, match="x has an open height and width"), network.bind(1):
        pass
