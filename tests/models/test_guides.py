"""Both guides: their cost on public architectures, their inputs, and when their residuals must be zero."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import silu

from pnp_trt import backends
from pnp_trt.bench.measure.cost import count
from pnp_trt.bench.measure.networks import networks
from pnp_trt.build.onnx_export import export
from pnp_trt.errors import InputError
from pnp_trt.models.guides import GUIDES, FullGuide, Guide, GuideInput, TinyGuide
from pnp_trt.models.guides.condition import Condition
from pnp_trt.models.guides.load import load_guide
from pnp_trt.models.guides.parts import GainTable
from pnp_trt.models.student import Student, encode
from pnp_trt.models.teacher import random_unet_config

from .test_student import example, small_unet

DESIGNS: list[dict[str, Any]] = [
    {"trunk_kind": "depthwise"}, {"trunk_kind": "attention"}, {"reads": "latent", "text": True}, {"text": True},
    {"emits": "mid"}, {"emits": "deep"}, {"negative_prompts": True},
]  # fmt: skip


def stirred(guide: Guide, seed: int = 5) -> Guide:
    """Add noise to every weight, so that none is zero by initialisation."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in guide.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return guide.eval()


def make(kind: str, unet: Any, **options: Any) -> Guide:
    small = {"rank": 4, "embed_dim": 8} if kind == "tiny" else {}
    return GUIDES[kind].from_unet(unet, **small, **options)


def test_costs_on_stable_diffusion_1_5() -> None:
    cases = networks("random:sd15")
    module, inputs = cases["guide-full"]
    full = count(module, {k: v for k, v in inputs.items() if k != "condition"})
    assert full.parameters == 361_279_315  # 361.28 M of diffusers' ControlNetModel, and the features of w
    assert full.macs_without_attention / 1e9 == pytest.approx(116.42, abs=0.01)
    tiny = count(*cases["guide-tiny"])
    assert tiny.parameters <= 8.27e6 and tiny.macs_without_attention <= 7.79e9
    # the hint depends on w alone: bundles compute it once per image, which makes each step cheaper
    step = count(module, inputs)
    assert step.macs_without_attention / 1e9 == pytest.approx(109.06, abs=0.01)
    assert full.macs - step.macs == count(*cases["condition-full"]).macs


@pytest.mark.parametrize("base", ["random:sd21", "random:sdxl"])
def test_guides_fit_the_other_architectures(base: str) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(random_unet_config(base))
        for kind in GUIDES:
            Student(unet, GUIDES[kind].from_unet(unet))  # refuses a guide that does not fit
    assert {"guide-tiny", "guide-full"} <= networks(base).keys()


@pytest.mark.parametrize("kind", ["tiny", "full"])
@torch.no_grad()
def test_residuals_are_zero_before_training_and_at_w_one(kind: str) -> None:
    unet = small_unet()
    x, t, text = example()
    plain = unet(x, t, text).sample
    new = make(kind, unet).eval()
    assert torch.equal(Student(unet, new)(x, t, text, torch.tensor([2.0, 5.0, 8.0])), plain)
    awake = Student(unet, stirred(new))
    assert torch.equal(awake(x, t, text, torch.ones(3)), plain)
    mixed = awake(x, t, text, torch.tensor([1.0, 4.0, 1.0]))
    assert torch.allclose(mixed[[0, 2]], plain[[0, 2]], atol=1e-6) and (mixed[1] - plain[1]).abs().max() > 1e-3


@pytest.mark.parametrize("design", DESIGNS, ids=str)
@torch.no_grad()
def test_residuals_of_every_design_are_zero_only_at_w_one(design: dict[str, Any]) -> None:
    unet = small_unet()
    x, t, text = example()
    student = Student(unet, stirred(make("tiny", unet, **design)))
    assert torch.equal(student(x, t, text, torch.ones(3), negative=text * 0), unet(x, t, text).sample)
    guided = student(x, t, text, torch.full((3,), 5.0), negative=text * 0)
    assert (guided - unet(x, t, text).sample).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["tiny", "full"])
