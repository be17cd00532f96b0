"""`pnp-trt bench` through the command line, on a micro teacher."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pnp_trt.bench.fidelity_rows import Studio
from pnp_trt.bench.measure import roofline

from ..bundles import reseal
from ..conftest import Result

Cli = Callable[..., Result]
BOTH = ("bench", "--engine", "plain", "--engine", "guided")
#: without the parts that start further processes
ALONE = ("--no-peers", "--no-memory", "--cold-starts", 0)
SMALL = ("--rounds", 2, "--steps", 2, "--batch", 1, "--guidance", 3, "--images", 4, *ALONE)


@pytest.fixture(autouse=True)
def small_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure the device's peaks with small products; tests/bench/test_roofline.py tests the real ones."""
    small = partial(roofline.measure_device, sides=(64,), bytes_=1 << 20, seconds=0.01)
    monkeypatch.setattr(roofline, "measure_device", small)


def read(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text())
    return document


def test_bench_writes_json_html_and_grid(cli: Cli, engines: Path, tmp_path: Path) -> None:
    files = [tmp_path / n for n in ("b.json", "b.html", "b.png")]
    done = cli(*BOTH, *SMALL, "--json", files[0], "--html", files[1], "--grid", files[2])
    assert done.code == 0, done.err
    document = read(files[0])
    assert [r["network"] for r in document["cost"]][:2] == ["teacher", "guide-tiny"]
    timed = {(r["engine"], r["method"]) for r in document["latency"]}
    assert {("plain", "cfg"), ("plain", "unguided"), ("guided", "guided"), ("plain", "cfg-two-passes")} <= timed
    assert all(r["p50_ms"] > 0 and r["ratio_to_cfg"] > 0 and r["resumed"] is False for r in document["latency"])
    assert all(r["least_ms"] > 0 for r in document["latency"] if r["method"] != "guided")
    assert document["device"]["peak_macs_per_s"] > 0
    assert {r["method"] for r in document["fidelity"]} >= {"cfg-interval", "cfg-fewer-steps", "guided", "unguided"}
    for row in document["fidelity"]:
        near = row["psnr_to_cfg_db"]
        assert near["low"] <= near["value"] <= near["high"] and near["count"] == row["images"] == 4
    # the micro teacher has no real images and must not be mistaken for the bundled model
    assert document["task_quality_evaluated"] is False
    assert "no real images are bundled for the base model" in document["task_quality_reason"]
    assert document["task_quality_reason"] in [item["why"] for item in document["left_out"]]
    assert document["settings"]["engines"] == ["plain", "guided"] and document["settings"]["suite"] is None
    assert len(document["images"]["rows"]) == 3 and len(document["images"]["rows"][0]["png"]) == 8
    assert files[1].read_text().startswith("<!doctype html>") or "<html" in files[1].read_text()[:200]
    assert Image.open(files[2]).width > 300
    assert "this run takes about" in done.err and not (tmp_path / "b.json.partial").exists()


def test_cold_start_and_memory_are_measured_in_separate_processes(cli: Cli, engines: Path, tmp_path: Path) -> None:
    done = cli(
        "bench", "--engine", "guided", "--only", "latency", "--batch", 1, "--steps", 1, "--rounds", 1, "--cold-starts",
        1, "--json", tmp_path / "b.json",
    )  # fmt: skip
    assert done.code == 0, done.err
    document = read(tmp_path / "b.json")
    (start,) = document["cold_start"]
    assert start["engine"] == "guided" and len(start["seconds"]) == 1 and 0 < start["imports_s"] < start["p50_s"] * 5
    assert document["latency"][0]["peak_memory_bytes"] > 1 << 20
    left_out = {item["what"]: item["why"] for item in document["left_out"]}
    assert "engines runs CFG" in left_out["peers (diffusers, optimum-onnx)"] and "energy per image" in left_out
    assert (
        document["latency"][0]["least_ms"] is None and "cost was not counted" in left_out["least time on this device"]
    )


