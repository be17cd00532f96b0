"""Fine-tunes of the micro teacher, and LoRAs for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pnp_trt.build.builder import build
from pnp_trt.build.spec import BuildSpec

from ...conftest import make_micro_base


@pytest.fixture(scope="session")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete model of the micro teacher's architecture with different weights; do not write into it."""
    return make_micro_base(tmp_path_factory.mktemp("tuned") / "tuned", seed=5)


@pytest.fixture(scope="session")
def tuned_unet(tuned: Path) -> Path:
    """The weights file of the U-Net of ``tuned``."""
    return tuned / "unet" / "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="session")
def half_bundle(micro_base: Path, micro_guide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The micro student in float16; do not write into it."""
    out = tmp_path_factory.mktemp("half") / "half"
    build(BuildSpec(str(micro_base), str(micro_guide), precision="fp16", out=out))
    return out


#: layers that the LoRAs below change: square and not square, in the down, mid and up blocks
LAYERS = (
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
    "up_blocks.0.attentions.1.transformer_blocks.0.attn2.to_out.0",
)
#: includes the output projection, from which diffusers recognises a LoRA's format
TEXT_LAYERS = ("encoder.layers.0.self_attn.q_proj", "encoder.layers.0.self_attn.out_proj")
RANK, ALPHA = 4, 2.0


def factors(shapes: dict[str, torch.Size]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return random low-rank factors (A, B) of each layer, from a fixed seed."""
    g = torch.Generator().manual_seed(3)
    return {
        n: (torch.randn(RANK, s[1], generator=g) * 0.2, torch.randn(s[0], RANK, generator=g) * 0.2)
        for n, s in shapes.items()
    }


@pytest.fixture(scope="session")
def lora_factors(tuned: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """LoRA factors (A, B) of the layers of the U-Net and the text encoder."""
    unet = load_file(tuned / "unet" / "diffusion_pytorch_model.safetensors")
    shapes = {n: unet[f"{n}.weight"].shape for n in LAYERS}
    return factors({**shapes, **{n: torch.Size([32, 32]) for n in TEXT_LAYERS}})


@pytest.fixture(scope="session")
def diffusers_lora(lora_factors: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of the U-Net in diffusers' format, without alpha, so that alpha equals the rank."""
    path = tmp_path_factory.mktemp("lora") / "plain.safetensors"
    weights = {}
    for name in LAYERS:
        a, b = lora_factors[name]
        weights |= {f"unet.{name}.lora_A.weight": a, f"unet.{name}.lora_B.weight": b}
    save_file(weights, path)
    return path


@pytest.fixture(scope="session")
def kohya_lora(lora_factors: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of the U-Net and the text encoder in kohya's format, with an alpha per layer."""
    path = tmp_path_factory.mktemp("lora") / "kohya.safetensors"
    weights = {}
    for name, (a, b) in lora_factors.items():
        full = f"lora_te_text_model.{name}" if name in TEXT_LAYERS else f"lora_unet_{name}"
        stem = full.replace(".", "_")
        weights |= {f"{stem}.lora_down.weight": a, f"{stem}.lora_up.weight": b, f"{stem}.alpha": torch.tensor(ALPHA)}
    save_file(weights, path)
    return path
