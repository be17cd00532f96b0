"""The suite's own sharing of exports: equal modules share, and whatever changes a graph or its weights does not."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pnp_trt.models.bases import resolve
from pnp_trt.models.student import Teacher
from pnp_trt.precision.recipes import RECIPES, convert

from .exports import identity

INPUTS = {"x": torch.zeros(2, 4)}


def of(module: Any, inputs: Any = INPUTS, output: str = "y", path: str = "a.onnx") -> str:
    return identity(module, inputs, output, Path(path), ())


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.SiLU(), nn.LayerNorm(4))


def test_equal_modules_are_one() -> None:
    assert of(net()) == of(net())
    assert of(net(), {"x": torch.ones(2, 4)}) == of(net())  # shapes are traced, not values


@pytest.mark.parametrize("change", ["weight", "layer", "eps", "dtype", "island", "input", "output", "file", "buffer"])
def test_whatever_changes_the_files_is_another(change: str) -> None:
    one, inputs, output, path = net(), INPUTS, "y", "a.onnx"
    if change == "weight":
        with torch.no_grad():
            one[0].weight[0, 0] += 1e-6
    elif change == "layer":
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
    output, path = "z" if change == "output" else output, "b.onnx" if change == "file" else path
    assert of(one, inputs, output, path) != of(net())


def test_a_config_counts(micro_base: Path) -> None:
    unet = resolve(str(micro_base)).unet()
    other = copy.deepcopy(unet)
    other.register_to_config(sample_size=16)
    assert of(Teacher(unet)) != of(Teacher(other)) and of(Teacher(unet)) == of(Teacher(copy.deepcopy(unet)))
