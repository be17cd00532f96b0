"""Choice of weight files, reading users' JSON, and dtypes of weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from pnp_trt.errors import InputError
from pnp_trt.models.bases import hub_patterns, is_hub_id, resolve
from pnp_trt.models.files import DIFFUSERS, TRANSFORMERS, choose, read_json, read_weights, weight_files

PLAIN = f"{DIFFUSERS}.safetensors"


def shards(folder: Path, weights: dict[str, torch.Tensor], names: tuple[str, ...], index: str) -> None:
    """Write weights to shards of these names, and their index."""
    keys = sorted(weights)
    parts = {name: keys[i :: len(names)] for i, name in enumerate(names)}
    for name, own in parts.items():
        save_file({k: weights[k].clone() for k in own}, folder / name)
    weight_map = {k: name for name, own in parts.items() for k in own}
    (folder / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


#: names of a variant's shards, in diffusers' current and old form
NEW = (f"{DIFFUSERS}.VARIANT-00001-of-00002.safetensors", f"{DIFFUSERS}.VARIANT-00002-of-00002.safetensors")
OLD = (f"{DIFFUSERS}-00001-of-00002.VARIANT.safetensors", f"{DIFFUSERS}-00002-of-00002.VARIANT.safetensors")
NAMES = tuple(n.replace(".VARIANT", "") for n in NEW)


def variant_shards(folder: Path, weights: dict[str, torch.Tensor], variant: str, old: bool = False) -> None:
    index = f"{DIFFUSERS}.safetensors.{variant}.index.json" if old else f"{DIFFUSERS}.safetensors.index.{variant}.json"
    shards(folder, weights, tuple(n.replace("VARIANT", variant) for n in (OLD if old else NEW)), index)


#: contents of a folder → function that writes them (``w(factor)`` are the weights times a factor), and the variant that
#: diffusers has to load
FORMS = {
    "plain": (lambda f, w: save_file(w(1), f / PLAIN), None),
    "fp16 only": (lambda f, w: save_file(w(2), f / f"{DIFFUSERS}.fp16.safetensors"), "fp16"),
    "bf16 only": (lambda f, w: save_file(w(2), f / f"{DIFFUSERS}.bf16.safetensors"), "bf16"),
    "plain, fp16 and non_ema": (
        lambda f, w: [
            save_file(w(1), f / PLAIN),
            save_file(w(2), f / f"{DIFFUSERS}.fp16.safetensors"),
            save_file(w(3), f / f"{DIFFUSERS}.non_ema.safetensors"),
        ],
        None,
    ),
    "plain shards": (lambda f, w: shards(f, w(1), NAMES, f"{PLAIN}.index.json"), None),
    "plain shards and a plain file": (
        lambda f, w: [save_file(w(2), f / PLAIN), shards(f, w(1), NAMES, f"{PLAIN}.index.json")],
        None,
    ),
    "plain and shards of non_ema": (
        lambda f, w: [save_file(w(1), f / PLAIN), variant_shards(f, w(2), "non_ema")],
        None,
    ),
    "plain and old shards of fp16": (
        lambda f, w: [save_file(w(1), f / PLAIN), variant_shards(f, w(2), "fp16", old=True)],
        None,
    ),
    "shards of fp16 only": (lambda f, w: variant_shards(f, w(2), "fp16"), "fp16"),
    "old shards of fp16 only": (lambda f, w: variant_shards(f, w(2), "fp16", old=True), "fp16"),
    "plain shards and shards of fp16": (
        lambda f, w: [shards(f, w(1), NAMES, f"{PLAIN}.index.json"), variant_shards(f, w(2), "fp16")],
        None,
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_weights_are_those_that_diffusers_loads(form: str, micro_base: Path, tmp_path: Path) -> None:
    make, variant = FORMS[form]
    (tmp_path / "unet").mkdir()
    folder = tmp_path / "unet"
    (folder / "config.json").write_bytes((micro_base / "unet" / "config.json").read_bytes())
    weights = load_file(micro_base / "unet" / PLAIN)
    make(folder, lambda factor: {k: v * factor for k, v in weights.items()})
    theirs = UNet2DConditionModel.from_pretrained(folder, variant=variant, use_safetensors=True).state_dict()
    ours = read_weights(weight_files(folder))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("both", [False, True])
def test_a_complete_text_encoder_file_takes_precedence_over_its_index(
    both: bool, micro_base: Path, tmp_path: Path
) -> None:
    """transformers' order differs from diffusers'."""
    folder = tmp_path / "text_encoder"
    folder.mkdir()
    (folder / "config.json").write_bytes((micro_base / "text_encoder" / "config.json").read_bytes())
    weights = load_file(micro_base / "text_encoder" / "model.safetensors")
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    shards(folder, weights, names, "model.safetensors.index.json")
    if both:
        save_file({k: v * 2 for k, v in weights.items()}, folder / "model.safetensors")
    theirs = CLIPTextModel.from_pretrained(folder).state_dict()
    ours = read_weights(weight_files(folder))
    key = next(k for k in ours if k.endswith("final_layer_norm.weight"))
    assert torch.equal(ours[key], theirs["final_layer_norm.weight"])
    assert len(weight_files(folder)) == (1 if both else 2)


VARIANTS = st.sampled_from(["fp16", "bf16", "non_ema", "ema"])
STEMS = st.sampled_from([DIFFUSERS, TRANSFORMERS])


@given(STEMS, st.sets(VARIANTS, min_size=1), st.booleans(), st.booleans())
def test_plain_weights_take_precedence_and_a_single_variant_is_used(
    stem: str, variants: set[str], sharded: bool, plain: bool
) -> None:
    names = [f"{stem}.safetensors.index.{v}.json" if sharded else f"{stem}.{v}.safetensors" for v in variants]
    if plain:
        assert choose([*names, f"{stem}.safetensors"], stem, "f").name == f"{stem}.safetensors"
    elif len(variants) == 1:
        choice = choose(names, stem, "f")
        assert (choice.name, choice.variant, choice.sharded) == (names[0], next(iter(variants)), sharded)
    else:
        message = rf"variants {', '.join(sorted(variants))}; rename the intended one to {stem}\.safetensors"
        with pytest.raises(InputError, match=message):
            choose(names, stem, "f")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([], "holds no .safetensors"),
        (["diffusion_pytorch_model.bin"], "holds diffusion_pytorch_model.bin and no .safetensors; pickled weights"),
        (["diffusion_pytorch_model-00001-of-00002.safetensors"], "without their index"),
        (["diffusion_pytorch_model.fp16-00001-of-00010.safetensors"], "without their index"),
        (["a.safetensors", "b.safetensors"], "holds 2 files of weights .a.safetensors, b.safetensors."),
    ],
)
def test_folders_without_a_unique_choice_are_refused(names: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        choose(names, DIFFUSERS, "f")


def test_a_single_weight_file_is_used_whatever_its_name() -> None:
    assert choose(["my-unet.safetensors", "config.json"], DIFFUSERS, "f").name == "my-unet.safetensors"


def test_a_missing_shard_is_named(micro_base: Path, tmp_path: Path) -> None:
    shards(tmp_path, load_file(micro_base / "unet" / PLAIN), NAMES, f"{PLAIN}.index.json")
    (tmp_path / NAMES[1]).unlink()
    with pytest.raises(
        InputError, match=rf"{NAMES[1]} is missing, but {PLAIN}\.index\.json lists it as a shard; download"
    ):
        weight_files(tmp_path)


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "x.bin"])
def test_an_index_that_names_other_than_safetensors_beside_it_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / f"{PLAIN}.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(InputError, match="which is not a safetensors file in its folder"):
        weight_files(tmp_path)


TEXT = '{"a": [1, 2],\n "b": "é"}'


@pytest.mark.parametrize(
    "raw",
    [TEXT.encode(), TEXT.encode("utf-8-sig"), TEXT.replace("\n", "\r\n").encode("utf-8-sig"), TEXT.encode("utf-16")],
)
def test_json_with_byte_order_marks_and_any_line_ending_is_read(raw: bytes, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(raw)
    assert read_json(path) == {"a": [1, 2], "b": "é"}


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (TEXT.encode("utf-16-le"), "is not UTF-8 text .line 2, byte 42 is 0xe9.; save it as UTF-8"),
        (TEXT.encode("latin-1"), "is not UTF-8 text .line 2, byte 21 is 0xe9.; save it as UTF-8"),
        (TEXT.encode("utf-16")[:-1], "is not UTF-16 text"),
        (TEXT.encode()[:11], r"is not complete JSON \(line 1, column 12"),
        (b"", "is empty"),
        (b"[1, 2]", "holds a JSON list, not an object"),
        (b"<!DOCTYPE html><html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "is a Git LFS pointer"),
        (b"[" * 300_000, "is nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not usable JSON"),
        (b'{"scaling_factor": NaN}', "is not usable JSON"),
    ],
)
def test_unusable_json_is_refused(raw: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(raw)
    with pytest.raises(InputError, match=f"config.json {said}"):
        read_json(path)


def test_missing_files_and_folders_are_refused_as_json(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="gone.json does not exist; download it again"):
        read_json(tmp_path / "gone.json")
    with pytest.raises(InputError, match="cannot be read .Is a directory."):
        read_json(tmp_path)


VALUES = torch.tensor([[1.5, -0.25], [448.0, 0.0]])  # exact in every dtype below


@pytest.mark.parametrize(
    ("dtype", "read_as"),
    [
        (torch.float64, torch.float32),
        (torch.float8_e4m3fn, torch.float32),
        (torch.float8_e5m2, torch.float32),
        (torch.float32, torch.float32),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
    ],
)
def test_only_float64_and_fp8_are_converted(dtype: torch.dtype, read_as: torch.dtype, tmp_path: Path) -> None:
    save_file({"a.weight": VALUES.to(dtype)}, tmp_path / "x.safetensors")
    weight = read_weights([tmp_path / "x.safetensors"])["a.weight"]
    assert weight.dtype == read_as
    assert torch.equal(weight.double(), VALUES.to(dtype).double())


def test_float64_is_rounded_once(tmp_path: Path) -> None:
    third = torch.tensor([1 / 3], dtype=torch.float64)
    save_file({"a": third}, tmp_path / "x.safetensors")
    assert read_weights([tmp_path / "x.safetensors"])["a"].item() == pytest.approx(1 / 3, abs=2**-26)


@pytest.mark.parametrize("scale", ["a.scale_weight", "scaled_fp8", "a.weight_scale", "a.input_scale"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_scaled_fp8_is_refused(dtype: torch.dtype, scale: str, tmp_path: Path) -> None:
    save_file({"a.weight": VALUES.to(dtype), scale: torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=f"holds scaled fp8 weights .{scale}., whose scales are not applied; use"):
        read_weights([tmp_path / "x.safetensors"])


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.uint8, torch.bool])
def test_integer_weights_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(2, 2).to(dtype)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="a.weight has type .*, not floating point"):
        read_weights([tmp_path / "x.safetensors"])


def test_counts_and_positions_may_be_integers(tmp_path: Path) -> None:
    weights = {"embeddings.position_ids": torch.arange(77)[None], "norm.num_batches_tracked": torch.tensor(3)}
    save_file(weights, tmp_path / "x.safetensors")
    assert read_weights([tmp_path / "x.safetensors"]).keys() == weights.keys()


@pytest.mark.parametrize(
    ("name", "is_id"),
    [
        ("stabilityai/stable-diffusion-xl-base-1.0", True),
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", True),
        ("owner.with.dots/model_1.5", True),
        ("./models/sd", False),
        ("/models/sd", False),
        ("models/my.safetensors", False),
        ("models/my.ckpt", False),
        ("a/b/c", False),
        ("emoji", False),
        ("../x", False),
    ],
)
def test_hub_ids_may_have_dots(name: str, is_id: bool) -> None:
    assert is_hub_id(name) == is_id


@pytest.mark.parametrize("online", [True, False])
def test_a_hub_models_folder_is_checked_like_a_local_one(
    online: bool, micro_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline, the cached folder is used with whatever variants it contains."""
    folder = Path(shutil.copytree(micro_base, tmp_path / "cached"))
    (folder / "unet" / PLAIN).rename(folder / "unet" / f"{DIFFUSERS}.fp16.safetensors")
    requests: list[list[str]] = []

    def list_files(name: str) -> list[str]:
        if not online:
            raise ConnectionError(name)
        return [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]

    def download(name: str, allow_patterns: list[str]) -> str:
        requests.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.list_repo_files", list_files)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    base = resolve("owner.x/model-1.0")
    assert base.folder == folder and base.unet().config.sample_size == 8
    expected = {f"unet/{DIFFUSERS}.fp16.safetensors", f"vae/{PLAIN}", "text_encoder/model.safetensors"}
    assert set(requests[0]) == {"*.json", "*.txt", *(expected if online else {"*/*.safetensors"})}
    (folder / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(InputError, match="scheduler_config.json is missing"):
        resolve("owner.x/model-1.0")


def test_only_the_weights_that_are_loaded_are_downloaded_from_the_hub() -> None:
    names = [
        "model_index.json", "sd.safetensors", "unet/config.json", f"unet/{PLAIN}", f"unet/{DIFFUSERS}.fp16.safetensors",
        "text_encoder/model.fp16.safetensors", "vae/diffusion_pytorch_model.bin", f"vae/{PLAIN}.index.json",
        *(f"vae/{n}" for n in NAMES), *(f"vae/{n.replace('VARIANT', 'fp16')}" for n in NEW),
        "text_encoder_2/model.safetensors", "vae_decoder/model.onnx",
    ]  # fmt: skip
    assert set(hub_patterns(names, "owner/model")) == {
        "*.json", "*.txt", f"unet/{PLAIN}", "text_encoder/model.fp16.safetensors",
        *(f"vae/{n}" for n in NAMES), "text_encoder_2/model.safetensors",
    }  # fmt: skip
