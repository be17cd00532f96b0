"""``pnp-trt visualize``: its files, and its numbers compared with a direct computation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pnp_trt.models.bases import resolve
from pnp_trt.models.conditioning import encode_prompts
from pnp_trt.models.families.sdxl.base import TEXT_ENCODERS
from pnp_trt.models.guides import FullGuide, GuideInput, TinyGuide
from pnp_trt.models.guides.load import load_guide
from pnp_trt.models.student import Student, encode
from pnp_trt.sampling.schedules import ddim
from pnp_trt.visualize.record import high_frequency_share, record, white_noise_share
from pnp_trt.visualize.run import VisualizeRequest, visualize
from pnp_trt.visualize.summary import describe, summarise

from ..conftest import Result

Cli = Callable[..., Result]
SCALES, STEPS = (1.0, 2.0, 5.0, 9.0), 4


@pytest.fixture(scope="module")
def drawn(micro_base: Path, micro_guide: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One run, shared by several tests."""
    out = tmp_path_factory.mktemp("visualize")
    return visualize(
        VisualizeRequest(str(micro_guide), ("a red apple",), SCALES, STEPS, str(micro_base), seed=3, out=out)
    )


def rows(document: dict[str, Any]) -> dict[tuple[float, str, int], dict[str, Any]]:
    return {(r["w"], r["layer"], r["step"]): r for r in document["strength"]}


def test_files_can_be_opened_and_contain_their_parameters(drawn: Any) -> None:
    assert [p.name for p in drawn.files] == ["feature-maps.png", "strength.png", "strength.json"]
    for path in drawn.files[:2]:
        with Image.open(path) as image:
            image.load()
            assert image.width > 600 and image.height > 400
            assert json.loads(image.text["pnp-trt"])["seed"] == 3  # type: ignore[attr-defined]
    document = json.loads(drawn.files[2].read_text())
    assert document["schema"] == "pnp-trt/visualize/1"
    assert document["parameters"]["prompts"] == ["a red apple"] and document["parameters"]["steps"] == STEPS
    assert document["parameters"]["shown_layers"] == ["skip-0", "skip-3", "mid"]
    assert document["provenance"]["packages"]["torch"]


def test_every_layer_step_and_scale_is_recorded(drawn: Any) -> None:
    names = [layer["name"] for layer in drawn.document["layers"]]
    assert names == ["skip-0", "skip-1", "skip-2", "skip-3", "mid"]
    expected = {(w, name, s) for w in SCALES for name in names for s in range(1, STEPS + 1)}
    assert rows(drawn.document).keys() == expected and len(drawn.document["strength"]) == len(expected)


def test_strength_is_zero_at_w_one_and_grows_with_w(drawn: Any) -> None:
    recorded = rows(drawn.document)
    for (w, name, step), row in recorded.items():
        if w == 1:
            assert row["relative"] == 0 and row["residual_rms"] == 0 and row["high_frequency"] is None
        else:
            assert row["relative"] > 0 and 0 <= row["high_frequency"] <= 1
        if w > 2 and step == 1:  # the same latent: only the injection differs
            assert row["relative"] > recorded[2.0, name, 1]["relative"]
    means = list(drawn.document["summary"]["mean_strength"].values())
    assert means == sorted(means) and drawn.document["summary"]["holds"]["grows_with_w"]


def test_numbers_equal_those_of_a_direct_computation(drawn: Any, micro_base: Path, micro_guide: Path) -> None:
    base = resolve(str(micro_base))
    unet, guide = base.unet(), load_guide(str(micro_guide))
    student, schedule = Student(unet, guide), ddim(base.scheduler_config(), STEPS)
    text = encode_prompts(base, ["a red apple"], torch.device("cpu")).states[:1]
    x = torch.from_numpy(np.random.Generator(np.random.Philox(3)).standard_normal((1, 4, 8, 8), np.float32))
    w, recorded = torch.tensor([5.0]), rows(drawn.document)
    with torch.no_grad():
        for step in range(STEPS):
            t = torch.tensor([int(schedule.timesteps[step])])
            _, features = encode(unet, x, t, text)
            added = guide(GuideInput(x, t, text, w, features))
            for name, r, f in [
                ("skip-2", added.down_block_res_samples[2], features.down_block_res_samples[2]),
                ("mid", added.mid_block_res_sample, features.mid_block_res_sample),
            ]:
                row = recorded[5.0, name, step + 1]
                assert row["timestep"] == int(t)
                assert row["relative"] == pytest.approx(float(r.norm() / f.norm()), rel=1e-5)
                energy = np.abs(np.fft.fft2(r[0].numpy())) ** 2
                fy, fx = np.meshgrid(*[np.fft.fftfreq(n) for n in r.shape[-2:]], indexing="ij")
                share = energy[:, np.hypot(fy, fx) > 0.25].sum() / energy.sum()
                assert row["high_frequency"] == pytest.approx(share, rel=1e-4)
            x = float(schedule.x_scale[step]) * x + float(schedule.output_scale[step]) * student(x, t, text, w)


