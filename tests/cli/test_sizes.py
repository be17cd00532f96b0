"""Several image sizes through one bundle, from the command line to the PNG."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pnp_trt.build.builder import build
from pnp_trt.build.spec import BuildSpec
from pnp_trt.errors import InputError
from pnp_trt.runtime.pipeline import Pipeline

from ..bundles import document
from ..conftest import Result

Cli = Callable[..., Result]


@pytest.fixture(scope="module")
def guided(micro_base: Path, micro_guide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The micro student with sizes around its own 32x32; do not write into it."""
    out = tmp_path_factory.mktemp("sized") / "guided"
    build(BuildSpec(str(micro_base), str(micro_guide), out=out, profiles=("b1@32-48", "b4@64x64")))
    return out


@pytest.fixture(scope="module")
def plain(micro_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The micro teacher, down to a U-Net's deepest features of one by one; do not write into it."""
    out = tmp_path_factory.mktemp("sized") / "plain"
    build(BuildSpec(str(micro_base), "none", out=out, profiles=("b1", "b1@8-64")))
    return out


def test_one_bundle_draws_several_sizes(guided: Path, cli: Cli, tmp_path: Path) -> None:
    for size in (None, "48", "64x64", "32x48", "40x48"):
        done = cli("sample", "a red apple", "--engine", guided, "--steps", 2, "--out", tmp_path / "s", "-q",
                   *(["--size", size] if size else []))  # fmt: skip
        assert done.code == 0, done.err
        height, _, width = (size or "32").partition("x")
        with Image.open(done.out.strip()) as image:
            assert image.size == (int(width or height), int(height))
            said = json.loads(image.info["pnp-trt"])
        assert said["size"] == f"{height}x{width or height}"


def test_other_sizes_are_refused_with_the_legal_ones(guided: Path, cli: Cli, tmp_path: Path, engines: Path) -> None:
    for engine, size, legal in (
        (guided, "36x32", "32-48x32-48 in steps of 8, 64x64"),
        (guided, "48x64", "32-48x32-48 in steps of 8, 64x64"),
        (engines / "guided", "64", "32x32"),
    ):
        done = cli("sample", "x", "--engine", engine, "--size", size, "--out", tmp_path / "s")
        assert done.code == 2 and f"supports {legal} (height x width in pixels)" in done.err
        assert "--profile b1@HEIGHTxWIDTH" in done.err
    assert "such as 512x768" in cli("sample", "x", "--size", "64*64", "--out", tmp_path / "s").err
    assert not (tmp_path / "s").exists()


def test_a_size_draws_what_its_own_bundle_draws(
    plain: Path, micro_base: Path, micro_bundles: Path, tmp_path: Path
) -> None:
    """The open graph and the fixed one give the same images, at the model's own size and at another."""
    build(BuildSpec(str(micro_base), "none", out=tmp_path / "fixed", profiles=("b1@16x40",)))
    sized, fixed, own = (Pipeline.load(p) for p in (plain, tmp_path / "fixed", micro_bundles / "plain"))
    assert (sized.size, fixed.size, own.size) == ((32, 32), (16, 40), (32, 32))
    assert "height" not in str(fixed.bundle.manifest.networks["unet"].inputs)
    for other, size in ((fixed, (16, 40)), (own, (32, 32))):
        for method in ("cfg", "unguided"):
            a = sized("a cat", steps=3, seed=5, method=method, size=size)[0]
            b = other("a cat", steps=3, seed=5, method=method)[0]
            assert a.pixels.shape == (*size, 3) and a.parameters["size"] == b.parameters["size"]
            assert np.abs(a.pixels.astype(int) - b.pixels).max() <= 1
    smallest = sized(["a cat"] * 3, steps=2, size=(8, 8))
    assert [p.pixels.shape for p in smallest] == [(8, 8, 3)] * 3


def test_the_default_size_draws_the_same_noise_as_ever(plain: Path, micro_bundles: Path) -> None:
    sized, own = Pipeline.load(plain), Pipeline.load(micro_bundles / "plain")
    assert np.array_equal(sized.noise([3]), own.noise([3])) and np.array_equal(own.noise([3], (32, 32)), own.noise([3]))
    assert sized.noise([3, 4], (16, 64)).shape == (2, 4, 4, 16)
    with pytest.raises(InputError, match="size is 12x32"):
        sized.noise([0], (12, 32))


def test_manifest_inspect_and_verify_know_the_sizes(plain: Path, cli: Cli) -> None:
    m = document(plain)
    assert [p["name"] for p in m["profiles"]] == ["b1-32@32x32", "b1-32@8-64x8-64"]
    assert m["profiles"][1]["height"] == [8, 32, 64] and m["profiles"][1]["step"] == 8
    assert m["networks"]["unet"]["inputs"]["sample"] == ["float32", ["batch", 4, "height", "width"]]
    assert m["networks"]["vae_decoder"]["outputs"]["sample"][1] == ["batch", 3, "image_height", "image_width"]
    assert set(m["networks"]["unet"]["parity"]["sizes"]) == {"32x32", "8x64"}
    assert "--profile b1 --profile b1@8-64" in m["rebuild"]
    shown = cli("inspect", plain).out
    assert "b1-32@8-64x8-64" in shown and "32x32 (height x width); legal: 32x32, 8-64x8-64 in steps of 8" in shown
    verified = cli("verify", plain)
    assert (
        verified.code == 0
        and "unet@8x64: relative error" in verified.out
        and "vae_decoder@8x64: relative error" in verified.out
    )


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        ("b1@60", "but sizes of this model are multiples of 8 pixels from 8 to 4096; its native size is 64x64"),
        ("b1@64x", "profile is 'b1@64x'; write b1"),
        ("b2-8", "takes any batch size up to 32; omit --profile, or add an image size to it, such as b1@512x768"),
    ],
)  # fmt: skip
def test_impossible_sizes_are_refused_before_anything_is_made(
    cli: Cli, tmp_path: Path, profile: str, message: str
) -> None:
    done = cli("build", "--profile", profile, "--out", tmp_path / "x")
    assert done.code == 2 and message in done.err and not (tmp_path / "x").exists()


