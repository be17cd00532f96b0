"""Bundles record what their guide supports: negative prompts, and the fixed step count of stage 2."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pnp_trt import backends
from pnp_trt.backends.base import LoadOptions
from pnp_trt.build.builder import build
from pnp_trt.build.spec import BuildSpec
from pnp_trt.bundle.golden_file import difference
from pnp_trt.bundle.store import open_bundle
from pnp_trt.errors import Cancelled, InputError
from pnp_trt.models.bases import resolve
from pnp_trt.models.guides import GUIDES
from pnp_trt.models.guides.load import load_guide
from pnp_trt.models.student import Student
from pnp_trt.runtime.pipeline import Pipeline
from pnp_trt.runtime.verify import load_golden, verify

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
    assert built.manifest.guide.sampling_steps == 4 and built.manifest.guide.negative_prompts
    assert max(built.manifest.parity.relative_error.values()) < 1e-4
    return home / "bundle"


def test_the_part_that_depends_only_on_w_is_a_separate_network(made: Path, micro_base: Path) -> None:
    """With its output, the U-Net's graph equals the complete student; each network also passes verification."""
    bundle = open_bundle(made)
    networks = bundle.manifest.networks
    assert list(networks["condition"].inputs) == ["guidance"] and "condition" in networks["unet"].inputs
    maps = json.loads((made / "weights.json").read_text())["networks"]
    keys = {n: {w["key"] for w in maps[n]["weights"].values() if w["source"] == "guide"} for n in maps}
    assert {k.partition(".")[0] for k in keys["condition"]} == {"w_features", "hint"}
    assert not keys["condition"] & keys["unet"]
    assert verify(bundle).keys() == networks.keys()
    whole = Student(resolve(str(micro_base)).unet(), load_guide(str(made.parent / "guide")))
    backend = backends.get("onnxruntime")
    condition, unet = (backend.load(bundle.file(n), networks[n], LoadOptions("cpu")) for n in ("condition", "unet"))
    inputs = dict(load_golden(made / "golden.npz")["unet"][0])
    for w in ([1.0, 9.0], [2.5, 3.0]):
        inputs["guidance"] = np.array(w, np.float32)
        inputs["condition"] = condition(guidance=inputs["guidance"])
        with torch.no_grad():
            expected = whole(**{k: torch.from_numpy(v) for k, v in inputs.items() if k != "condition"}).numpy()
        assert difference(unet(**inputs), expected) < 1e-5


