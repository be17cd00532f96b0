"""Calibration: observed ranges, the sweep's decision, resuming a stopped run, and engines from a record."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from pnp_trt.models.bases import resolve
from pnp_trt.models.guides import FullGuide
from pnp_trt.models.guides.load import load_guide
from pnp_trt.models.student import Student
from pnp_trt.precision.int8.calibrate import UNEVEN, CalibrationConfig, calibrate
from pnp_trt.precision.int8.observe import candidates
from pnp_trt.precision.int8.record import Record
from pnp_trt.precision.int8.simulate import quantised
from pnp_trt.precision.int8.sweep import Probes

from ...conftest import Result

Cli = Callable[..., Result]


def test_every_candidate_is_observed_at_all_timesteps(micro_record: Path) -> None:
    record = Record.read(micro_record)
    assert not any("conv_in" in n or "time_emb" in n or n.startswith("guide.") for n in record.layers)
    for name, layer in record.layers.items():
        assert layer.amax["percentile-99.9"] <= layer.amax["percentile-99.99"] <= layer.amax["max"], name
        assert max(layer.by_timestep) == layer.amax["max"] > 0
        assert sum(v > 0 for v in layer.by_timestep) >= 4  # four steps, each run shifted by a random part of a step
        assert (layer.kind == "linear") == bool(layer.channels)
        if layer.channels:
            assert max(layer.channels) == layer.amax["max"]


@pytest.mark.parametrize(
    ("steps", "most", "chosen"),
    [(20, 10, [1, 3, 5, 7, 9, 11, 13, 15, 17, 19]), (19, 10, [0, 2, 4, 6, 8, 10, 12, 14, 16, 18]), (3, 10, [0, 1, 2]),
     (5, 1, [2])],
)  # fmt: skip
def test_probes_are_evenly_spaced_and_at_most_as_many_as_requested(steps: int, most: int, chosen: list[int]) -> None:
    class Steps:
        """A loop whose states are the numbers of its steps."""

        def run(self, seed: int, images: int, collect: Callable[..., None]) -> None:
            for i in range(steps):
                collect(i)

        def predict(self, i: int) -> int:
            return 100 + i

    probes: Any = Probes.collect(Steps(), 0, 4, most)  # type: ignore[arg-type]
    assert [i for (i,) in probes.states] == chosen and probes.predictions == [100 + i for i in chosen]


def test_the_decision_follows_from_the_sweep(micro_record: Path) -> None:
    record = Record.read(micro_record)
    sweep, decision = record.sweep, record.decision
    for kind, table in sweep["methods"].items():
        assert table[decision[kind]] == min(table.values())
    assert set(sweep["layers"]) == set(record.layers)
    errors = {row["kept"]: row["error"] for row in sweep["kept"]}
    enough = [k for k, e in errors.items() if e <= sweep["limit"]]
    assert len(decision["float"]) == (min(enough) if enough else min(errors, key=lambda k: errors[k]))
    assert len(record.choices()) == len(record.layers) - len(decision["float"])
    assert 0 < sweep["latent_error"] < 1


def test_simulation_quantises_and_restores(micro_base: Path, micro_guide: Path, micro_record: Path) -> None:
    student = Student(resolve(str(micro_base)).unet(), load_guide(str(micro_guide)))
    layers, choices = candidates(student, ["unet.*"]), Record.read(micro_record).choices()
    before = {n: layer.weight.clone() for n, layer in layers.items()}
    name = next(n for n, c in choices.items() if c.exponents is None)
    with quantised(layers, choices):
        weight = layers[name].weight
        assert len(weight[0].unique()) <= 255 and not torch.equal(weight, before[name])
    assert all(torch.equal(layers[n].weight, before[n]) for n in layers)
    assert not any(layer._forward_pre_hooks for layer in layers.values())


def test_a_stopped_run_is_resumed(micro_base: Path, micro_guide: Path, prompts: Path, micro_record: Path,
                                          tmp_path: Path) -> None:  # fmt: skip
    config = CalibrationConfig(
        str(micro_base),
        str(micro_guide),
        prompts,
        tmp_path / "r.json",
        images=3,
        batch=2,
        steps=4,
        probes=2,
        limit=0.01,
    )
    stages: list[str] = []

    def stop_in_the_sweep(stage: str, done: int, *_: Any) -> None:
        stages.append(stage)
        if stage == "layers" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(config, progress=stop_in_the_sweep)
    assert not config.out.exists() and "observe" in stages  # type: ignore[union-attr]
    partial = json.loads((tmp_path / ".r.json.partial").read_text())["found"]
    assert len(partial["sweep"]["layers"]) == 3
    stages.clear()
    _, record = calibrate(config, progress=lambda stage, *_: stages.append(stage))
    assert "observe" not in stages and not (tmp_path / ".r.json.partial").exists()
    assert record == Record.read(micro_record)


def test_another_limit_changes_the_decision_without_observing_again(
    micro_base: Path, micro_guide: Path, prompts: Path, micro_record: Path, tmp_path: Path
) -> None:
    out = tmp_path / "r.json"
    out.write_bytes(micro_record.read_bytes())
    stages: list[str] = []
    config = CalibrationConfig(
        str(micro_base), str(micro_guide), prompts, out, images=3, batch=2, steps=4, probes=2, limit=0.5
    )
    _, record = calibrate(config, force=True, progress=lambda stage, *_: stages.append(stage))
    assert "observe" not in stages and record.decision["float"] == [] and record.sweep["limit"] == 0.5
    assert record.layers == Record.read(micro_record).layers


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts", "none.txt"], "the prompts file none.txt does not exist"),
        (["--images", "0"], "images is 0; it must be at least 1"),
        (["--w-min", "5", "--w-max", "2"], "the guidance scales are 5 to 2"),
        (["--limit", "0"], "the limit is 0; it must be above 0"),
        (["--layer", "unet.nothing.*"], "no convolution or linear layer is named unet.nothing.*"),
        (["--steps", "2000"], "steps is 2000; it must be between 1 and 1000"),
        (["--base", "nowhere"], "nowhere"),
    ],
)
def test_invalid_options_are_refused(cli: Cli, micro_base: Path, micro_guide: Path, prompts: Path, tmp_path: Path,
                                arguments: list[str], message: str) -> None:  # fmt: skip
    options = {"--base": micro_base, "--guide": micro_guide, "--prompts": prompts, "--out": tmp_path / "r.json"}
    words = [str(w) for k, v in options.items() if k not in arguments for w in (k, v)]
    done = cli("calibrate", *words, *arguments)
    assert done.code == 2 and message in done.err, done.err
    assert not (tmp_path / "r.json").exists()


def test_int8_from_calibration_to_image(cli: Cli, micro_base: Path, micro_guide: Path, prompts: Path,
                                          tmp_path: Path) -> None:  # fmt: skip
    record, engine = tmp_path / "r.json", tmp_path / "engine"
    source = ["--base", str(micro_base), "--guide", str(micro_guide)]
    # one step, because an untrained network's latents grow with every step, while golden inputs are as large as noise
    command = ["calibrate", *source, "--prompts", prompts, "--images", "8", "--steps", "1", "--out", record]
    done = cli(*command, "--probes", "0")
    assert done.code == 0, done.err
    assert "--precision int8" in done.out and f"--calibration {record}" in done.out
    # sensitivity was not measured, so layers with uneven inputs stay in float
    loaded = Record.read(record)
    left = [name for name in loaded.layers if name not in loaded.choices()]
    assert left == loaded.decision["float"] and all(any(part in name for part in UNEVEN) for name in left)
    assert all(any(part in name for name in left) for part in UNEVEN)
    done = cli(*command)
    assert done.code == 2 and "exists already; pass --force" in done.err
    done = cli("build", *source, "--precision", "int8", "--calibration", record, "--out", engine,
               "--profile", "b1-4", "--profile", "b1@32-64")  # fmt: skip
    assert done.code == 0, done.err
    assert "slower with INT8" in done.out
    text = cli("inspect", engine).out
    assert 0.3 < loaded.share() < 1
    assert f"layers with {loaded.share():.1%} of the arithmetic" in " ".join(text.split())
    assert cli("verify", engine).code == 0
    for size in ("32", "40x48"):  # ranges recorded at one size apply to all sizes
        out = tmp_path / f"out-{size}"
        done = cli("sample", "a cat", "--engine", engine, "--steps", "2", "--size", size, "--out", out)
        assert done.code == 0, done.err
        assert list(out.glob("*.png"))
    # the same record serves FP8, which takes fewer layers
    eight = tmp_path / "fp8"
    done = cli("build", *source, "--precision", "fp8", "--calibration", record, "--out", eight)
    assert done.code == 0, done.err
    ends = ("proj_in", "proj_out", "to_out.0")
    chosen = [name for name in loaded.layers if name in loaded.choices() and not name.endswith(ends)]
    assert {loaded.layers[name].kind for name in chosen} == {"conv", "linear"}
    assert {name for name in loaded.choices() if name.endswith(ends)}
    manifest = json.loads((eight / "manifest.json").read_text())
    assert manifest["networks"]["unet"]["fp8"]["layers"] == len(chosen) > 5
    assert "int8" not in manifest["networks"]["unet"] and manifest["networks"]["unet"]["precision"] == "fp8"
    share = sum(loaded.layers[name].macs for name in chosen) / sum(layer.macs for layer in loaded.layers.values())
    assert f"layers with {share:.1%} of the arithmetic" in " ".join(cli("inspect", eight).out.split())
    assert cli("verify", eight).code == 0
    done = cli("sample", "a cat", "--engine", eight, "--steps", "2", "--out", tmp_path / "eight")
    assert done.code == 0 and list((tmp_path / "eight").glob("*.png")), done.err
    # another guide's record is refused, and a record without INT8 too
    done = cli("build", "--base", micro_base, "--guide", "none", "--precision", "int8", "--calibration", record,
               "--out", tmp_path / "other")  # fmt: skip
    assert done.code == 2 and "was recorded with another guide" in done.err
    done = cli("build", *source, "--calibration", record, "--out", tmp_path / "other")
    assert done.code == 2 and "--calibration is for --precision int8 or fp8, not fp32" in done.err


def test_int8_of_a_full_guide(cli: Cli, micro_base: Path, prompts: Path, tmp_path: Path) -> None:
    """The guide's hint runs once per image, in a separate network, and stays in floating point."""
    guide, record, engine = tmp_path / "mine", tmp_path / "r.json", tmp_path / "engine"
    unet = UNet2DConditionModel.from_pretrained(micro_base / "unet")
    FullGuide.from_unet(unet, negative_prompts=True).save_pretrained(guide)
    source = ["--base", micro_base, "--guide", guide]
    done = cli("calibrate", *source, "--prompts", prompts, "--images", "1", "--steps", "1", "--probes", "0",
               "--out", record)  # fmt: skip
    assert done.code == 0, done.err
    layers = list(Record.read(record).layers)
    assert any(n.startswith("guide.") for n in layers) and not any(
        n.startswith(("guide.hint", "guide.w_")) for n in layers
    )
    done = cli("build", *source, "--precision", "int8", "--calibration", record, "--out", engine)
    assert done.code == 0, done.err
    networks = json.loads((engine / "manifest.json").read_text())["networks"]
    assert networks["unet"]["int8"]["layers"] > 0 and "int8" not in networks["condition"]