def test_a_size_is_timed_where_the_engine_has_it(guided: Path, cli: Cli, tmp_path: Path) -> None:
    run = ("bench", "--engine", guided, "--batch", 1, "--steps", 1, "--rounds", 1, "--no-memory", "--cold-starts", 0,
           "--json", tmp_path / "bench.json")  # fmt: skip
    done = cli(*run, "--only", "latency", "--size", "32x48")
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["settings"]["size"] == [32, 48] and [row["method"] for row in found["latency"]] == ["guided"]
    refused = cli(*run, "--only", "latency", "--size", "32x56")
    assert (
        refused.code == 2 and "size is 32x56; engine 'guided' supports 32-48x32-48 in steps of 8, 64x64" in refused.err
    )
    assert "add --only latency" in cli(*run, "--size", "32x48").err


def test_an_rtx_engine_has_a_profile_for_each_size(
    micro_base: Path, micro_guide: Path, tmp_path: Path, cli: Cli
) -> None:
    pytest.importorskip("tensorrt_rtx")
    done = cli("build", "--base", micro_base, "--guide", micro_guide, "--backend", "tensorrt-rtx", "--precision",
               "fp16", "--target", "sm_89", "--profile", "b1", "--profile", "b1-2@32-64",
               "--out", tmp_path / "rtx")  # fmt: skip
    assert done.code == 0, done.err
    m = document(tmp_path / "rtx")
    assert [(p["name"], p["height"]) for p in m["profiles"]] == [("b1", [32, 32, 32]), ("b1-2@32-64", [32, 32, 64])]
    unet = m["networks"]["unet"]
    assert [p["width"] for p in unet["profiles"]] == [[8, 8, 8], [8, 8, 16]] and unet["file"] == "unet.engine"
    assert m["networks"]["text_encoder"]["profiles"] == [{"name": "b1", "minimum": 1, "optimum": 1, "maximum": 1}]
    assert max(unet["parity"]["sizes"].values()) < unet["parity"]["limit"] and len(unet["parity"]["sizes"]) == 2
    assert "b1-2@32-64" in cli("inspect", tmp_path / "rtx").out