@pytest.mark.slow  # it builds the bundles if no other test has
def test_images_equal_those_of_sample(micro_base: Path, micro_guide: Path, engines: Path) -> None:
    from pnp_trt.runtime.pipeline import Pipeline

    base = resolve(str(micro_base))
    student = Student(base.unet(), load_guide(str(micro_guide)))
    (mine,) = record(base, student, ["a red apple"], [3.0], 3, 5, [0]).images
    (image,) = Pipeline.load("guided", provider="cpu")("a red apple", steps=3, guidance=3.0, seed=5)
    assert np.abs(mine.astype(int) - image.pixels.astype(int)).max() <= 1  # rounding


def test_high_frequency_share_of_known_maps() -> None:
    flat = torch.ones(1, 1, 8, 8)
    checks = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(4, 4)[None, None]
    assert high_frequency_share(flat) == 0 and high_frequency_share(checks) == pytest.approx(1)
    assert high_frequency_share(flat + checks) == pytest.approx(0.5)
    assert np.isnan(high_frequency_share(0 * flat))
    noise = torch.randn(2000, 8, 8, generator=torch.Generator().manual_seed(0))
    assert high_frequency_share(noise) == pytest.approx(white_noise_share(8, 8), abs=0.01)


def test_the_command_prints_paths_and_a_summary_and_never_overwrites(
    cli: Cli, micro_base: Path, micro_guide: Path, tmp_path: Path
) -> None:
    arguments = ("visualize", "a cat", "a dog", "--guide", micro_guide, "--base", micro_base, "--guidance", "3,2")
    for tail in ("", "-2"):
        done = cli(*arguments, "--steps", 2, "--layers", "mid,0,skip-0", "--out", tmp_path)
        assert done.code == 0, done.err
        *paths, text = done.out.splitlines()
        assert [Path(p).name for p in paths] == [
            f"feature-maps{tail}.png", f"strength{tail}.png", f"strength{tail}.json",
        ]  # fmt: skip
        assert "strongest at timestep" in text and "From w = 2 to 3" in text and "The paper's description" in text
    assert len(list(tmp_path.iterdir())) == 6
    parameters = json.loads((tmp_path / "strength.json").read_text())["parameters"]
    assert parameters["guidance"] == [2.0, 3.0] and parameters["shown_layers"] == ["mid", "skip-0"]
    assert parameters["shown_steps"] == [1, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--guide", "nope"], "no guide 'nope'; known: "),
        (["--base", "nope"], "no base model 'nope'; known: emoji"),
        (["--base", "emoji"], "does not fit this U-Net"),
        (["--guidance", "2,strong"], "--guidance takes numbers separated by commas, such as 2,4,6,8; got '2,strong'"),
        (["--guidance", "2,20"], "guidance is 20; it must be between 1 and 9"),
        (["--guidance", "0.5"], "guidance is 0.5; it must be between 1 and 9"),
        (["--guidance", "nan"], "guidance is nan; it must be between 1 and 9"),
        (["--guidance", ","], "no guidance scale was given"),
        (["--steps", "0"], "steps is 0; it must be between 1 and 1000"),
        (["--seed", "-4"], "seed is -4"),
        (["--show", "0"], "show is 0; it must be between 1 and 32"),
        (["--layers", "skip-9"], "no layer 'skip-9'; known: skip-0, skip-1, skip-2, skip-3, mid, the indices 0 to 4"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_2(
    cli: Cli, micro_base: Path, micro_guide: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    defaults = {"--guide": micro_guide, "--base": micro_base, "--out": tmp_path / "x", "--steps": 2}
    options = [v for name, value in defaults.items() if name not in arguments for v in (name, value)]
    done = cli("visualize", "a cat", *options, *arguments)
    assert done.code == 2, done.err
    assert message in done.err and "Traceback" not in done.err
    assert not (tmp_path / "x").exists()


def test_a_file_as_folder_and_no_prompt_are_refused(
    cli: Cli, micro_base: Path, micro_guide: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    options = ("--guide", micro_guide, "--base", micro_base)
    below = tmp_path / "file" / "x"
    for out, message in ((tmp_path / "file", "is a file; name a folder"), (below, "cannot be written")):
        done = cli("visualize", "a cat", *options, "--out", out)
        assert done.code == 2 and message in done.err
    assert cli("visualize", *options, "--out", tmp_path / "x").code == 2
    assert (tmp_path / "file").read_text() == "mine" and not (tmp_path / "x").exists()


def test_a_guide_for_another_number_of_steps_warns(micro_base: Path, tmp_path: Path) -> None:
    guide = TinyGuide.from_unet(resolve(str(micro_base)).unet(), rank=2, embed_dim=8, emits="mid", sampling_steps=8)
    guide.save_pretrained(tmp_path / "guide")
    request = VisualizeRequest(str(tmp_path / "guide"), ("a cat",), (2.0,), 1, str(micro_base), out=tmp_path / "out")
    with pytest.warns(UserWarning, match="distilled for 8 sampling steps, not 1"):
        result = visualize(request)
    # it is untrained and emits for one layer only: files and text must show both
    assert "nothing is injected anywhere" in result.text
    assert [layer["emits"] for layer in result.document["layers"]] == [False] * 4 + [True]
    assert result.document["parameters"]["shown_layers"] == ["mid"] and result.files[0].is_file()


def test_values_that_are_not_finite_are_refused(cli: Cli, micro_base: Path, micro_guide: Path, tmp_path: Path) -> None:
    guide = load_guide(str(micro_guide))
    with torch.no_grad():
        guide.adapters[-1].expand.weight.fill_(3e38)
    guide.save_pretrained(tmp_path / "guide")
    done = cli("visualize", "a cat", "--guide", tmp_path / "guide", "--base", micro_base, "--out", tmp_path / "out")
    assert done.code == 1 and not list((tmp_path / "out").iterdir())
    assert "at w = 2, timestep " in done.err and "is not finite; check the guide's weights" in done.err


def test_sdxl_with_v_prediction_and_a_full_guide_is_recorded(micro_base: Path) -> None:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    micro = resolve(str(micro_base))
    second = CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=49408, hidden_size=32, intermediate_size=64, projection_dim=16, num_hidden_layers=1,
            num_attention_heads=2, bos_token_id=49406, eos_token_id=49407, pad_token_id=49407,
        )
    ).eval()  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64, attention_head_dim=2, norm_num_groups=8, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=16 + 6 * 8,
    ).eval()  # fmt: skip
    base = SimpleNamespace(
        scheduler_config=lambda: micro.scheduler_config() | {"prediction_type": "v_prediction"},
        text_encoders=lambda: [(micro.tokenizer(), micro.text_encoder()), (micro.tokenizer(), second)],
        zero_empty_prompt=lambda: True, config=lambda _: dict(unet.config), vae=micro.vae,
        side=lambda: unet.config.sample_size, sizes=micro.sizes, text_specs=TEXT_ENCODERS,
    )  # fmt: skip
    guide = FullGuide.from_unet(unet, negative_prompts=True).eval()
    with torch.no_grad():
        for name, weight in guide.named_parameters():
            if "controlnet_down_blocks" in name or "controlnet_mid_block" in name:
                weight.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    progress: list[tuple[int, int]] = []
    recording = record(
        base, Student(unet, guide), ["a cat", "a dog"], [1.0, 4.0], 2, 0, [1], lambda _, i, n: progress.append((i, n))
    )
    assert recording.relative.shape == (2, 5, 2)
    assert not recording.relative[0].any() and (recording.relative[1] > 0).all()
    assert progress == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [len(of_layer) for of_layer in recording.maps[1]] == [1] * 5
    # a single scale above 1 cannot show growth with w
    summary = summarise(recording)
    assert summary["growth"] is None and "undecided in this run" in describe(summary, "it")
