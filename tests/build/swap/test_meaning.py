"""What a fine-tune's weights mean: its noise schedule, its parts, and what an engine cannot do with them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pnp_trt.build.builder import build
from pnp_trt.build.spec import BuildSpec, build_scheduler
from pnp_trt.build.swap.checkpoint import find
from pnp_trt.build.swap.run import PlugSpec, plug
from pnp_trt.errors import InputError
from pnp_trt.models.bases import resolve
from pnp_trt.models.noise import Noise
from pnp_trt.models.single_base import SingleFileBase

from ...conftest import Result
from ...models.original import original_key

Edit = Callable[..., Path]


@pytest.fixture
def edited(tuned: Path, tmp_path: Path) -> Edit:
    """Copies of the fine-tune's folder with entries of one config changed."""

    def edit(config: str, **changes: Any) -> Path:
        folder = Path(shutil.copytree(tuned, tmp_path / "edited", dirs_exist_ok=True))
        path = folder / config
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return folder

    return edit


def stored(folder: Path) -> dict[str, Any]:
    """The scheduler in a bundle's manifest, as it is on disk."""
    scheduler: dict[str, Any] = json.loads((folder / "manifest.json").read_text())["scheduler"]
    return scheduler


def refused(out: Path, engine: Path, base: Path, message: str, **options: Any) -> None:
    with pytest.raises(InputError, match=message):
        plug(PlugSpec(str(engine), str(base), out=out / "x", **options))
    assert not (out / "x").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prediction_type": "v_prediction"},
         "distilled under prediction_type epsilon, but .*edited has prediction_type v_prediction"),
        ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
         "rescale_betas_zero_snr False, but .*edited has .*rescale_betas_zero_snr True"),
        ({"beta_schedule": "linear", "beta_end": 0.02}, "beta_end 0.025, but .*edited has .*beta_end 0.02"),
        ({"prediction_type": "sample"}, "cannot be sampled from: .*prediction_type is 'sample'"),
    ],
)  # fmt: skip
def test_a_guide_and_a_fine_tune_of_other_noise(
    micro_bundles: Path, edited: Edit, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = edited("scheduler/scheduler_config.json", **changes)
    refused(tmp_path, micro_bundles / "guided", folder, message)
    refused(tmp_path, micro_bundles / "guided", folder / "unet", message.replace("edited", "unet"))


def test_an_engine_without_a_guide_takes_the_folders_scheduler(
    micro_bundles: Path, edited: Edit, tmp_path: Path
) -> None:
    """As `build` records it, the class included."""
    changes = {
        "_class_name": "EulerDiscreteScheduler",
        "prediction_type": "v_prediction",
        "timestep_spacing": "leading",
    }
    folder = edited("scheduler/scheduler_config.json", **changes)
    made = plug(PlugSpec(str(micro_bundles / "plain"), str(folder), out=tmp_path / "x"))
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    known = {k: v for k, v in config.items() if k != "_diffusers_version" and v is not None}  # null is the default
    assert stored(made.folder) == known
    spec = BuildSpec(str(folder), "none")
    assert build_scheduler(spec, spec.base_model()) == stored(made.folder)


def test_a_build_refuses_what_cannot_sample_before_it_exports(edited: Edit, tmp_path: Path) -> None:
    folder = edited("scheduler/scheduler_config.json", prediction_type="sample")
    for guide in ("none", "emoji-tiny"):
        with pytest.raises(InputError, match="cannot be sampled from: .*prediction_type is 'sample'"):
            build(BuildSpec(str(folder), guide, out=tmp_path / "x"))
    folder = edited("scheduler/scheduler_config.json", prediction_type="v_prediction")
    with pytest.raises(InputError, match="guide 'emoji-tiny' was distilled under prediction_type epsilon, but"):
        build(BuildSpec(str(folder), "emoji-tiny", out=tmp_path / "x"))


def test_a_single_files_own_words(micro_bundles: Path, tuned_unet: Path, tmp_path: Path) -> None:
    weights = load_file(tuned_unet)
    keys, metadata = tmp_path / "keys.safetensors", tmp_path / "metadata.safetensors"
    save_file(weights | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, keys)
    save_file(weights, metadata, {"modelspec.prediction_type": "v"})
    for path in (keys, metadata):
        refused(tmp_path, micro_bundles / "guided", path, "prediction_type epsilon.* has prediction_type v_prediction")
    made = plug(PlugSpec(str(micro_bundles / "plain"), str(keys), out=tmp_path / "v"))
    own = stored(micro_bundles / "plain")
    assert stored(made.folder) == own | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    # what the user states wins, and the command that the manifest keeps states it again
    epsilon = Noise("epsilon", False)
    made = plug(PlugSpec(str(micro_bundles / "guided"), str(keys), out=tmp_path / "e", noise=epsilon))
    assert stored(made.folder) == stored(micro_bundles / "guided")
    rebuild = json.loads((made.folder / "manifest.json").read_text())["rebuild"]
    assert "--prediction-type epsilon --no-zero-terminal-snr" in rebuild


def test_options_of_the_command(cli: Callable[..., Result], engines: Path, tuned_unet: Path, tmp_path: Path) -> None:
    for arguments, message in (
        (["--prediction-type", "v_prediction"], "prediction_type epsilon, but"),
        (["--zero-terminal-snr"], "cannot be sampled from: rescale_betas_zero_snr leaves no signal"),
        (["--prediction-type", "sample"], "--prediction-type is 'sample'; known: epsilon, v_prediction"),
    ):
        done = cli("plug", "guided", "--base", tuned_unet, "--out", tmp_path / "x", *arguments)
        assert done.code == 2 and message in " ".join(done.err.split()), done.err
    done = cli("build", "--base", "emoji", "--prediction-type", "v_prediction", "--out", tmp_path / "x")
    assert done.code == 2 and "prediction_type epsilon, but emoji has" in " ".join(done.err.split()), done.err
    done = cli("build", "--base", "emoji", "--unet-only", "--out", tmp_path / "x")
    assert done.code == 2 and "--unet-only is for a base that is a single .safetensors file" in done.err


def test_unet_only_leaves_the_rest(micro_bundles: Path, tuned: Path, tuned_unet: Path, tmp_path: Path) -> None:
    path = tmp_path / "sdxl.safetensors"
    save_file(load_file(tuned_unet) | {"conditioner.embedders.1.model.ln_final.weight": torch.ones(2)}, path)
    refused(
        tmp_path,
        micro_bundles / "guided",
        path,
        "a second text encoder that .* cannot take .it has no such network.*--unet-only",
    )
    for base in (path, tuned):
        made = plug(PlugSpec(str(micro_bundles / "guided"), str(base), out=tmp_path / base.stem, unet_only=True))
        networks = made.folder / "manifest.json"
        swapped = json.loads(networks.read_text())["plugged"]["networks"]
        assert {n for n, how in swapped.items() if how != "kept"} == {"unet"}
    data = [(tmp_path / stem / "unet.onnx.data").read_bytes() for stem in ("sdxl", "tuned")]
    assert data[0] == data[1]


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        ("vae/config.json", {"scaling_factor": 0.13025}, "scaling_factor is 0.13025, not 1.0"),
        ("vae/config.json", {"shift_factor": 0.5}, "shift_factor is 0.5, not 0.0"),
        ("text_encoder/config.json", {"hidden_act": "gelu"}, "hidden_act is 'gelu', not 'quick_gelu'"),
    ],
)
def test_a_config_that_means_something_else_with_the_same_weights(
    micro_base: Path, micro_bundles: Path, tmp_path: Path, config: str, changes: dict[str, Any], message: str
) -> None:
    folder = Path(shutil.copytree(micro_base, tmp_path / "same"))
    path = folder / config
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    refused(tmp_path, micro_bundles / "guided", folder, message)


