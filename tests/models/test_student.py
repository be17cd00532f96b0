"""The student computes the teacher's U-Net plus residuals, which are zero at w = 1 and before training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from pnp_trt.errors import InputError
from pnp_trt.models.guides import GuideInput, TinyGuide
from pnp_trt.models.student import Student, Teacher, cfg, encode


def small_unet(seed: int = 0, **changes: Any) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    config: dict[str, Any] = dict(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=24, attention_head_dim=2, norm_num_groups=8,
    )  # fmt: skip
    return UNet2DConditionModel(**(config | changes)).eval()


def awake(guide: TinyGuide, seed: int = 1) -> TinyGuide:
    torch.manual_seed(seed)
    with torch.no_grad():
        for adapter in guide.adapters:
            adapter.expand.weight.normal_(std=0.1)
        guide.film.weight.normal_(std=0.1)
    return guide


def example(size: int = 8, batch: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(2)
    return (
        torch.randn(batch, 4, size, size, generator=g),
        torch.randint(0, 1000, (batch,), generator=g),
        torch.randn(batch, 77, 24, generator=g),
    )


@pytest.mark.parametrize("size", [8, 9, 12])  # 9 does not halve evenly
@torch.no_grad()
def test_the_split_unet_equals_diffusers_forward(size: int) -> None:
    unet = small_unet()
    x, t, text = example(size)
    assert torch.equal(Teacher(unet)(x, t, text), unet(x, t, text).sample)


@torch.no_grad()
def test_residuals_are_added_as_in_diffusers() -> None:
    unet = small_unet()
    guide = awake(TinyGuide.from_unet(unet, rank=4, embed_dim=8))
    x, t, text = example()
    w = torch.tensor([2.0, 5.0, 8.0])
    _, features = encode(unet, x, t, text)
    added = guide(GuideInput(x, t, text, w, features))
    reference = unet(
        x, t, text,
        down_block_additional_residuals=added.down_block_res_samples,
        mid_block_additional_residual=added.mid_block_res_sample,
    ).sample  # fmt: skip
    assert torch.equal(Student(unet, guide)(x, t, text, w), reference)
    assert (reference - unet(x, t, text).sample).abs().max() > 1e-3


@torch.no_grad()
def test_residuals_are_exactly_zero_at_w_one_and_before_training() -> None:
    unet = small_unet()
    x, t, text = example()
    plain = unet(x, t, text).sample
    fresh = Student(unet, TinyGuide.from_unet(unet, rank=4, embed_dim=8))
    assert torch.equal(fresh(x, t, text, torch.full((3,), 7.0)), plain)
    trained = Student(unet, awake(TinyGuide.from_unet(unet, rank=4, embed_dim=8)))
    assert torch.equal(trained(x, t, text, torch.ones(3)), plain)


@torch.no_grad()
def test_w_is_per_sample() -> None:
    unet = small_unet()
    student = Student(unet, awake(TinyGuide.from_unet(unet, rank=4, embed_dim=8)))
    x, t, text = example()
    mixed = student(x, t, text, torch.tensor([1.0, 3.0, 8.0]))
    for i, w in enumerate((1.0, 3.0, 8.0)):
        alone = student(x[i : i + 1], t[i : i + 1], text[i : i + 1], torch.tensor([w]))
        assert torch.allclose(mixed[i : i + 1], alone, atol=1e-5)


@torch.no_grad()
def test_cfg_equals_the_published_formula() -> None:
    unet = small_unet()
    x, t, text = example()
    empty = torch.zeros_like(text)
    w = torch.tensor([1.0, 3.0, 8.0])
    unconditional, conditional = unet(x, t, empty).sample, unet(x, t, text).sample
    expected = unconditional + w[:, None, None, None] * (conditional - unconditional)
    assert torch.allclose(cfg(unet, x, t, text, empty, w), expected, atol=1e-5)


def test_a_guide_for_another_unet_is_refused_with_the_differing_shape() -> None:
    guide = TinyGuide.from_unet(small_unet(), rank=4, embed_dim=8)
    with pytest.raises(
        InputError, match=r"skip_channels is \[16, 16, 16, 32\] in the guide and \[16, 16, 16, 16, 32, 32\]"
    ):
        Student(small_unet(layers_per_block=2), guide)
    with pytest.raises(InputError, match="cross_attention_dim is 24 in the guide and 40"):
        Student(small_unet(cross_attention_dim=40), guide)


def test_guides_save_and_load(tmp_path: Any) -> None:
    guide = awake(TinyGuide.from_unet(small_unet(), rank=4, embed_dim=8))
    guide.save_pretrained(tmp_path)
    again = TinyGuide.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(guide.state_dict().values(), again.state_dict().values(), strict=True))
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".safetensors"}
