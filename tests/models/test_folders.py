"""Diffusers folders in the forms that users have: read as diffusers reads them, or refused early with a clear error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny, DPMSolverMultistepScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from pnp_trt.build.builder import build
from pnp_trt.build.spec import BuildSpec
from pnp_trt.distill.run import TeacherModel
from pnp_trt.errors import InputError
from pnp_trt.models.bases import resolve
from pnp_trt.models.scheduler import base_scheduler, check_samples
from pnp_trt.models.teacher import BaseModel
from pnp_trt.models.tokenizer import copy_tokenizer
from pnp_trt.runtime.tokenizer import Tokenizer
from pnp_trt.sampling.schedules import make

WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
KINDS = {"unet": UNet2DConditionModel, "vae": AutoencoderTiny, "text_encoder": CLIPTextModel}


@pytest.fixture
def folder(micro_base: Path, tmp_path: Path) -> Path:
    """A copy of the micro teacher to change."""
    return Path(shutil.copytree(micro_base, tmp_path / "model"))


def edit(path: Path, **changes: Any) -> None:
    """Set entries of a JSON file; ``...`` removes one."""
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def file(folder: Path, part: str) -> Path:
    return folder / part / f"{WEIGHTS[part]}.safetensors"


def reweight(folder: Path, part: str, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Rewrite a network's weights."""
    path = file(folder, part)
    save_file({k: v.contiguous() for k, v in change(load_file(path)).items()}, path)


def load(base: BaseModel, part: str) -> dict[str, torch.Tensor]:
    return {"unet": base.unet, "vae": base.vae, "text_encoder": base.text_encoder}[part]().state_dict()


@pytest.mark.parametrize("variant", ["fp16", "bf16", "non_ema", "ema"])
def test_a_model_with_only_one_variant_loads_that_variant(variant: str, folder: Path) -> None:
    for part, stem in WEIGHTS.items():
        file(folder, part).rename(folder / part / f"{stem}.{variant}.safetensors")
    base = resolve(str(folder))
    base.check()
    for part, kind in KINDS.items():
        theirs = kind.from_pretrained(folder / part, variant=variant, use_safetensors=True).state_dict()
        ours = load(base, part)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_variants_next_to_plain_weights_are_ignored(folder: Path) -> None:
    before = resolve(str(folder)).fingerprint()
    for part, stem in WEIGHTS.items():
        twice = {k: v * 2 for k, v in load_file(file(folder, part)).items()}
        for variant in ("fp16", "non_ema"):
            save_file(twice, folder / part / f"{stem}.{variant}.safetensors")
        (folder / part / f"{stem}.safetensors.index.fp16.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    base = resolve(str(folder))
    assert base.fingerprint() == before
    for part in KINDS:
        plain = load_file(file(folder, part))
        assert all(torch.equal(v, plain[k]) for k, v in load(base, part).items() if k in plain)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16])
@pytest.mark.parametrize("part", WEIGHTS)
def test_weights_of_every_dtype_load_as_float32(part: str, dtype: torch.dtype, folder: Path) -> None:
    stored = {k: v.to(dtype) for k, v in load_file(file(folder, part)).items()}
    save_file(stored, file(folder, part))
    ours = load(resolve(str(folder)), part)
    assert {v.dtype for v in ours.values()} == {torch.float32}
    prefix = "" if next(iter(stored)) in ours else "text_model."
    assert all(torch.equal(ours[k.removeprefix(prefix)], v.float()) for k, v in stored.items())


