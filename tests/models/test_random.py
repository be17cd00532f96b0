"""Architectures with random weights: reproducible, in half precision, and with outputs of a useful magnitude."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pnp_trt.build.onnx_export import export
from pnp_trt.build.parity import relative_error
from pnp_trt.errors import InputError
from pnp_trt.models.bases import resolve
from pnp_trt.models.random import RandomBase, random_base
from pnp_trt.models.student import Student
from pnp_trt.models.wrappers import TextEncoder, VaeDecoder
from pnp_trt.precision.recipes import RECIPES, convert, reference


@pytest.fixture
def base(micro_base: Path) -> RandomBase:
    """The micro model's architecture with random weights, and a small ``AutoencoderKL``."""
    configs = {n: json.loads((micro_base / n / "config.json").read_text()) for n in ("unet", "text_encoder")}
    vae = random_base("random:sd15").config("vae") | {"block_out_channels": [8, 8], "norm_num_groups": 4}
    vae |= {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    return RandomBase("random:micro", micro_base, configs={**configs, "vae": vae})


def test_weights_are_seeded_and_in_half_precision(base: RandomBase) -> None:
    a, b = base.unet().state_dict(), base.unet().state_dict()
    assert {t.dtype for t in a.values()} == {torch.float16}
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["conv_in.weight"].flatten()[:64], a["conv_out.weight"].flatten()[:64])
    assert base.fingerprint() == RandomBase(base.name, base.folder, configs=base.configs).fingerprint()


def test_every_network_runs_and_matches_its_export(base: RandomBase, tmp_path: Path) -> None:
    unet = base.unet()
    g = torch.Generator().manual_seed(0)
    student = Student(unet, base.make_guide("auto", unet))
    cases = {
        "unet": (student, {
            "sample": torch.randn(2, 4, 8, 8, generator=g), "timestep": torch.tensor([801, 41]),
            "encoder_hidden_states": torch.randn(2, 77, 32, generator=g), "guidance": torch.tensor([2.0, 7.5]),
        }),
        "text": (TextEncoder(base.text_encoder()), {"input_ids": torch.randint(0, 49408, (2, 77), generator=g)}),
        "vae": (VaeDecoder(base.vae()), {"latents": torch.randn(2, 4, 8, 8, generator=g)}),
    }  # fmt: skip
    for name, (module, inputs) in cases.items():
        expected = reference(module, inputs).numpy()
        assert 1e-3 < abs(expected).mean() < 1e3, name
        export(convert(module, RECIPES["fp16"]), inputs, "y", tmp_path / name / "net.onnx")
        assert relative_error(tmp_path / name / "net.onnx", inputs, expected) < RECIPES["fp16"].limit, name


def test_known_names_and_their_sizes() -> None:
    sizes = resolve("random:sd15").sizes()
    assert (sizes.latent, sizes.text_width, sizes.factor) == ((4, 64, 64), 768, 8)
    assert resolve("random:sd21").sizes().latent == (4, 96, 96)
    xl = resolve("random:sdxl")
    assert (xl.family, xl.sizes().latent, xl.sizes().text_width, len(xl.text_specs)) == ("sdxl", (4, 128, 128), 2048, 2)
    assert [xl.tokenizer(spec).pad_token_id for spec in xl.text_specs] == [49407, 0]
    assert set(xl.fingerprint()) == {"unet", "text_encoder", "text_encoder_2", "vae", "all"}
    with pytest.raises(InputError, match="no base model 'random:sd9'; known: emoji"):
        resolve("random:sd9")
    with pytest.raises(InputError, match="guide 'huge' is not known for random:sd15; known: tiny"):
        resolve("random:sd15").make_guide("huge", None)