@settings(max_examples=8)
@given(w=st.lists(st.floats(1.0, 14.0), min_size=3, max_size=3))
@torch.no_grad()
def test_a_sample_depends_on_its_own_w_alone(kind: str, w: list[float]) -> None:
    unet = small_unet()
    student = Student(unet, stirred(make(kind, unet)))
    x, t, text = example()
    whole = student(x, t, text, torch.tensor(w))
    for i in range(3):
        alone = student(x[i : i + 1], t[i : i + 1], text[i : i + 1], torch.tensor(w[i : i + 1]))
        assert torch.allclose(whole[i : i + 1], alone, atol=1e-5)


@torch.no_grad()
def test_the_full_guide_starts_from_the_teachers_encoder() -> None:
    unet = small_unet()
    guide = FullGuide.from_unet(unet)
    own = guide.net.state_dict()
    for key, value in unet.state_dict().items():
        if key.startswith(("conv_in.", "down_blocks.", "mid_block.", "time_embedding.")):
            assert torch.equal(own[key], value), key
    assert all(p.requires_grad for p in guide.parameters())


@torch.no_grad()
def test_the_hint_can_be_computed_once() -> None:
    unet = small_unet()
    guide = stirred(FullGuide.from_unet(unet))
    assert isinstance(guide, FullGuide)
    x, t, text = example()
    w = torch.tensor([2.0, 3.0, 7.0])
    hint = guide.condition(w, (8, 8))
    assert torch.equal(Student(unet, guide)(x, t, text, w), Student(unet, guide)(x, t, text, w, condition=hint))
    assert TinyGuide.from_unet(unet).condition(w, (8, 8)) is None


@torch.no_grad()
def test_a_split_guide_equals_the_complete_one() -> None:
    unet = small_unet()
    x, t, text = example()
    w = torch.tensor([2.0, 3.0, 7.0])
    guide = stirred(FullGuide.from_unet(unet))
    whole, condition = Student(unet, guide)(x, t, text, w), Condition(copy.deepcopy(guide), (8, 8))
    split = Student(unet, copy.deepcopy(guide), conditioned=True)
    assert torch.equal(split(x, t, text, w, condition=condition(w)), whole)
    names = [{k for k, _ in m.guide.named_parameters()} for m in (condition, split)]
    assert names[0] | names[1] == {k for k, _ in guide.named_parameters()} and not names[0] & names[1]
    with pytest.raises(InputError, match="computes its condition separately and was given none"):
        split(x, t, text, w)


@pytest.mark.parametrize("kind", ["tiny", "full"])
@torch.no_grad()
def test_negative_prompts_are_used_and_required(kind: str) -> None:
    unet = small_unet()
    guide = stirred(make(kind, unet, negative_prompts=True))
    x, t, text = example()
    w = torch.full((3,), 4.0)
    one = Student(unet, guide)(x, t, text, w, negative=text.roll(1, 0))
    other = Student(unet, guide)(x, t, text, w, negative=torch.zeros_like(text))
    assert (one - other).abs().max() > 1e-4
    with pytest.raises(InputError, match="distilled with negative prompts, but got none"):
        Student(unet, guide)(x, t, text, w)


@pytest.mark.parametrize("kind", ["tiny", "full"])
@torch.no_grad()
def test_a_guide_is_unchanged_after_saving_and_loading(kind: str, tmp_path: Path) -> None:
    unet = small_unet()
    guide = stirred(make(kind, unet))
    guide.register_to_config(sampling_steps=8)
    guide.save_pretrained(tmp_path)
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".safetensors"}
    again = load_guide(str(tmp_path))
    x, t, text = example()
    w = torch.tensor([2.0, 3.0, 7.0])
    assert torch.equal(Student(unet, guide)(x, t, text, w), Student(unet, again)(x, t, text, w))
    assert again.config.sampling_steps == 8


