"""Exports at sizes for which diffusers takes another code path, and modules that cannot be exported."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from diffusers.models import upsampling

from pnp_trt.build.onnx_export import export
from pnp_trt.errors import PnpError
from pnp_trt.models.wrappers import VaeDecoder

from ..models.families.test_vae import micro_kl


@pytest.mark.parametrize("side", [181, 800])
def test_the_batch_axis_stays_open_at_large_sizes(side: int, tmp_path: Path) -> None:
    """diffusers copies upsampled tensors of more than 2^31 elements, which 63 rows of the larger size exceed."""
    rows = 2**31 / (2 * 8 * (2 * side) ** 2)
    assert (rows < 63) == (side == 800) and rows != int(rows)
    export(VaeDecoder(micro_kl()), {"latents": torch.zeros(2, 4, side, side)}, "sample", tmp_path / "decoder.onnx")
    (latents,) = onnx.load(tmp_path / "decoder.onnx", load_external_data=False).graph.input
    assert [d.dim_param or d.dim_value for d in latents.type.tensor_type.shape.dim] == ["batch", 4, side, side]
    assert not hasattr(upsampling, "pow")


class Untraceable(torch.nn.Module):
    """Branches on a tensor's value, which is unknown while tracing."""

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return sample * 2 if sample.sum().item() > 0 else sample


def test_a_failed_export_is_reported_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(
        PnpError, match=r"^PyTorch \S+ cannot export the unet to ONNX \(\w+: [^\n\x1b]*\); nothing was written"
    ):
        export(Untraceable(), {"sample": torch.ones(2, 3)}, "out", tmp_path / "unet.onnx")
    assert not any(tmp_path.iterdir())