class Peer:
    """Another library's pipeline that returns blank images, or fails."""

    def __init__(self, kind: str, base: str, broken: bool) -> None:
        self.name, self.base, self.methods, self.broken = "micro", base, (kind,), broken

    def encode(self, prompts: list[str]) -> np.ndarray:
        return np.zeros((len(prompts), 77, 32), np.float32)

    def noise(self, seeds: list[int], size: object = None) -> np.ndarray:
        return np.zeros((len(seeds), 4, 8, 8), np.float32)

    def denoise(self, context: np.ndarray, noise: np.ndarray, **_: object) -> np.ndarray:
        if self.broken:
            raise ValueError("no such operator\nand much more")
        return noise

    def decode(self, latents: np.ndarray) -> np.ndarray:
        return np.zeros((len(latents), 64, 64, 3), np.uint8)


def test_peers_are_timed_and_a_failing_one_is_left_out(
    cli: Cli, engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pnp_trt.bench.measure import peers
    from pnp_trt.bench.measure.cases import Case

    base = read(engines / "plain" / "manifest.json")["base"]["sha256"]["all"]
    cases = [Case(Peer(kind, base, kind == "diffusers-compile"), kind) for kind in ("diffusers", "diffusers-compile")]
    missing = {"what": "optimum-onnx", "why": "it is not installed"}
    monkeypatch.setattr(peers, "available", lambda *_, **__: (cases, [missing]))
    done = cli(
        *BOTH, "--only", "latency", "--steps", 2, "--batch", 1, "--rounds", 1, "--no-memory", "--cold-starts", 0,
        "--json", tmp_path / "b.json",
    )  # fmt: skip
    assert done.code == 0, done.err
    document = read(tmp_path / "b.json")
    (row,) = [r for r in document["latency"] if r["method"] == "diffusers"]
    assert row["ratio_reference"] == "plain/cfg" and row["ratio_to_cfg"] < 1
    left_out = {item["what"]: item["why"] for item in document["left_out"]}
    assert left_out["diffusers-compile"] == "it failed in its first step (ValueError: no such operator)"
    assert left_out["optimum-onnx"] == "it is not installed"
    assert "diffusers-compile" not in {r["method"] for r in document["latency"]}


def test_user_supplied_prompts_and_real_images_are_used(cli: Cli, engines: Path, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("a cat\na dog\na cow\n")
    (tmp_path / "real").mkdir()
    rng = np.random.default_rng(0)
    for i in range(5):
        Image.fromarray(rng.integers(0, 256, (9 + i, 12, 3), np.uint8)).save(tmp_path / "real" / f"{i}.png")
    own = ("--prompts", tmp_path / "words.txt", "--real", tmp_path / "real", "--only", "fidelity")
    done = cli(*BOTH, *SMALL, "--steps", 3, *own, "--json", tmp_path / "b.json")
    assert done.code == 0, done.err
    document = read(tmp_path / "b.json")
    assert document["task_quality_evaluated"] is True and document["task_quality_reason"] is None
    assert document["settings"]["drawn"]["prompts"] == "words.txt" and document["settings"]["drawn"]["real_images"] == 5
    rows = {(r["method"], r["steps"]): r for r in document["fidelity"]}
    assert {"kid", "kid_gain_over_cfg", "feature_cosine_to_cfg"} <= set(rows["guided", 2]) and "r_at_1" not in rows[
        "guided", 2
    ]
    assert "kid" in rows["cfg", 3] and "kid_gain_over_cfg" not in rows["cfg", 3]  # CFG is the reference itself
    assert document["images"]["columns"] == ["a cat", "a dog", "a cow", "a cat"]


def test_user_supplied_weights_replace_kid_and_alignment(
    cli: Cli, engines: Path, tmp_path: Path, clip_folder: Path
) -> None:
    import torch
    from safetensors.torch import save_file

    from pnp_trt.bench.metrics.inception import WIDTH, build

    torch.manual_seed(0)
    save_file({**build(fid=True).state_dict(), "fc.weight": torch.zeros(1008, WIDTH)}, tmp_path / "i.safetensors")
    (tmp_path / "words.txt").write_text("a cat\na dog\n")
    (tmp_path / "real").mkdir()
    for i in range(2):
        Image.new("RGB", (9, 9), (100 * i, 0, 50)).save(tmp_path / "real" / f"{i}.png")
    done = cli(
        "bench", "--engine", "guided", "--only", "fidelity", "--steps", 1, "--guidance", 3, "--images", 2,
        "--prompts", tmp_path / "words.txt", "--real", tmp_path / "real", "--inception", tmp_path / "i.safetensors",
        "--clip", clip_folder, "--json", tmp_path / "b.json",
    )  # fmt: skip
    assert done.code == 0, done.err
    document = read(tmp_path / "b.json")
    (row,) = document["fidelity"]
    assert {"fid_inception", "clip_score"} <= set(row) and not {"kid", "r_at_1"} & set(row)
    assert row["fid_inception"]["value"] > 0 and 0 <= row["clip_score"]["value"] <= 100
    assert document["task_quality_evaluated"] is True


def test_a_resumed_run_gives_the_same_rows(
    cli: Cli, engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, killed = tmp_path / "whole.json", tmp_path / "killed.json"
    assert cli(*BOTH, *SMALL, "--json", whole).code == 0
    draw, drawn = Studio._draw, []

    def interrupted(self: Studio, cell: Any, callback: Any) -> Any:
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(cell)
        return draw(self, cell, callback)

    monkeypatch.setattr(Studio, "_draw", interrupted)
    done = cli(*BOTH, *SMALL, "--json", killed)
    assert done.code == 130 and f"kept in {killed}.partial; resume with the same command and --resume" in done.err
    assert not killed.exists()
    again = cli(*BOTH, *SMALL, "--json", killed)
    assert again.code == 2 and "holds this run already; continue it with --resume" in again.err
    other = cli(*BOTH, *SMALL, "--rounds", 3, "--json", killed, "--resume")
    assert other.code == 2 and "other settings (rounds was 2 and is 3)" in other.err

    def counted(self: Studio, cell: Any, callback: Any) -> Any:
        drawn.append(cell)
        return draw(self, cell, callback)

    monkeypatch.setattr(Studio, "_draw", counted)
    (tmp_path / ".killed.json.partial-0a1b2c3d").write_text("what a process that was killed left")
    (tmp_path / ".whole.json.partial-0a1b2c3d").write_text("another run's")
    done = cli(*BOTH, *SMALL, "--json", killed, "--resume")
    assert done.code == 0 and "pieces are finished already" in done.err, done.err
    assert len(drawn) == len(set(drawn))  # nothing is generated twice
    assert read(killed)["fidelity"] == read(whole)["fidelity"] and read(killed)["images"] == read(whole)["images"]
    assert all(r["resumed"] for r in read(killed)["latency"])
    assert not Path(f"{killed}.partial").exists()
    assert [p.name for p in tmp_path.glob(".*.partial-*")] == [".whole.json.partial-0a1b2c3d"]


def test_a_run_is_not_resumed_with_a_rebuilt_engine(
    cli: Cli, engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Path(shutil.copytree(engines, tmp_path / "engines"))
    monkeypatch.setenv("PNP_TRT_ENGINES", str(home))
    draw, drawn = Studio._draw, []

    def interrupted(self: Studio, cell: Any, callback: Any) -> Any:
        if drawn:
            raise KeyboardInterrupt
        drawn.append(cell)
        return draw(self, cell, callback)

    monkeypatch.setattr(Studio, "_draw", interrupted)
    run = (*BOTH, *SMALL, "--only", "fidelity", "--json", tmp_path / "b.json")
    assert cli(*run).code == 130
    reseal(home / "guided", lambda m: m.update(rebuild="differently"))
    done = cli(*run, "--resume")
    assert done.code == 2 and "other settings (seals.guided was" in done.err


def test_options_override_a_suite(cli: Cli, engines: Path, tmp_path: Path) -> None:
    suite = tmp_path / "mine.toml"
    suite.write_text(
        'engines = ["plain", "guided"]\nonly = "latency"\nsteps = 2\nbatches = 2\nrounds = 5\npeers = false\n'
        "memory = false\ncold_starts = 0\n"
    )
    done = cli("bench", "--suite", suite, "--rounds", 1, "--json", tmp_path / "b.json")
    assert done.code == 0, done.err
    document = read(tmp_path / "b.json")
    assert document["settings"]["suite"] == "mine" and document["settings"]["rounds"] == 1
    assert {(r["batch"], r["steps"]) for r in document["latency"] if r["method"] == "guided"} == {(2, 2)}
    unknown = cli("bench", "--suite", "nothing")
    assert unknown.code == 2 and "known suites: " in unknown.err and "readme-emoji" in unknown.err


def test_compare_refuses_another_base_before_measuring(cli: Cli, engines: Path, tmp_path: Path) -> None:
    run = (*BOTH, *SMALL, "--only", "fidelity", "--json")
    assert cli(*run, tmp_path / "old.json").code == 0
    done = cli(*run, tmp_path / "new.json", "--compare", tmp_path / "old.json")
    assert done.code == 0 and str(tmp_path / "new.json") in done.out, done.err
    old = read(tmp_path / "old.json")
    (tmp_path / "other.json").write_text(json.dumps(old | {"settings": old["settings"] | {"base": "emoji"}}))
    done = cli(*run, tmp_path / "new.json", "--compare", tmp_path / "other.json")
    assert done.code == 2 and "the old results are of base 'emoji'" in done.err and "drawing" not in done.err
    (tmp_path / "cut.json").write_text((tmp_path / "old.json").read_text()[:1000])
    assert cli(*run, tmp_path / "new.json", "--compare", tmp_path / "cut.json").code == 2


def test_cost_of_a_public_architecture(cli: Cli, tmp_path: Path) -> None:
    done = cli("bench", "--only", "cost", "--base", "random:sd15", "--json", tmp_path / "c.json")
    assert done.code == 0, done.err
    rows = {r["network"]: r for r in read(tmp_path / "c.json")["cost"]}
    assert rows["teacher"]["parameters"] == pytest.approx(859.52e6, rel=1e-4)
    assert rows["teacher"]["macs_without_attention"] == pytest.approx(338.61e9, rel=2e-3)
    assert rows["teacher"]["macs"] == pytest.approx(401.64e9, rel=2e-3)
    # the published budget of the tiny guide
    assert rows["guide-tiny"]["parameters"] <= 8.27e6
    assert rows["guide-tiny"]["macs_without_attention"] <= 7.79e9
    assert read(tmp_path / "c.json")["task_quality_reason"] == "the fidelity part was not run (--only cost)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "beauty"], "--only is 'beauty'; known: cost, latency, fidelity, serving"),
        (["--base", "random:sd15"], "add --only cost"),
        (["--base", "random:sd9", "--only", "cost"], "known: emoji"),
        (["--batch", "0"], "each must be between 1 and 32"),
        (["--guidance", "11"], "guidance is 11; it must be between 1 and 9"),
        (["--engine", "nobody"], "no engine named 'nobody'"),
        (["--real", ".", "--prompts", "none.txt"], "--prompts none.txt is not a file"),
        (["--resume"], "--resume needs to know where the run is stored"),
        (["--engine", "plain", "--engine", "plain"], "engines names plain twice"),
        (["--engine", "guided", "--only", "fidelity", "--images", "2", "--steps", "1", "--guidance", "2", "--grid",
          "g.png"], "--grid needs the fidelity part and both a teacher's and a guided engine"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(
    cli: Cli, engines: Path, arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = [] if "--engine" in arguments or "--base" in arguments else ["--engine", "plain"]
    done = cli("bench", *base, *arguments)
    assert done.code == 2 and message in done.err and "Traceback" not in done.err
    assert not list(tmp_path.iterdir())


def test_an_empty_folder_of_real_images_is_refused(cli: Cli, engines: Path, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("a cat\n")
    (tmp_path / "real").mkdir()
    done = cli(*BOTH, "--prompts", tmp_path / "words.txt", "--real", tmp_path / "real", "--json", tmp_path / "b.json")
    assert done.code == 2 and "holds 0 images" in done.err and not (tmp_path / "b.json.partial").exists()


def test_engines_of_different_bases_are_not_compared(
    cli: Cli, engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Path(shutil.copytree(engines, tmp_path / "engines"))
    reseal(home / "guided", lambda m: m["base"]["sha256"].update(all="0" * 64))
    monkeypatch.setenv("PNP_TRT_ENGINES", str(home))
    done = cli(*BOTH, "--only", "latency", "--json", tmp_path / "b.json")
    assert done.code == 2 and "different base models" in done.err
    assert not (tmp_path / "b.json.partial").exists()  # the run did not begin
