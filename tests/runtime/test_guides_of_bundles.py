"""Bundles say what their guide takes: negative prompts, and the only step count of stage 2; the full guide too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pnp_trt.errors import InputError
from pnp_trt.export.bundle import BuildSpec, build
from pnp_trt.models.base import resolve
from pnp_trt.models.guide import GUIDES
from pnp_trt.runtime.pipeline import Pipeline

from ..conftest import Result


@pytest.fixture(scope="module")
def made(micro_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a full guide that reads negative prompts and was distilled for 4 steps."""
    home = tmp_path_factory.mktemp("full")
    torch.manual_seed(4)
    guide = GUIDES["full"].from_unet(resolve(str(micro_base)).unet(), negative_prompts=True)
    with torch.no_grad():
        for p in guide.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    guide.register_to_config(sampling_steps=4)
    guide.save_pretrained(home / "guide")
    built = build(BuildSpec(str(micro_base), str(home / "guide"), out=home / "bundle"))
    assert built.manifest["guide"]["sampling_steps"] == 4 and built.manifest["guide"]["negative_prompts"]
    assert max(built.manifest["parity"]["relative_error"].values()) < 1e-4
    return home / "bundle"


def test_the_step_count_is_the_default_and_another_is_remarked(made: Path) -> None:
    pipeline = Pipeline.load(made)
    assert pipeline("a red apple")[0].parameters["steps"] == 4
    with pytest.warns(UserWarning, match="was distilled for 4 steps and is run with 6; its pictures may be off"):
        assert pipeline("a red apple", steps=6)[0].parameters["steps"] == 6


def test_negative_prompts_change_the_picture_and_the_empty_one_is_none(made: Path) -> None:
    pipeline = Pipeline.load(made)
    plain = pipeline("a red apple", guidance=5.0)[0]
    empty = pipeline("a red apple", guidance=5.0, negative="")[0]
    other = pipeline("a red apple", guidance=5.0, negative="a blue car")[0]
    assert np.array_equal(plain.pixels, empty.pixels) and not np.array_equal(plain.pixels, other.pixels)
    assert other.parameters["negative"] == "a blue car" and "negative" not in plain.parameters
    each = pipeline(["a red apple"] * 2, guidance=5.0, negative=["", "a blue car"])
    assert np.abs(each[1].pixels.astype(int) - other.pixels).max() <= 1
    with pytest.raises(InputError, match="2 prompts and 3 negative prompts"):
        pipeline(["a", "b"], negative=["c", "d", "e"])


def test_negative_prompts_are_refused_where_the_guide_knows_none(engines: Path, cli: Callable[..., Result]) -> None:
    refused = cli("sample", "a red apple", "--engine", "guided", "--negative", "blue", "--out", engines.parent / "s")
    assert refused.code == 2 and "takes no negative prompt" in refused.err
    plain = Pipeline.load(engines / "plain")
    one, other = (plain("a red apple", steps=4, method="cfg", negative=n)[0].pixels for n in (None, "a blue car"))
    assert not np.array_equal(one, other)
