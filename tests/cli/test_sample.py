"""`pnp-trt sample`: schedules, starting images, prompts from standard input, and the files that it writes."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pnp_trt.runtime.images import read_parameters

from ..conftest import Result

Cli = Callable[..., Result]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "start.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(path)
    return path


@pytest.mark.parametrize(
    ("asked", "made"), [("dpm++", "dpm++"), ("euler", "euler"), ("teacher", "ddim"), (None, "ddim")]
)
def test_an_image_records_its_schedule(cli: Cli, engines: Path, tmp_path: Path, asked: str | None, made: str) -> None:
    chosen = ["--schedule", asked] if asked else []
    done = cli("sample", "a cat", "--engine", "guided", "--steps", 3, "--out", tmp_path, *chosen)
    assert done.code == 0, done.err
    assert read_parameters(tmp_path / "a-cat-0.png")["schedule"] == made


def test_init_starts_from_an_image(cli: Cli, engines: Path, image: Path, tmp_path: Path) -> None:
    arguments = ["sample", "a cat", "--engine", "plain", "--steps", 8, "--init", image, "--out", tmp_path / "s"]
    assert cli(*arguments, "--strength", 0.25, "--schedule", "dpm++").code == 0
    parameters = read_parameters(tmp_path / "s" / "a-cat-0.png")
    assert parameters["init"] == str(image) and parameters["strength"] == 0.25 and parameters["steps"] == 8
    Image.open(image).resize((40, 20)).save(image.with_name("wide.png"))
    done = cli(*arguments, "--init", image.with_name("wide.png"))
    assert done.code == 0 and "pnp-trt: the starting image is 40 × 20 and was resized" in done.err


@pytest.mark.parametrize(
    ("kind", "suffix", "exact"), [("png", "png", True), ("webp", "webp", True), ("jpeg", "jpg", False)]
)
def test_every_format_stores_image_and_parameters(
    cli: Cli, engines: Path, tmp_path: Path, kind: str, suffix: str, exact: bool
) -> None:
    arguments = ["sample", "a café, “quoted”", "--engine", "guided", "--steps", 2, "--out", tmp_path]
    assert cli(*arguments).code == 0
    done = cli(*arguments, "--format", kind, "--metadata", "json")
    assert done.code == 0, done.err
    (path,) = [Path(line) for line in done.out.split("\n") if line]
    assert path.suffix == f".{suffix}"
    parameters = read_parameters(path)
    assert parameters["prompt"] == "a café, “quoted”" and parameters == json.loads(
        path.with_suffix(".json").read_text()
    )
    first, second = (np.asarray(Image.open(p).convert("RGB"), int) for p in (tmp_path / "a-caf-quoted-0.png", path))
    assert np.array_equal(first, second) if exact else np.abs(first - second).mean() < 8


def test_a_json_file_is_never_overwritten(cli: Cli, engines: Path, tmp_path: Path) -> None:
    (tmp_path / "a-cat-0.json").write_text("precious")
    done = cli("sample", "a cat", "--engine", "guided", "--steps", 2, "--out", tmp_path, "--metadata", "json")
    assert done.code == 0 and done.out.strip().endswith("a-cat-0-2.png")
    assert (tmp_path / "a-cat-0.json").read_text() == "precious" and (tmp_path / "a-cat-0-2.json").exists()


def test_prompts_come_from_standard_input(
    cli: Cli, engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("a cat\n\n  a red apple \n"))
    grid = tmp_path / "grids" / "all.png"
    done = cli("sample", "-", "a dog", "-n", 2, "--engine", "guided", "--steps", 2, "--out", tmp_path / "s",
               "--grid", grid, "--quiet")  # fmt: skip
    assert done.code == 0 and not done.err
    names = [Path(line).name for line in done.out.split()]
    assert names == ["a-cat-0.png", "a-cat-1.png", "a-red-apple-0.png", "a-red-apple-1.png", "a-dog-0.png",
                     "a-dog-1.png", "all.png"]  # fmt: skip
    assert [p["prompt"] for p in read_parameters(grid)["images"]][::2] == ["a cat", "a red apple", "a dog"]
    assert Image.open(grid).width > 2 * 64 and Image.open(grid).height > 3 * 64
    again = cli("sample", "a cat", "--engine", "guided", "--steps", 2, "--out", tmp_path / "t", "--grid", grid)
    assert again.code == 2 and "exists and is not overwritten" in again.err and not (tmp_path / "t").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--schedule", "plms"], "the schedule is 'plms'; known: ddim, dpm++, euler, heun, unipc, teacher"),
        (["--format", "gif"], "--format is 'gif'; known: png, webp, jpeg"),
        (["--metadata", "xml"], "--metadata is 'xml'; known: embedded, json"),
        (["--init", "none.png"], "--init none.png does not exist; name an image file"),
        (["--init", "START", "--strength", "1.2"], "strength is 1.2; it must be above 0 and at most 1"),
        (["--init", "START", "--strength", "0.1"], "strength 0.1 of 2 steps is less than one step"),
        (["--strength", "0.5"], "no starting image was given"),
        (["--init", "START", "--engine", "guided"], "engine 'guided' has no VAE encoder"),
        (["-"], "standard input has no prompt"),
    ],
)
def test_bad_arguments_exit_with_2_and_one_sentence(
    cli: Cli, engines: Path, image: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n \n"))
    out = image.parent / "out"
    words = [str(image) if a == "START" else a for a in arguments]
    done = cli("sample", "a cat", "--engine", "plain", "--steps", 2, "--out", out, *words)
    assert done.code == 2 and message in done.err and "Traceback" not in done.err
    assert not out.exists()


def test_bench_records_its_schedule(cli: Cli, engines: Path, tmp_path: Path) -> None:
    arguments = ["bench", "--engine", "plain", "--engine", "guided", "--only", "latency", "--batch", 1, "--steps", 2,
                 "--rounds", 1, "--no-peers", "--no-memory", "--cold-starts", 0, "--json"]  # fmt: skip
    for options, schedule in (([], "ddim"), (["--schedule", "dpm++"], "dpm++")):
        path = tmp_path / f"{schedule}.json"
        done = cli(*arguments, path, *options)
        assert done.code == 0, done.err
        assert json.loads(path.read_text())["settings"]["schedule"] == schedule
    assert cli(*arguments, tmp_path / "x.json", "--schedule", "plms").code == 2


def test_verify_includes_the_vae_encoder(cli: Cli, engines: Path) -> None:
    done = cli("verify", "plain")
    assert done.code == 0 and "vae_encoder: relative error" in done.out
    assert "--image-to-image" in json.loads((engines / "plain" / "manifest.json").read_text())["rebuild"]
