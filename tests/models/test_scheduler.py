"""Noise schedules: reading them from files and configs, recording them, and refusing unsupported ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pnp_trt.assets import ROOT
from pnp_trt.build.spec import distilled_under
from pnp_trt.errors import InputError
from pnp_trt.models.noise import Noise
from pnp_trt.models.scheduler import check_distilled, check_samples, scheduler_record

EMOJI: dict[str, Any] = json.loads((ROOT / "emoji" / "scheduler" / "scheduler_config.json").read_text())


@pytest.mark.parametrize(
    ("markers", "metadata", "stated"),
    [
        ((), {}, Noise()),
        (("v_pred",), {}, Noise("v_prediction")),
        (("v_pred", "ztsnr"), {}, Noise("v_prediction", True)),
        (("ztsnr",), {}, Noise(None, True)),
        ((), {"modelspec.prediction_type": "v"}, Noise("v_prediction")),
        ((), {"modelspec.prediction_type": "epsilon"}, Noise("epsilon")),
        ((), {"modelspec.predict_key": "v", "modelspec.prediction_type": "v"}, Noise("v_prediction")),
        ((), {"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"}, Noise("v_prediction", True)),
        ((), {"ss_v_parameterization": "False", "ss_zero_terminal_snr": "False"}, Noise("epsilon", False)),
        ((), {"ss_v_parameterization": "None", "modelspec.prediction_type": ""}, Noise()),
        (("v_pred",), {"ss_v_parameterization": "True"}, Noise("v_prediction")),
        ((), {"modelspec.prediction_type": "x0"}, Noise("sample")),
        ((), {"modelspec.prediction_type": "flow"}, Noise("flow")),
    ],
)
def test_noise_settings_are_read_from_keys_and_metadata(
    markers: tuple[str, ...], metadata: dict[str, str], stated: Noise
) -> None:
    assert Noise.stated(markers, metadata, "x") == stated


def test_a_file_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(InputError, match="v_prediction by its key v_pred and epsilon by modelspec.prediction_type"):
        Noise.stated(("v_pred",), {"modelspec.prediction_type": "epsilon"}, "x")
    with pytest.raises(InputError, match="metadata ss_v_parameterization is 'maybe'"):
        Noise.stated((), {"ss_v_parameterization": "maybe"}, "x")


def test_options_override_the_file_and_the_file_overrides_the_config() -> None:
    record = scheduler_record(EMOJI, Noise("v_prediction", True), Noise("epsilon"))
    assert (record["prediction_type"], record["rescale_betas_zero_snr"]) == ("epsilon", True)
    assert record["_class_name"] == "DDIMScheduler" and "_diffusers_version" not in record
    assert {k: v for k, v in EMOJI.items() if k not in ("_diffusers_version", "rescale_betas_zero_snr")} == {
        k: v for k, v in record.items() if k != "rescale_betas_zero_snr"
    }
    assert scheduler_record(EMOJI | {"prediction_type": None}, Noise(), Noise())["prediction_type"] == "epsilon"


def test_noise_settings_are_written_as_options() -> None:
    assert Noise().arguments() == []
    assert Noise("v_prediction", False).arguments() == [
        "--prediction-type", "v_prediction", "--no-zero-terminal-snr",
    ]  # fmt: skip
    with pytest.raises(InputError, match="--prediction-type is 'sample'; known: epsilon, v_prediction"):
        Noise("sample").check()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prediction_type": "sample"}, "prediction_type is 'sample'; known: epsilon, v_prediction"),
        ({"prediction_type": "flow"}, "prediction_type is 'flow'"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule is 'sigmoid'"),
        ({"timestep_spacing": "random"}, "timestep_spacing is 'random'"),
        ({"trained_betas": [0.1, 0.2]}, "has 2 trained_betas and 1000 training timesteps"),
        ({"thresholding": True}, "thresholding is True, which is not linear"),
        ({"rescale_betas_zero_snr": True}, "leaves no signal .* --schedule euler or dpm|--schedule .*euler"),
        ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"},
         "adds noise at every step.*--schedule ddim or euler or heun or unipc would work"),
    ],
)  # fmt: skip
def test_a_schedule_that_cannot_sample_is_refused(changes: dict[str, Any], message: str) -> None:
    check_samples(EMOJI, "x")
    with pytest.raises(InputError, match=f"x has a noise schedule that cannot be sampled from: .*({message})"):
        check_samples(EMOJI | changes, "x")


@pytest.mark.parametrize(
    ("changes", "theirs", "ours"),
    [
        ({"prediction_type": "v_prediction"}, "prediction_type epsilon", "prediction_type v_prediction"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr False", "rescale_betas_zero_snr True"),
        ({"beta_end": 0.012}, "beta_end 0.025", "beta_end 0.012"),
        ({"beta_schedule": "linear"}, "beta_schedule scaled_linear", "beta_schedule linear"),
        ({"num_train_timesteps": 500}, "num_train_timesteps 1000", "num_train_timesteps 500"),
        ({"trained_betas": [0.01] * 1000}, "trained_betas None", "trained_betas of 1000 values"),
        ({"prediction_type": "v_prediction", "beta_start": 0.001}, "prediction_type epsilon, beta_start 0.00085",
         "prediction_type v_prediction, beta_start 0.001"),
    ],
)  # fmt: skip
def test_a_guide_distilled_under_another_noise_schedule_is_refused(
    changes: dict[str, Any], theirs: str, ours: str
) -> None:
    with pytest.raises(InputError, match=f"guide 'g' was distilled under {theirs}, but x has {ours}; "):
        check_distilled(EMOJI, EMOJI | changes, "guide 'g'", "x")


def test_equivalent_noise_schedules_match() -> None:
    betas = [(0.00085**0.5 + (0.025**0.5 - 0.00085**0.5) * i / 999) ** 2 for i in range(1000)]
    written_out = EMOJI | {"trained_betas": betas, "beta_schedule": "linear"}
    for record in (written_out, EMOJI | {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}):
        check_distilled(EMOJI, record, "guide", "x")


def test_a_guide_for_a_fixed_number_of_steps_requires_its_timesteps() -> None:
    check_distilled(EMOJI, EMOJI | {"_class_name": "EulerDiscreteScheduler"}, "guide", "x", 8)
    with pytest.raises(InputError, match="under timestep_spacing trailing, but x has timestep_spacing leading"):
        check_distilled(EMOJI, EMOJI | {"timestep_spacing": "leading"}, "guide", "x", 8)


def test_a_guides_noise_schedule_is_read_from_its_report(tmp_path: Path) -> None:
    known = distilled_under(ROOT / "guides" / "emoji-tiny")  # its report records it, or names the bundled model
    recorded = {k: v for k, v in known.items() if v is not None}
    assert recorded == {k: v for k, v in EMOJI.items() if k != "_diffusers_version" and v is not None}
    (tmp_path / "distill.json").write_text(json.dumps({"scheduler": {"prediction_type": "v_prediction"}}))
    assert distilled_under(tmp_path) == {"prediction_type": "v_prediction"}
    for text in ('{"settings": {"base": "someone/some-model"}}', "[]", "{", '{"settings": 3}'):
        (tmp_path / "distill.json").write_text(text)
        assert distilled_under(tmp_path) is None