def test_a_separate_condition_network_gives_the_same_images(made: Path, micro_base: Path, tmp_path: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    spec = BuildSpec(str(micro_base), str(made.parent / "guide"), backend="torch", out=tmp_path / "parted")
    build(spec)
    with monkeypatch.context() as patch:
        patch.setattr(GUIDES["full"], "constant_parts", ())
        build(replace(spec, out=tmp_path / "whole"))
    parted, whole = (Pipeline.load(tmp_path / n, provider="cpu") for n in ("parted", "whole"))
    assert "condition" in parted.bundle.manifest.networks and "condition" not in whole.bundle.manifest.networks
    request: dict[str, Any] = {"guidance": [1.5, 6.0], "seed": [1, 2]}
    images = [p(["a red apple", "a blue car"], **request) for p in (parted, whole, Pipeline.load(made))]
    for a, b, c in zip(*images, strict=True):
        assert np.abs(a.pixels.astype(int) - b.pixels).max() <= 1 and np.abs(a.pixels.astype(int) - c.pixels).max() <= 1


def test_the_distilled_step_count_is_the_default_and_others_warn(made: Path) -> None:
    pipeline = Pipeline.load(made)
    assert pipeline("a red apple")[0].parameters["steps"] == 4
    with pytest.warns(UserWarning, match="was distilled for 4 steps and is run with 6; its images may be wrong"):
        assert pipeline("a red apple", steps=6)[0].parameters["steps"] == 6
    # other methods do not run the guide and take any number of steps
    assert pipeline("a red apple", method="unguided")[0].parameters["steps"] == 20


def test_negative_prompts_change_the_image_unless_empty(made: Path) -> None:
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


def test_negative_prompts_use_cfg_if_the_guide_takes_none(engines: Path, cli: Callable[..., Result]) -> None:
    arguments = ["sample", "a red apple", "--engine", "guided", "--negative", "blue", "--out", engines.parent / "s"]
    done = cli(*arguments, "--steps", 4)
    assert done.code == 0 and "takes no negative prompt; using CFG, two model evaluations per step" in done.err
    assert "CFG" not in cli(*arguments, "--steps", 4, "--method", "cfg").err
    refused = cli(*arguments, "--method", "guided")
    assert refused.code == 2 and "takes no negative prompt with method 'guided'" in refused.err
    guided, plain = (Pipeline.load(engines / name) for name in ("guided", "plain"))
    prompts, negatives = ["a red apple", "a panda", "a car"], ["blue", "", "a red apple"]
    progress: list[tuple[int, int]] = []
    images = guided(prompts, steps=4, seed=[1, 2, 3], negative=negatives, callback=lambda *at: progress.append(at))
    expected = plain(prompts, steps=4, seed=[1, 2, 3], negative=negatives)
    for image, other in zip(images, expected, strict=True):
        assert np.abs(image.pixels.astype(int) - other.pixels).max() <= 1
        assert image.parameters == other.parameters | {"engine": "guided", "method": "cfg"}
    assert progress[-1] == (12, 12) and [done for done, _ in progress] == sorted(done for done, _ in progress)
    with pytest.raises(Cancelled, match="after 3 of 12 steps"):
        guided(prompts, steps=4, negative=negatives, callback=lambda *_: False)
    with pytest.raises(InputError, match="guided_interval goes with method 'cfg-interval', not with 'cfg'"):
        guided(prompts, steps=4, negative=negatives, guided_interval=(10, 500))
    # an empty negative prompt is ignored
    (image,) = guided("a panda", steps=4, negative="")
    assert image.parameters["method"] == "guided" and "negative" not in image.parameters


def test_a_method_that_needs_more_rows_than_the_engine_takes_is_refused(
    engines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guided = Pipeline.load(engines / "guided")
    monkeypatch.setattr(guided, "legal_batches", lambda size=None: [1])
    with pytest.raises(InputError, match="'cfg' needs 2 rows of a batch, but engine 'guided' was built for 1; rebuild"):
        guided("a panda", negative="blue")


def test_negative_prompts_change_the_images_of_cfg(engines: Path) -> None:
    plain = Pipeline.load(engines / "plain")
    one, other = (plain("a red apple", steps=4, method="cfg", negative=n)[0].pixels for n in (None, "a blue car"))
    assert not np.array_equal(one, other)


def test_images_that_share_calls_use_their_own_condition_and_negative_prompt(made: Path) -> None:
    pipeline = Pipeline.load(made, provider="cpu", threads=1)
    requests: list[dict[str, Any]] = [
        {"prompts": "a red apple", "guidance": 5.0, "negative": "a blue car", "seed": 1},
        {"prompts": "a panda", "guidance": 2.0, "seed": 2},
        {"prompts": "a panda", "guidance": 2.0, "seed": 2, "method": "unguided", "steps": 4},
        {"prompts": "a blue car", "guidance": 7.0, "negative": "", "seed": 3},
    ]
    loop = pipeline.step_loop(4)
    prepared = [pipeline.prepare(**request) for request in requests]
    tickets = [loop.submit(lambda p=p: pipeline.run(p, 0), len(p.table), p.rows) for p in prepared]  # type: ignore[misc]
    while loop.running or loop.waiting:
        loop.step()
    assert loop.calls == 4  # one call per step for all images
    for request, ticket in zip(requests, tickets, strict=True):
        assert ticket.latents is not None
        if "method" not in request:
            np.testing.assert_array_equal(pipeline.decode(ticket.latents[None])[0], pipeline(**request)[0].pixels)
    assert not np.array_equal(tickets[1].latents, tickets[2].latents)