def test_a_single_file_as_a_base(tmp_path: Path) -> None:
    """Under original names, U-Net and text encoder in it are used; the rest is the bundled model's."""
    emoji = resolve("emoji")
    unet = {k: v + 0.5 for k, v in emoji.unet().state_dict().items()}
    text = {k.removeprefix("text_model."): v * 2 for k, v in emoji.text_encoder().state_dict().items()}
    path = tmp_path / "whole.safetensors"
    weights = {f"model.diffusion_model.{original_key(k, 2)}": v for k, v in unet.items()}
    weights |= {f"cond_stage_model.transformer.text_model.{k}": v for k, v in text.items()}
    save_file({k: v.clone().contiguous() for k, v in weights.items()} | {"v_pred": torch.zeros(0)}, path)
    base = resolve(str(path))
    assert isinstance(base, SingleFileBase)
    assert all(torch.equal(v, unet[k]) for k, v in base.unet().state_dict().items())
    assert all(torch.equal(v, text[k.removeprefix("text_model.")]) for k, v in base.text_encoder().state_dict().items())
    assert base.scheduler_config()["prediction_type"] == "v_prediction"
    own, emojis = base.fingerprint(), emoji.fingerprint()
    assert {k for k in own if own[k] != emojis[k]} == {"unet", "text_encoder", "all"}
    alone = resolve(str(path))
    assert isinstance(alone, SingleFileBase)
    alone.unet_only = True
    assert alone.fingerprint()["text_encoder"] == emojis["text_encoder"]
    assert find(str(path)).fingerprint() == {k: own[k] for k in ("unet", "text_encoder")}


def test_a_base_with_parts_that_are_not_used(tmp_path: Path, tuned_unet: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(load_file(tuned_unet) | {"cond_stage_model.model.ln_final.weight": torch.ones(2)}, path)
    base = resolve(str(path))
    for load in (base.unet, base.text_encoder, base.vae):  # whichever command loads it
        with pytest.raises(InputError, match="a text encoder that the bundled model cannot take .*--unet-only"):
            load()
    with pytest.raises(InputError, match="is not a fine-tune of the bundled model's: .* has shape"):
        BuildSpec(str(path), unet_only=True).base_model().unet()
