"""The sharpener: its formula, when it must change nothing, and which weights are trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pnp_trt.errors import InputError
from pnp_trt.models.guides import FullGuide, Guide, TinyGuide
from pnp_trt.models.guides.load import load_guide
from pnp_trt.models.guides.sharpener import Sharpen, Sharpener, with_new_sharpener, without_sharpener
from pnp_trt.models.student import Student

from .test_student import awake, example, small_unet

SMALL: dict[str, Any] = {"rank": 4, "embed_dim": 8}


def sharpening(unet: Any, seed: int = 3) -> Guide:
    """Return a guide whose sharpener and last projections are random, not zero."""
    torch.manual_seed(seed)
    guide = awake(TinyGuide.from_unet(unet, **SMALL, sharpener_width=8))
    with torch.no_grad():
        for p in guide.sharpener.parameters():  # type: ignore[union-attr]
            p.normal_(std=0.3)
    return guide.eval()


def texts() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(7)
    text, negative, empty = torch.randn(3, 3, 5, 24, generator=g)
    return text, negative, empty, torch.tensor([1.0, 2.5, 8.0])


@torch.no_grad()
def test_the_sharpener_equals_its_formula() -> None:
    """The docstring's formula in numpy, in float64."""
    torch.manual_seed(0)
    sharpener = Sharpener(24, 8)
    torch.nn.init.normal_(sharpener.leave.weight)
    text, negative, empty, w = texts()
    got = sharpener(text, negative, empty, w).numpy()
    weights = {k: v.double().numpy() for k, v in sharpener.state_dict().items()}

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)

    def s(i: int, other: np.ndarray) -> np.ndarray:
        angles = w[i].item() * 4 * 100.0 ** (-np.arange(32) / 32)
        of_w = linear("scale", np.concatenate([np.sin(angles), np.cos(angles)]))
        prompt = np.maximum(linear("enter", text[i].double().numpy()) + of_w, 0)
        hidden = np.maximum(linear("enter", other), 0)
        q, k, v = linear("q", prompt), linear("k", hidden), linear("v", hidden)
        heads = []
        for h in range(4):
            part = slice(2 * h, 2 * h + 2)
            scores = np.exp(q[:, part] @ k[:, part].T / np.sqrt(2))
            heads.append(scores / scores.sum(1, keepdims=True) @ v[:, part])
        return linear("leave", np.maximum(linear("out", np.concatenate(heads, 1)), 0))

    for i in range(3):
        change = s(i, negative[i].double().numpy()) - s(i, empty[i].double().numpy())
        expected = text[i].double().numpy() + (w[i].item() - 1) / 4 * change
        np.testing.assert_allclose(got[i], expected, atol=1e-5)
    assert np.abs(got[2] - text[2].numpy()).max() > 0.1


@torch.no_grad()
def test_the_sharpener_changes_nothing_at_w_one_or_without_a_negative_prompt() -> None:
    unet = small_unet()
    guide = sharpening(unet)
    student = Student(unet, guide)
    x, t, text = example()
    negative, empty = text.roll(1, 0), torch.zeros_like(text)
    five = torch.full((3,), 5.0)
    without = Student(unet, without_sharpener(sharpening(unet)))(x, t, text, five)
    assert torch.equal(student(x, t, text, torch.ones(3), negative, empty=empty), unet(x, t, text).sample)
    assert torch.equal(student(x, t, text, five), without)
    assert torch.equal(student(x, t, text, five, empty, empty=empty), without)
    assert (student(x, t, text, five, negative, empty=empty) - without).abs().max() > 1e-3
    new = Student(unet, TinyGuide.from_unet(unet, **SMALL, sharpener_width=8).eval())
    assert torch.equal(new(x, t, text, five, negative, empty=empty), unet(x, t, text).sample)


@torch.no_grad()
def test_a_sharpener_apart_from_its_guide_gives_the_same_output() -> None:
    unet = small_unet()
    x, t, text = example()
    negative, empty, w = text.roll(1, 0), torch.zeros_like(text), torch.tensor([2.0, 3.0, 7.0])
    whole = Student(unet, sharpening(unet))(x, t, text, w, negative, empty=empty)
    apart = Sharpen(sharpening(unet))
    assert {k.split(".")[1] for k in apart.state_dict()} == {"sharpener"}
    rest = without_sharpener(sharpening(unet))
    assert not rest.negative_prompts and rest.config["sharpener_width"] is None
    assert torch.equal(Student(unet, rest)(x, t, apart(text, negative, empty, w), w), whole)


def test_only_the_new_sharpener_is_trained(tmp_path: Path) -> None:
    unet = small_unet().requires_grad_(False)
    own = awake(TinyGuide.from_unet(unet, **SMALL))
    guide = with_new_sharpener(own, 8)
    trained = {k for k, p in guide.named_parameters() if p.requires_grad}
    assert trained == {f"sharpener.{k}" for k, _ in guide.sharpener.named_parameters()}  # type: ignore[union-attr]
    assert all(torch.equal(guide.state_dict()[k], v) for k, v in own.state_dict().items()) and guide.negative_prompts
    x, t, text = example()
    for p in guide.sharpener.parameters():  # type: ignore[union-attr]
        torch.nn.init.normal_(p, std=0.3)
    out = Student(unet, guide)(x, t, text, torch.full((3,), 3.0), text.roll(1, 0), empty=text * 0)
    out.pow(2).sum().backward()
    assert {k for k, p in guide.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0} == trained
    guide.save_pretrained(tmp_path)
    again = load_guide(str(tmp_path))
    assert again.negative_prompts and all(torch.equal(again.state_dict()[k], v) for k, v in guide.state_dict().items())


def test_guides_that_cannot_have_a_sharpener_are_refused() -> None:
    unet = small_unet()
    for guide, message in (
        (TinyGuide.from_unet(unet, **SMALL, negative_prompts=True), "already supports negative prompts"),
        (with_new_sharpener(TinyGuide.from_unet(unet, **SMALL), 8), "already supports negative prompts"),
        (FullGuide.from_unet(unet), "a FullGuide does not support a sharpener"),
        (TinyGuide.from_unet(unet, **SMALL, sampling_steps=8), "was distilled for 8 steps"),
    ):
        with pytest.raises(InputError, match=message):
            with_new_sharpener(guide, 8)
    with pytest.raises(InputError, match="by negative_prompts or by a sharpener; choose one"):
        TinyGuide.from_unet(unet, negative_prompts=True, sharpener_width=8)
    for width in (0, -4, 6, "8"):
        with pytest.raises(InputError, match="it must be a positive multiple of 4"):
            TinyGuide.from_unet(unet, sharpener_width=width)
