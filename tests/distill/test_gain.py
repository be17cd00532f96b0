"""A guide's gain is fitted to the length of the teacher's guidance, and stage 2 and engines keep it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from pnp_trt import backends
from pnp_trt.backends.base import LoadOptions
from pnp_trt.build.builder import build
from pnp_trt.build.spec import BuildSpec
from pnp_trt.build.swap.run import PlugSpec, plug
from pnp_trt.bundle.golden_file import difference
from pnp_trt.bundle.store import open_bundle, sha256
from pnp_trt.distill.gain import GainConfig, fit
from pnp_trt.distill.steps import StepsConfig, distill
from pnp_trt.distill.train import TrainConfig
from pnp_trt.errors import InputError
from pnp_trt.models.bases import resolve
from pnp_trt.models.conditioning import encode_prompts
from pnp_trt.models.guides.load import load_guide
from pnp_trt.models.student import Student, cfg
from pnp_trt.runtime.verify import load_golden

from ..bundles import reseal
from ..conftest import Result

PROMPTS = ["a red apple", "a blue car", "the yellow house on a hill"]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


def config(base: Path, guide: Path, prompts: Path, out: Path, **changes: Any) -> GainConfig:
    return GainConfig(str(guide), out, base=str(base), prompts=prompts, **({"values": 3, "states": 320} | changes))


@pytest.fixture(scope="module")
def gained(micro_guide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The micro guide with a gain far from one."""
    folder = tmp_path_factory.mktemp("gained") / "guide"
    guide = load_guide(str(micro_guide))
    guide.use_gain([3.0, 0.5, 2.0])
    guide.save_pretrained(folder)
    return folder


@torch.no_grad()
def ratio(base: Path, guide: Path, t: int) -> float:
    """Return the length of a guide's change relative to that of CFG's, on noise at one timestep, computed directly."""
    teacher = resolve(str(base))
    unet = teacher.unet()
    states = encode_prompts(teacher, PROMPTS, torch.device("cpu")).states
    n, generator = 96, torch.Generator().manual_seed(11)
    size = unet.config.sample_size
    x = torch.randn(n, unet.config.in_channels, size, size, generator=generator)
    text, timesteps, w = states[torch.arange(n) % 3], torch.full((n,), t), torch.full((n,), 3.0)
    plain = unet(x, timesteps, text).sample
    change = Student(unet, load_guide(str(guide)))(x, timesteps, text, w) - plain
    guidance = cfg(unet, x, timesteps, text, states[-1:].expand(n, -1, -1), w) - plain
    return float(change.norm() / guidance.norm())


def test_the_fitted_change_is_as_long_as_the_teachers(
    micro_base: Path, micro_guide: Path, prompts: Path, tmp_path: Path
) -> None:
    before = {p.name: sha256(p) for p in micro_guide.iterdir()}
    report = fit(config(micro_base, micro_guide, prompts, tmp_path / "out"))
    assert {p.name: sha256(p) for p in micro_guide.iterdir()} == before  # the source guide is unchanged
    assert report["length"]["timestep"] == [0.0, 499.5, 999.0]
    # an untrained guide's lengths differ so much over t that three values cannot fit the timesteps between them
    initial, final = (np.abs(np.log(report["length"][k])) for k in ("before", "after"))
    assert (final < initial).all() and final.sum() < 0.25 * initial.sum() and final[2] < 0.03
    assert report == json.loads((tmp_path / "out" / "distill.json").read_text()) and report["stage"] == "gain"
    assert list(load_guide(str(tmp_path / "out")).config.gain) == report["gain"]
    weights = "diffusion_pytorch_model.safetensors"
    assert sha256(tmp_path / "out" / weights) == before[weights] == report["of"]["weights"]
    # on other states, computed independently of the fit, the ratio also moves from far off to near one
    short, long = (ratio(micro_base, g, 999) for g in (micro_guide, tmp_path / "out"))
    assert abs(np.log(long)) < 0.2 < abs(np.log(short))


def test_a_single_factor_is_fitted_or_set(micro_base: Path, micro_guide: Path, prompts: Path, tmp_path: Path) -> None:
    fitted = fit(config(micro_base, micro_guide, prompts, tmp_path / "a", values=1))
    assert len(fitted["gain"]) == 1 and fitted["length"]["after"] == pytest.approx([1.0], abs=0.03)
    fixed = fit(config(micro_base, micro_guide, prompts, tmp_path / "b", factor=1.5))
    assert fixed["gain"] == [1.5] and list(load_guide(str(tmp_path / "b")).config.gain) == [1.5]


def test_a_gain_is_replaced_and_not_multiplied(
    micro_base: Path, micro_guide: Path, gained: Path, prompts: Path, tmp_path: Path
) -> None:
    one = fit(config(micro_base, micro_guide, prompts, tmp_path / "a", states=20))
    other = fit(config(micro_base, gained, prompts, tmp_path / "b", states=20))
    assert one["gain"] == other["gain"] and one["length"] == other["length"]


