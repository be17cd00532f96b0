"""Bundles of a guide with a sharpener: an additional network, negative prompts, and an unchanged U-Net."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from pnp_trt.build.builder import build
from pnp_trt.build.spec import BuildSpec
from pnp_trt.bundle.store import open_bundle
from pnp_trt.models.bases import resolve
from pnp_trt.models.guides.load import load_guide
from pnp_trt.models.guides.sharpener import without_sharpener
from pnp_trt.models.student import Student
from pnp_trt.runtime.pipeline import Pipeline
from pnp_trt.runtime.verify import verify

PROMPTS, NEGATIVE = ["a red apple", "a blue car"], ["red", "wheels, a panda"]


@pytest.fixture(scope="module")
def home(micro_base: Path, sharpened_guide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Guides ``with`` and ``without`` a sharpener, otherwise the same, and a bundle of each."""
    home = tmp_path_factory.mktemp("sharpener")
    shutil.copytree(sharpened_guide, home / "guide-with")
    without_sharpener(load_guide(str(sharpened_guide))).save_pretrained(home / "guide-without")
    for name in ("with", "without"):
        build(BuildSpec(str(micro_base), str(home / f"guide-{name}"), out=home / name))
    return home


def test_the_sharpener_is_a_separate_network_and_the_unet_is_unchanged(home: Path) -> None:
    ours, theirs = (open_bundle(home / name).manifest for name in ("with", "without"))
    assert ours.networks.keys() - theirs.networks.keys() == {"sharpener"}
    for file in ("unet.onnx", "unet.onnx.data", "text_encoder.onnx", "vae_decoder.onnx"):
        assert ours.files[file].sha256 == theirs.files[file].sha256
    assert ours.guide is not None and ours.guide.negative_prompts and "negative" not in ours.networks["unet"].inputs
    assert verify(open_bundle(home / "with")).keys() == ours.networks.keys()


@torch.no_grad()
@pytest.mark.parametrize("backend", ["onnxruntime", "torch", "openvino"])
def test_latents_with_negative_prompts_equal_the_students(
    home: Path, micro_base: Path, backend: str, tmp_path: Path
) -> None:
    """The pipeline's latents equal those of DDIM with PyTorch's student, which contains the sharpener."""
    if backend != "onnxruntime":
        build(BuildSpec(str(micro_base), str(home / "guide-with"), backend=backend, out=tmp_path / "b"))
    pipeline = Pipeline.load(home / "with" if backend == "onnxruntime" else tmp_path / "b", provider="cpu")
    student = Student(resolve(str(micro_base)).unet(), load_guide(str(home / "guide-with")))
    text, negative, empty = (pipeline.encode(p).states for p in (PROMPTS, NEGATIVE, ["", ""]))
    w = np.array([2.0, 6.0], np.float32)
    noise = pipeline.noise([1, 2])
    table = pipeline.schedule(4, "ddim")
    latents = pipeline.denoise(text, noise, steps=4, guidance=w, negative=negative, schedule=table)
    x = torch.from_numpy(noise) * float(table.init_scale)
    tensors = [torch.from_numpy(np.array(a)) for a in (text, w, negative, empty)]
    for t, a, b in zip(table.timesteps, table.x_scale, table.output_scale, strict=True):
        out = student(x, torch.full((2,), int(t)), tensors[0], tensors[1], tensors[2], empty=tensors[3])
        x = float(a) * x + float(b) * out
    np.testing.assert_allclose(latents, x.numpy(), atol=2e-4 * float(x.abs().max()))
    plain = pipeline.denoise(text, noise, steps=4, guidance=w, schedule=table)
    assert np.abs(latents - plain).max() > 50 * np.abs(latents - x.numpy()).max()


def test_without_a_negative_prompt_the_sharpener_changes_no_image(home: Path) -> None:
    ours, theirs = (Pipeline.load(home / name, provider="cpu") for name in ("with", "without"))
    expected = theirs(PROMPTS, guidance=[2.0, 6.0], steps=4)
    for negative in (None, ""):
        for a, b in zip(ours(PROMPTS, guidance=[2.0, 6.0], steps=4, negative=negative), expected, strict=True):
            assert np.array_equal(a.pixels, b.pixels)
    changed = ours(PROMPTS, guidance=[1.0, 6.0], steps=4, negative=NEGATIVE)
    plain = ours(PROMPTS, guidance=[1.0, 6.0], steps=4)
    assert np.abs(changed[0].pixels.astype(int) - plain[0].pixels).max() <= 1  # w = 1
    assert not np.array_equal(changed[1].pixels, plain[1].pixels)


def test_images_that_share_calls_use_their_own_negative_prompts(home: Path) -> None:
    pipeline = Pipeline.load(home / "with", provider="cpu", threads=1)
    requests = [{"prompts": p, "negative": n, "guidance": 5.0, "steps": 4, "seed": i, "method": m}
             for i, (p, n, m) in enumerate([(PROMPTS[0], NEGATIVE[0], "guided"), (PROMPTS[1], None, "guided"),
                                            (PROMPTS[0], NEGATIVE[1], "guided")])]  # fmt: skip
    loop = pipeline.step_loop(3)
    prepared = [pipeline.prepare(**request) for request in requests]  # type: ignore[arg-type]
    tickets = [loop.submit(lambda p=p: pipeline.run(p, 0), len(p.table), p.rows) for p in prepared]  # type: ignore[misc]
    while loop.running or loop.waiting:
        loop.step()
    for request, ticket in zip(requests, tickets, strict=True):
        alone = pipeline(**request)[0].pixels  # type: ignore[arg-type]
        np.testing.assert_array_equal(pipeline.decode(ticket.latents[None])[0], alone)


def test_changes_of_the_chunks_of_long_prompts_are_added(home: Path, micro_base: Path, tmp_path: Path) -> None:
    built = build(BuildSpec(str(micro_base), str(home / "guide-with"), tokens=154, out=tmp_path / "long"))
    assert built.manifest.networks["sharpener"].inputs["negative"][1][1] == 77
    short, long = Pipeline.load(home / "with", provider="cpu"), Pipeline.load(tmp_path / "long", provider="cpu")
    for negative in ("red", "red BREAK"):  # a chunk of the empty prompt changes nothing
        one = short("a red apple", negative="red", guidance=6.0, steps=4)[0].pixels
        other = long("a red apple", negative=negative, guidance=6.0, steps=4, prompt_syntax="a1111")[0].pixels
        if negative == "red":
            assert np.abs(one.astype(int) - other).max() <= 1
    negatives = ["red BREAK wheels", "wheels BREAK red"]
    two = long(["a red apple BREAK a car"] * 2, negative=negatives, guidance=6.0, steps=4, prompt_syntax="a1111",
               seed=[1, 1])  # fmt: skip
    # changes are added, so the order of the negative prompt's chunks does not matter
    assert np.abs(two[0].pixels.astype(int) - two[1].pixels).max() <= 1