def test_text_encoders_saved_by_older_transformers_load(folder: Path) -> None:
    """Their keys have a prefix, and they contain position ids and an unused projection."""
    before = load(resolve(str(folder)), "text_encoder")

    def older(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        keys = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in weights.items()}
        return keys | {
            "text_model.embeddings.position_ids": torch.arange(77)[None],
            "text_projection.weight": torch.eye(32),
        }

    reweight(folder, "text_encoder", older)
    after = load(resolve(str(folder)), "text_encoder")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_a_config_with_fewer_layers_skips_the_files_last_layers(folder: Path) -> None:
    """ "Clip skip" set by the config, while the file has all layers."""

    def deeper(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        last = {k: v for k, v in weights.items() if ".layers.0." in k or k.startswith("encoder.layers.0.")}
        return weights | {k.replace("layers.0.", "layers.1."): v + 1 for k, v in last.items()}

    reweight(folder, "text_encoder", deeper)
    ours = load(resolve(str(folder)), "text_encoder")
    theirs = CLIPTextModel.from_pretrained(folder / "text_encoder").state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


CONFIGS = (
    "model_index.json", "scheduler/scheduler_config.json", "unet/config.json", "vae/config.json",
    "text_encoder/config.json", "tokenizer/tokenizer_config.json", "tokenizer/tokenizer.json",
)  # fmt: skip


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_byte_order_marks_and_windows_line_endings_are_accepted(encoding: str, folder: Path, tmp_path: Path) -> None:
    before = resolve(str(folder))
    before_ids = before.tokenizer()(["a red apple"]).input_ids
    before_unet = load(before, "unet")
    for name in CONFIGS:
        path = folder / name
        path.write_bytes(path.read_text(encoding="utf-8").replace("\n", "\r\n").encode(encoding))
    after = resolve(str(folder))
    after.check()
    assert after.scheduler_config() == before.scheduler_config()
    assert after.sizes() == before.sizes()
    assert after.tokenizer()(["a red apple"]).input_ids == before_ids
    assert all(torch.equal(v, before_unet[k]) for k, v in load(after, "unet").items())
    copy_tokenizer(after, after.text_specs[0], tmp_path / "tokenizer.json")
    ids, _ = Tokenizer(tmp_path / "tokenizer.json").weighted([("a red apple", 1.0)])
    assert ids[: len(before_ids[0])].tolist() == before_ids[0]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("damage", ["cut", "utf-16", "latin-1", "empty"])
def test_errors_name_damaged_json(name: str, damage: str, folder: Path) -> None:
    path = folder / name
    text = path.read_text()
    raw = {
        "cut": text[: len(text) // 2].encode(), "utf-16": text.encode("utf-16-le"), "empty": b"",
        "latin-1": text.encode().replace(b"{", b'{"\xe9": 1,', 1),
    }[damage]  # fmt: skip
    path.write_bytes(raw)
    messages = {
        "cut": "is not complete JSON",
        "utf-16": "is not .*text",
        "latin-1": "is not UTF-8",
        "empty": "is empty",
    }
    with pytest.raises(InputError, match=f"{name} {messages[damage]}"):
        whole = resolve(str(folder))
        whole.check()
        whole.scheduler_config()


GONE = {
    "scheduler/scheduler_config.json": "scheduler_config.json is missing; download it again",
    "unet/config.json": "unet/config.json is missing; download it again",
    "vae/config.json": "vae/config.json is missing; download it again",
    "text_encoder/config.json": "text_encoder/config.json is missing; download it again",
    "tokenizer/tokenizer.json": "vocab.json is missing, and there is no tokenizer.json either",
    "unet/diffusion_pytorch_model.safetensors": "unet holds no .safetensors; download it again",
    "scheduler": "has no scheduler; download it again",
    "vae": "has no vae; download it again",
}


@pytest.mark.parametrize("name", GONE)
def test_errors_name_missing_files(name: str, folder: Path) -> None:
    path = folder / name
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    with pytest.raises(InputError, match=GONE[name]):
        build(BuildSpec(str(folder), "none", out=folder.parent / "out"))


def test_a_scheduler_config_under_its_old_name_is_refused(folder: Path) -> None:
    path = folder / "scheduler" / "scheduler_config.json"
    path.rename(path.parent / "config.json")
    with pytest.raises(InputError, match=r"config.json .its name in .*. exists; rename it to scheduler_config.json"):
        resolve(str(folder))


def test_pickled_weights_are_refused(folder: Path) -> None:
    path = file(folder, "unet")
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()
    with pytest.raises(InputError, match=r"holds diffusion_pytorch_model.bin and no .safetensors; pickled weights are"):
        resolve(str(folder))
    with pytest.raises(InputError, match="x.ckpt holds pickled weights, which are not read"):
        (folder / "x.ckpt").write_bytes(b"PK")
        resolve(str(folder / "x.ckpt"))


def extra_channels(count: int) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda w: w | {"conv_in.weight": torch.cat([w["conv_in.weight"]] * 4, 1)[:, :count].contiguous()}


#: defect → edit of the micro teacher that causes it, and the error that `build` raises before any export
WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "inpainting": (
        lambda f: [edit(f / "unet/config.json", in_channels=9), reweight(f, "unet", extra_channels(9))],
        "has 9 input channels, but the VAE's latents have 4: it is for inpainting",
    ),
    "pix2pix": (
        lambda f: [edit(f / "unet/config.json", in_channels=8), reweight(f, "unet", extra_channels(8))],
        "has 8 input channels, but the VAE's latents have 4: it edits images",
    ),
    "depth": (
        lambda f: [edit(f / "unet/config.json", in_channels=5), reweight(f, "unet", extra_channels(5))],
        "it takes a depth map",
    ),
    "upscaler": (
        lambda f: [edit(f / "unet/config.json", in_channels=7), reweight(f, "unet", extra_channels(7))],
        "it is for upscaling",
    ),
    "class labels": (lambda f: edit(f / "unet/config.json", num_class_embeds=7), "num_class_embeds = 7"),
    "LCM": (
        lambda f: [
            edit(f / "unet/config.json", time_cond_proj_dim=8),
            reweight(f, "unet", lambda w: w | {"time_embedding.cond_proj.weight": torch.zeros(16, 8)}),
        ],
        r"takes the guidance scale as an input .time_cond_proj_dim = 8., as latent consistency models do",
    ),
    "integer weights": (
        lambda f: reweight(f, "unet", lambda w: w | {"conv_in.bias": w["conv_in.bias"].to(torch.int32)}),
        "conv_in.bias has type I32, not floating point",
    ),
    "a weight too many": (
        lambda f: reweight(f, "unet", lambda w: w | {"control.weight": torch.zeros(3)}),
        r"holds 1 weight \(control.weight\) that the UNet2DConditionModel of its config.json does not have",
    ),
    "a weight too many in the text encoder": (
        lambda f: reweight(f, "text_encoder", lambda w: w | {"adapter.weight": torch.zeros(3)}),
        r"holds 1 weight \(adapter.weight\) that the CLIPTextModel",
    ),
    "a weight too few": (
        lambda f: reweight(f, "vae", lambda w: {k: v for k, v in w.items() if k != "decoder.layers.0.bias"}),
        r"lacks 1 weight \(decoder.layers.0.bias\) of AutoencoderTiny; download",
    ),
    "a weight of another shape": (
        lambda f: reweight(f, "unet", lambda w: w | {"conv_in.bias": torch.zeros(3)}),
        r"does not fit its config.json: conv_in.bias has shape \[3\], not \[16\]",
    ),
    "not finite in the VAE": (
        lambda f: reweight(f, "vae", lambda w: w | {"decoder.layers.0.bias": torch.full((8,), torch.nan)}),
        "decoder.layers.0.bias holds values that are not finite",
    ),
    "not finite in the text encoder": (
        lambda f: reweight(
            f, "text_encoder", lambda w: {k: v * torch.inf if k.endswith("fc1.bias") else v for k, v in w.items()}
        ),
        "fc1.bias holds values that are not finite",
    ),
    "scaled fp8": (
        lambda f: reweight(
            f, "unet",
            lambda w: {k: v.to(torch.float8_e4m3fn) for k, v in w.items()} | {"conv_in.scale_weight": torch.ones(1)},
        ),
        "holds scaled fp8 weights",
    ),
    "another kind of VAE": (
        lambda f: edit(f / "vae/config.json", _class_name="AutoencoderDC"), "the VAE is of class AutoencoderDC; known",
    ),
    "no sample size": (lambda f: edit(f / "unet/config.json", sample_size=...), "a config.json lacks 'sample_size'"),
    "a sample of 0": (
        lambda f: edit(f / "unet/config.json", sample_size=0),
        "sample_size is 0; it must be one or two whole numbers from 1 to 4096",
    ),
    "a sample of three sides": (
        lambda f: edit(f / "unet/config.json", sample_size=[8, 8, 8]), r"sample_size is \[8, 8, 8\]; it must be one or",
    ),
    "a sample of text": (lambda f: edit(f / "unet/config.json", sample_size="x"), "sample_size is .x.; it must be"),
    "a factor of 0": (
        lambda f: edit(f / "vae/config.json", scaling_factor=0.0),
        "vae/config.json: scaling_factor is 0.0; it must be a number from 1e-06 to 1e.06; download",
    ),
    "a shift of text": (lambda f: edit(f / "vae/config.json", shift_factor="x"), "shift_factor is 'x'; it must be"),
    "text training steps": (
        lambda f: edit(f / "scheduler/scheduler_config.json", num_train_timesteps="x"),
        r"scheduler_config.json: num_train_timesteps is 'x'; it must be a whole number from 1 to 100000; download",
    ),
    "too many training steps": (
        lambda f: edit(f / "scheduler/scheduler_config.json", num_train_timesteps=1e300),
        "num_train_timesteps is 1e.300; it must be a whole number",
    ),
    "a beta that is no number": (
        lambda f: edit(f / "scheduler/scheduler_config.json", beta_start=float("nan")),
        "scheduler_config.json is not usable JSON .nan is not a JSON number",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_unsupported_models_are_refused_before_any_export(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modify, message = WRONG[name]
    modify(folder)
    monkeypatch.setattr("pnp_trt.build.network.NetworkExport.write", lambda *_: pytest.fail("a network was exported"))
    with pytest.raises(InputError, match=message):
        build(BuildSpec(str(folder), "none", out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_infinities_and_nulls_in_a_scheduler_config_mean_defaults(folder: Path) -> None:
    """diffusers saves -Infinity and nulls for DPM-Solver++; both mean the default."""
    DPMSolverMultistepScheduler(beta_schedule="scaled_linear").save_pretrained(folder / "scheduler")
    path = folder / "scheduler" / "scheduler_config.json"
    assert '"lambda_min_clipped": -Infinity' in path.read_text() and '"variance_type": null' in path.read_text()
    edit(path, num_train_timesteps=None)
    record = base_scheduler(resolve(str(folder)))
    assert record["_class_name"] == "DPMSolverMultistepScheduler" and None not in record.values()
    assert "lambda_min_clipped" not in record
    check_samples(record, "it")
    scheduler = DPMSolverMultistepScheduler(beta_schedule="scaled_linear")
    scheduler.set_timesteps(5)
    assert make("teacher", record, 5).timesteps.tolist() == scheduler.timesteps.tolist()


def test_distillation_refuses_models_of_non_square_images(folder: Path) -> None:
    edit(folder / "unet" / "config.json", sample_size=[8, 16])
    base = resolve(str(folder))
    assert base.sizes().latent == (4, 8, 16)
    with pytest.raises(InputError, match=r"sample_size is \[8, 16\]; this command needs a square image"):
        base.side()
    with pytest.raises(InputError, match="needs a square image"):
        TeacherModel.load(str(folder), ["a cat"], torch.device("cpu"))


def test_sdxl_is_detected_by_its_second_text_encoder(micro_sdxl: Path, tmp_path: Path) -> None:
    base = resolve(str(micro_sdxl))
    assert base.family == "sdxl" and list(base.networks()) == ["unet", "text_encoder", "text_encoder_2", "vae_decoder"]
    folder = Path(shutil.copytree(micro_sdxl, tmp_path / "half"))
    shutil.rmtree(folder / "text_encoder_2")
    with pytest.raises(InputError, match="has SDXL's pooled text .* but the model has no second text encoder"):
        resolve(str(folder)).check_configs()


def test_sdxls_refiner_is_refused(micro_sdxl: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(micro_sdxl, tmp_path / "refiner"))
    shutil.rmtree(folder / "text_encoder")
    shutil.rmtree(folder / "tokenizer")
    edit(folder / "model_index.json", _class_name="StableDiffusionXLImg2ImgPipeline")
    with pytest.raises(InputError, match="is SDXL's refiner .StableDiffusionXLImg2ImgPipeline."):
        resolve(str(folder))


@pytest.mark.parametrize(
    ("kind", "network"),
    [
        ("FluxPipeline", "transformer"), ("StableDiffusion3Pipeline", "transformer"),
        ("PixArtAlphaPipeline", "transformer"), ("StableCascadeCombinedPipeline", "prior"),
    ],
)  # fmt: skip
def test_other_architectures_are_refused(kind: str, network: str, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    (tmp_path / network).mkdir()
    with pytest.raises(InputError, match=f"is a {kind}, which denoises with .* not with Stable Diffusion's U-Net"):
        resolve(str(tmp_path))


def test_build_warns_that_the_safety_checker_is_left_out(folder: Path, tmp_path: Path) -> None:
    (folder / "safety_checker").mkdir()
    with pytest.warns(UserWarning, match="has safety_checker, which a bundle cannot contain; ignored"):
        build(BuildSpec(str(folder), "none", out=tmp_path / "out"))


def test_configs_that_affect_images_change_the_hash(folder: Path) -> None:
    """Models with equal weights may differ in their schedules, scaling factors and tokenizers."""
    before = resolve(str(folder)).configs_sha256()
    for change in ({"eos_token_id": 2}, {"dtype": "float16"}, {"transformers_version": "4.0.0"}):
        edit(folder / "text_encoder/config.json", **change)
        assert resolve(str(folder)).configs_sha256() == before
    hashes = {before}
    for name, change in (
        ("vae/config.json", {"scaling_factor": 0.3}),
        ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}),
        ("scheduler/scheduler_config.json", {"_class_name": "EulerDiscreteScheduler"}),
        ("tokenizer/tokenizer_config.json", {"model_max_length": 20}),
    ):
        edit(folder / name, **change)
        hashes.add(resolve(str(folder)).configs_sha256())
    assert len(hashes) == 5


@pytest.mark.parametrize("length", [..., 1000000000000000019884624838656, None])
def test_a_tokenizer_without_a_length_uses_the_text_encoders_length(length: Any, folder: Path) -> None:
    edit(folder / "tokenizer/tokenizer_config.json", model_max_length=length)
    tokenizer = resolve(str(folder)).tokenizer()
    assert tokenizer.model_max_length == 77
    ids = tokenizer(["a cat"], padding="max_length", max_length=tokenizer.model_max_length).input_ids
    assert len(ids[0]) == 77


def test_a_shorter_tokenizer_length_is_used(folder: Path) -> None:
    edit(folder / "tokenizer/tokenizer_config.json", model_max_length=20)
    assert resolve(str(folder)).tokenizer().model_max_length == 20


@pytest.mark.parametrize("length", [78, 512, 1, 0, -1, 7.5, "77"])
def test_a_length_that_the_text_encoder_does_not_support_is_refused(length: Any, folder: Path) -> None:
    edit(folder / "tokenizer/tokenizer_config.json", model_max_length=length)
    with pytest.raises(InputError, match="77 positions; set model_max_length in tokenizer_config.json to 77"):
        resolve(str(folder)).check()


def test_a_tokenizer_with_more_tokens_than_the_text_encoder_is_refused(folder: Path) -> None:
    edit(folder / "text_encoder/config.json", vocab_size=49407)
    reweight(
        folder, "text_encoder",
        lambda w: {k: v[:49407] if k.endswith("token_embedding.weight") else v for k, v in w.items()},
    )  # fmt: skip
    with pytest.raises(InputError, match="has 49408 tokens, but the text encoder embeds 49407"):
        resolve(str(folder)).check()


def test_a_tokenizer_of_another_class_is_refused(folder: Path) -> None:
    edit(folder / "tokenizer/tokenizer_config.json", tokenizer_class="T5Tokenizer")
    with pytest.raises(InputError, match="the tokenizer is a T5Tokenizer; known: CLIPTokenizer"):
        resolve(str(folder)).check()