def test_stage_two_inherits_the_gain(micro_base: Path, gained: Path, prompts: Path, tmp_path: Path) -> None:
    train = TrainConfig(steps=2, batch=4, warmup=1, checkpoint_every=2)
    halved = StepsConfig(
        str(gained), tmp_path / "o", 2, 4, str(micro_base), prompts, trajectories=4, grid=False, train=train
    )  # fmt: skip
    distill(halved)
    guide = load_guide(str(tmp_path / "o" / "steps-2"))
    assert list(guide.config.gain) == [3.0, 0.5, 2.0] and guide.sampling_steps == 2
    with pytest.raises(InputError, match="was distilled for 2 steps, whose targets are not the teacher's"):
        fit(config(micro_base, tmp_path / "o" / "steps-2", prompts, tmp_path / "x"))
    # the same weights with another gain count as another run
    other = load_guide(str(gained))
    other.use_gain([1.0])
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="other settings"):
        distill(StepsConfig(
            str(tmp_path / "other"), tmp_path / "o", 2, 4, str(micro_base), prompts, trajectories=4, grid=False,
            train=train,
        ), resume=True)  # fmt: skip


@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_engines_apply_the_gain(
    backend: str, cli: Callable[..., Result], micro_base: Path, gained: Path, tmp_path: Path
) -> None:
    built = build(BuildSpec(str(micro_base), str(gained), backend=backend, out=tmp_path / "engine"))
    network = backends.get(backend).load(
        open_bundle(built.folder).file("unet"), built.manifest.networks["unet"], LoadOptions(provider="cpu")
    )  # fmt: skip
    inputs = dict(load_golden(built.folder / "golden.npz")["unet"][0])
    student = Student(resolve(str(micro_base)).unet(), load_guide(str(gained)))
    for t in (0, 250, 999):
        inputs["timestep"] = np.full_like(inputs["timestep"], t)
        with torch.no_grad():
            expected = student(**{k: torch.from_numpy(v) for k, v in inputs.items()}).numpy()
        assert difference(network(**inputs), expected) < 1e-5
    assert "gain from t = 0 to 999: 3, 0.5, 2" in " ".join(cli("inspect", tmp_path / "engine").out.split())


def test_a_plugged_engine_keeps_the_gain(micro_base: Path, gained: Path, tmp_path: Path) -> None:
    """Even if the guide is gone: its gain is in the engine's config, not among its weights."""
    engine = tmp_path / "engine"
    build(BuildSpec(str(micro_base), str(gained), out=engine))
    tuned = resolve(str(micro_base)).unet()
    with torch.no_grad():
        for p in tuned.parameters():
            p.mul_(1.01)
    tuned.save_pretrained(tmp_path / "tuned")
    reseal(engine, lambda m: m["given"].update(guide=str(tmp_path / "gone")))
    weights = tmp_path / "tuned" / "diffusion_pytorch_model.safetensors"
    plugged = plug(PlugSpec(str(engine), str(weights), out=tmp_path / "plugged"))
    assert plugged.manifest.plugged.guide_read_from == "the graph itself"
    inputs, _ = load_golden(plugged.folder / "golden.npz")["unet"]
    session = onnxruntime.InferenceSession(plugged.folder / "unet.onnx", providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = Student(tuned.eval(), load_guide(str(gained)))(**{k: torch.from_numpy(v) for k, v in inputs.items()})
    assert difference(session.run(None, dict(inputs))[0], expected.numpy()) < 1e-5


def test_the_gain_command(
    cli: Callable[..., Result], micro_base: Path, micro_guide: Path, prompts: Path, tmp_path: Path
) -> None:
    arguments = ["distill", "gain", "--guide", micro_guide, "--out", tmp_path / "o", "--values", 2, "--num-states", 20]
    refused = cli(*arguments)
    assert refused.code == 2 and "does not state which base it was distilled for; pass --base" in refused.err
    arguments += ["--base", micro_base, "--prompts", prompts]
    done = cli(*arguments)
    assert done.code == 0, done.err
    assert "gain: " in done.out and f"--guide {tmp_path / 'o'}" in done.out
    again = cli(*arguments)
    assert again.code == 2 and "--resume" in again.err
    assert cli(*arguments, "--resume").code == 0
    for wrong, message in (
        (("--factor", "-1"), "factor is -1; it must be above 0"),
        (("--values", 101), "values is 101"),
    ):
        failed = cli(*arguments[:4], "--out", tmp_path / "other", *wrong)
        assert failed.code == 2 and message in failed.err and not (tmp_path / "other").exists()
    few = cli(*arguments[:4], "--out", tmp_path / "few", "--values", 100, *arguments[-6:])
    assert few.code == 1 and "there is no state, or the guide adds nothing" in few.err
    same = cli("distill", "gain", "--guide", micro_guide, "--out", micro_guide, *arguments[-4:])
    assert same.code == 2 and "is not empty" in same.err
