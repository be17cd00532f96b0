"""The test suite's shared traces: one trace per architecture; anything that changes the graph needs another."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pnp_trt.build.onnx_export import export
from pnp_trt.build.sizes import OpenAxis
from pnp_trt.models.bases import resolve
from pnp_trt.models.guides import TinyGuide
from pnp_trt.models.student import Student, Teacher
from pnp_trt.precision.recipes import RECIPES, convert

from .conftest import once
from .exports import identity, share, unshared

INPUTS = {"x": torch.zeros(2, 4)}


def of(module: Any, inputs: Any = INPUTS, output: str = "y") -> str:
    return identity(module, inputs, [output])


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.SiLU(), nn.LayerNorm(4))


def test_equal_modules_have_equal_identities() -> None:
    assert of(net()) == of(net())
    assert of(net(), {"x": torch.ones(2, 4)}) == of(net())  # shapes are traced, not values


def test_open_axes_count_only_for_inputs_that_have_them() -> None:
    axes = [OpenAxis("height", 2, 1, 6, 4)]
    images = {"x": torch.zeros(2, 4, 8, 8)}
    assert identity(net(), INPUTS, ["y"], axes) == of(net())
    assert identity(net(), images, ["y"], axes) != of(net(), images)


def hooked(factor: float) -> nn.Module:
    """Return a module with a hook that calls another function, like those of transformers."""

    def scaled(x: torch.Tensor) -> torch.Tensor:
        return factor * x

    one = net()
    one.register_forward_hook(lambda module, inputs, output: scaled(output))
    return one


def test_the_identity_depends_on_hooks() -> None:
    assert of(hooked(2.0)) == of(hooked(2.0)) != of(hooked(3.0)) and of(hooked(2.0)) != of(net())


@pytest.mark.parametrize("change", ["layer", "eps", "dtype", "island", "input", "output", "buffer"])
def test_the_identity_depends_on_everything_that_changes_the_graph(change: str) -> None:
    one, inputs, output = net(), INPUTS, "y"
    if change == "layer":
        one[1] = nn.ReLU()
    elif change == "eps":
        one[2].eps = 1e-3
    elif change == "dtype":
        convert(one, RECIPES["fp16"])
    elif change == "island":
        import dataclasses

        half = convert(net(), RECIPES["fp16"])
        assert of(convert(one, dataclasses.replace(RECIPES["fp16"], islands=("2",)))) != of(half)
    elif change == "buffer":
        one.register_buffer("unused", torch.ones(1))
    inputs = {"x": torch.zeros(3, 4)} if change == "input" else inputs
    output = "z" if change == "output" else output
    assert of(one, inputs, output) != of(net())


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_shared_trace_gives_the_same_bytes(
    precision: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    share(partial(once, tmp_path_factory))
    inputs = {"input": torch.zeros(2, 4)}
    for seed in (1, 2):
        torch.manual_seed(seed)
        one = convert(nn.Sequential(nn.Linear(4, 4), nn.SiLU(), nn.LayerNorm(4)), RECIPES[precision])
        nn.init.normal_(one[2].bias)
        weights = export(one, inputs, "y", tmp_path / "shared" / "net.onnx")
        with unshared():
            assert export(one, inputs, "y", tmp_path / "own" / "net.onnx") == weights
        for file in ("net.onnx", "net.onnx.data"):
            assert (tmp_path / "shared" / file).read_bytes() == (tmp_path / "own" / file).read_bytes()


def test_a_shared_trace_with_open_sizes_gives_the_same_bytes(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    share(partial(once, tmp_path_factory))
    axes = (OpenAxis("height", 2, 1, 6, 4), OpenAxis("width", 3, 1, 6, 4))
    for seed in (1, 2):
        torch.manual_seed(seed)
        one = nn.Sequential(nn.Conv2d(4, 4, 3, 2, 1), nn.SiLU(), nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 1))
        export(one, {"input": torch.zeros(2, 4, 24, 24)}, "y", tmp_path / "shared" / "net.onnx", axes)
        with unshared():
            export(one, {"input": torch.zeros(2, 4, 24, 24)}, "y", tmp_path / "own" / "net.onnx", axes)
        for file in ("net.onnx", "net.onnx.data"):
            assert (tmp_path / "shared" / file).read_bytes() == (tmp_path / "own" / file).read_bytes()


def test_the_identity_depends_on_the_config(micro_base: Path) -> None:
    unet = resolve(str(micro_base)).unet()
    other = copy.deepcopy(unet)
    other.register_to_config(sample_size=16)
    assert of(Teacher(unet)) != of(Teacher(other)) and of(Teacher(unet)) == of(Teacher(copy.deepcopy(unet)))
    guide = TinyGuide.from_unet(unet, rank=4, embed_dim=8)
    student = of(Student(unet, guide))
    guide.register_to_config(sampling_steps=4)  # describes only its training
    assert of(Student(unet, guide)) == student
    guide.register_to_config(rank=5)
    assert of(Student(unet, guide)) != student