@pytest.mark.parametrize("kind", ["tiny", "full"])
def test_a_guide_of_another_unet_is_refused_with_the_differing_shape(kind: str) -> None:
    guide = make(kind, small_unet())
    for changes, message in (
        ({"cross_attention_dim": 16}, "cross_attention_dim is 24 in the guide and 16 in the U-Net"),
        ({"in_channels": 6, "out_channels": 6}, "in_channels is 4 in the guide and 6 in the U-Net"),
        ({"block_out_channels": (16, 48)}, r"skip_channels is \[16, 16, 16, 32\] in the guide and \[16, 16, 16, 48\]"),
    ):
        with pytest.raises(InputError, match=message):
            Student(small_unet(**changes), guide)


def test_unknown_designs_are_refused() -> None:
    with pytest.raises(InputError, match="trunk_kind is 'fancy'; known: conv, depthwise, attention"):
        TinyGuide.from_unet(small_unet(), trunk_kind="fancy")


@pytest.mark.parametrize("kind", ["tiny", "full"])
def test_gradients_reach_every_weight_of_the_guide(kind: str) -> None:
    unet = small_unet().requires_grad_(False)
    guide = stirred(make(kind, unet)).train()
    x, t, text = example()
    Student(unet, guide)(x, t, text, torch.full((3,), 3.0)).pow(2).sum().backward()
    without_gradient = [k for k, p in guide.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not without_gradient
    assert all(p.grad is None for p in unet.parameters())


def test_a_guide_of_the_mid_block_has_no_other_residuals() -> None:
    unet = small_unet()
    x, t, text = example()
    with torch.no_grad():
        _, features = encode(unet, x, t, text)
        out = TinyGuide.from_unet(unet, emits="mid")(GuideInput(x, t, text, torch.full((3,), 2.0), features))
    assert out.down_block_res_samples == (None,) * len(features.down_block_res_samples)
    assert out.mid_block_res_sample.shape == features.mid_block_res_sample.shape


@pytest.mark.parametrize("values", [[1.6], [2.0, 0.5], [2.0, 1.7, 1.2, 1.3, 0.9]], ids=str)
def test_a_gain_table_is_linear_between_equally_spaced_timesteps(values: list[float]) -> None:
    t = np.array([0, 1, 124, 333, 499, 500, 749, 998, 999])
    expected = np.interp(t, np.linspace(0, 999, len(values)), values)
    for timesteps in (torch.from_numpy(t), torch.from_numpy(t).float()):
        assert np.allclose(GainTable(values)(timesteps).numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["tiny", "full"])
@torch.no_grad()
def test_a_gain_scales_the_residuals_and_nothing_else(kind: str) -> None:
    unet = small_unet()
    x, _, text = example()
    t, w = torch.tensor([0, 400, 999]), torch.tensor([2.0, 3.0, 7.0])
    guide = stirred(make(kind, unet))
    _, features = encode(unet, x, t, text)
    before = guide(GuideInput(x, t, text, w, features))
    own, weights = dict(guide.config), set(guide.state_dict())
    guide.use_gain([2.0, 1.0])
    after = guide(GuideInput(x, t, text, w, features))
    assert set(guide.state_dict()) == weights and guide.config["gain"] == [2.0, 1.0]
    factor = np.interp(t.numpy(), [0, 999], [2.0, 1.0])
    pairs = zip((*before.down_block_res_samples, before.mid_block_res_sample),
                (*after.down_block_res_samples, after.mid_block_res_sample), strict=True)  # fmt: skip
    for plain, scaled in pairs:
        assert plain is not None and scaled is not None and plain.abs().max() > 1e-4
        assert torch.allclose(
            scaled, plain * torch.from_numpy(factor).float()[:, None, None, None], rtol=1e-4, atol=1e-7
        )
    assert torch.equal(Student(unet, guide)(x, t, text, torch.ones(3)), unet(x, t, text).sample)
    guide.use_gain(None)
    again = guide(GuideInput(x, t, text, w, features))
    assert torch.equal(again.mid_block_res_sample, before.mid_block_res_sample) and dict(guide.config) == own


@torch.no_grad()
def test_a_gain_is_saved_with_the_guide(tmp_path: Path) -> None:
    unet = small_unet()
    guide = stirred(make("tiny", unet))
    guide.use_gain([1.5, 1.25, 1.125])
    guide.save_pretrained(tmp_path)
    x, t, text = example()
    w = torch.full((3,), 4.0)
    loaded = load_guide(str(tmp_path))
    assert torch.equal(Student(unet, loaded)(x, t, text, w), Student(unet, guide)(x, t, text, w))


@pytest.mark.parametrize("values", [[], [0.0], [-1.0], [float("nan")], [1.0] * 101, ["1"], [True, None]], ids=repr)
def test_invalid_gains_are_refused(values: list[Any]) -> None:
    with pytest.raises(InputError, match="a guide's gain is 1 to 100 numbers above 0"):
        TinyGuide.from_unet(small_unet(), gain=values)


@pytest.mark.parametrize("size", [8, 9, 12])
@pytest.mark.parametrize("side_by_side", [False, True])
@pytest.mark.parametrize("design", [*DESIGNS, {"norm": True}], ids=lambda d: "-".join(map(str, d.values())))
@torch.no_grad()
def test_the_tiny_guides_residuals_equal_the_formula_for_every_map(
    design: dict[str, Any], side_by_side: bool, size: int
) -> None:
    """expand(silu(depthwise(silu((reduce(x) + context)(1 + scale) + shift))) (w − 1)/4); scale and shift of map i
    are chunks 2i and 2i + 1 of the modulation, after those of the trunk.
    """
    unet = small_unet(layers_per_block=2)
    guide = stirred(make("tiny", unet, **design))
    assert isinstance(guide, TinyGuide)
    guide.side_by_side = side_by_side
    x, t, text = example(size)
    w = torch.tensor([2.0, 5.0, 8.0])
    _, features = encode(unet, x, t, text)
    inputs = GuideInput(x, t, text, w, features, negative=text.flip(0))
    output = guide(inputs)
    film = guide.film(silu(guide.embedding(t, w, x.dtype) + guide.summary(inputs)))[:, :, None, None]
    parts = film.chunk(2 * (len(guide.trunk) + len(guide.adapters)), 1)
    context = guide.deep_context(inputs)
    for i, block in enumerate(guide.trunk):
        modulated = silu(context * (1 + parts[2 * i]) + parts[2 * i + 1])
        context = context + block.second(silu(block.first(modulated)))
        if design.get("trunk_kind") == "attention":
            context = guide.attention[i](context)
    maps = (*features.down_block_res_samples, features.mid_block_res_sample)
    adapters, place = iter(guide.adapters), len(guide.trunk)
    for skip, got, used in zip(
        maps, (*output.down_block_res_samples, output.mid_block_res_sample), guide.emitting, strict=True
    ):
        if not used:
            assert got is None
            continue
        adapter: Any = next(adapters)
        h = torch.nn.functional.interpolate(context, size=skip.shape[-2:], mode="nearest")
        if design.get("reads") != "latent":
            h = h + adapter.reduce(skip if adapter.norm is None else adapter.norm(skip))
        h = silu(h * (1 + parts[2 * place]) + parts[2 * place + 1])
        h = silu(adapter.mix(h)) * ((w - 1) / 4)[:, None, None, None]
        torch.testing.assert_close(got, adapter.expand(h), rtol=1e-5, atol=1e-6)
        place += 1


def test_onnxruntime_uses_the_form_with_fewer_nodes(tmp_path: Path) -> None:
    nodes = []
    for side_by_side in (False, True):
        guide = stirred(make("tiny", unet := small_unet(layers_per_block=2)))
        guide.side_by_side = side_by_side
        x, t, text = example()
        inputs = {"sample": x, "timestep": t, "encoder_hidden_states": text, "guidance": torch.full((3,), 2.0)}
        export(Student(unet, guide).eval(), inputs, "prediction", tmp_path / "x.onnx")
        nodes.append(len(onnx.load(tmp_path / "x.onnx", load_external_data=False).graph.node))
    assert nodes[1] < nodes[0] - 15
    chosen = {name: backends.get(name).side_by_side for name in ("onnxruntime", "openvino", "tensorrt-rtx", "torch")}
    assert chosen == {"onnxruntime": True, "openvino": True, "tensorrt-rtx": False, "torch": False}
