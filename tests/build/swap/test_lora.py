"""LoRAs: both formats, merged exactly, and nothing of them dropped in silence."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pnp_trt.assets import ROOT as ASSETS
from pnp_trt.build.swap.lora import LayerNames, Lora, bundled_loras, load, merge
from pnp_trt.build.swap.lora.read import LayerChange
from pnp_trt.build.swap.run import PlugSpec, plug
from pnp_trt.bundle.store import open_bundle
from pnp_trt.errors import InputError, PnpError
from pnp_trt.models.bases import resolve

from ...conftest import Result
from .conftest import ALPHA, LAYERS, RANK, TEXT_LAYERS

Cli = Callable[..., Result]


def merged(base: Path, network: str, *texts: str) -> dict[str, torch.Tensor]:
    model = resolve(str(base))
    names = LayerNames({"unet": model.unet(), "text_encoder": model.text_encoder()})
    loras = [load(Lora.parse(text), names) for text in texts]
    return merge(getattr(model, network)(), network, loras).state_dict()


@pytest.mark.parametrize(("kind", "scale"), [("plain", 1.0), ("plain", -0.5), ("kohya", 0.8)])
def test_a_merged_weight_is_w_plus_scaled_ba(
    micro_base: Path, diffusers_lora: Path, kohya_lora: Path, lora_factors: dict, kind: str, scale: float
) -> None:
    path, alpha = (diffusers_lora, RANK) if kind == "plain" else (kohya_lora, ALPHA)
    before, after = resolve(str(micro_base)).unet().state_dict(), merged(micro_base, "unet", f"{path}:{scale}")
    assert before.keys() == after.keys()
    for key, old in before.items():
        name = key.removesuffix(".weight")
        if key.endswith(".weight") and name in LAYERS:
            a, b = lora_factors[name]
            torch.testing.assert_close(after[key], old + scale * alpha / RANK * b @ a)
        else:
            assert torch.equal(after[key], old), key


def test_the_text_encoders_part_is_merged_too(micro_base: Path, kohya_lora: Path, lora_factors: dict) -> None:
    before, after = (
        resolve(str(micro_base)).text_encoder().state_dict(),
        merged(micro_base, "text_encoder", str(kohya_lora)),
    )
    changed = [k for k in before if not torch.equal(before[k], after[k])]
    assert before.keys() == after.keys() and len(changed) == len(TEXT_LAYERS)
    for key in changed:
        (layer,) = [n for n in TEXT_LAYERS if key.endswith(f"{n}.weight")]
        a, b = lora_factors[layer]
        torch.testing.assert_close(after[key], before[key] + ALPHA / RANK * b @ a)


def test_two_loras_add_up_and_undo_each_other(micro_base: Path, diffusers_lora: Path) -> None:
    before = resolve(str(micro_base)).unet().state_dict()
    after = merged(micro_base, "unet", f"{diffusers_lora}:0.5", f"{diffusers_lora}:-0.5")
    for key in before:
        torch.testing.assert_close(after[key], before[key])


def test_a_lora_is_plugged_in_with_its_text_encoder(micro_bundles: Path, kohya_lora: Path, tmp_path: Path) -> None:
    made = plug(PlugSpec(str(micro_bundles / "guided"), loras=(f"{kohya_lora}:0.7",), out=tmp_path / "x"))
    m = open_bundle(made.folder).manifest
    assert m.plugged.networks == {
        "unet": "external weights", "text_encoder": "external weights", "vae_decoder": "kept"
    }  # fmt: skip
    assert m.base.loras[0].scale == 0.7 and max(m.parity.relative_error.values()) < 1e-4
    before = open_bundle(micro_bundles / "guided").manifest.base.sha256
    assert {k for k in before if before[k] != m.base.sha256[k]} == {"unet", "text_encoder", "all"}
    with pytest.raises(InputError, match="contains a different or damaged bundle"):  # another scale is another bundle
        plug(PlugSpec(str(micro_bundles / "guided"), loras=(f"{kohya_lora}:0.6",), out=tmp_path / "x"))


@pytest.mark.parametrize(("network", "layer"), [("unet", "attn"), ("text_encoder", "self_attn")])
def test_a_merge_that_is_wrong_is_noticed_in_what_was_written(
    network: str, layer: str, micro_bundles: Path, kohya_lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch runs the merged weights, so that comparison passes; the formula's does not."""
    arithmetic = import_module("pnp_trt.build.swap.lora.merge")  # the package has a function of this name

    def off(change: LayerChange) -> torch.Tensor | None:
        found = weight_change(change)
        wrong = change.layer.network == network and layer in change.layer.name
        return found * 1.001 if found is not None and wrong else found

    weight_change = arithmetic.weight_change
    monkeypatch.setattr(arithmetic, "weight_change", off)
    with pytest.raises(PnpError, match=rf"the weight {network}\..*{layer}.* was written as .* where its LoRAs give"):
        plug(PlugSpec(str(micro_bundles / "guided"), loras=(str(kohya_lora),), out=tmp_path / "x"))
    assert not (tmp_path / "x").exists()


def test_a_unet_file_and_a_lora_for_the_text_encoder(
    micro_bundles: Path, tuned_unet: Path, kohya_lora: Path, tmp_path: Path
) -> None:
    """The fine-tune has no text encoder: the engine's own base's is merged into."""
    m = plug(PlugSpec(str(micro_bundles / "guided"), str(tuned_unet), (str(kohya_lora),), tmp_path / "x")).manifest
    assert m.plugged.networks["text_encoder"] == "external weights"
    assert m.parity.relative_error["text_encoder"] < 1e-4


def changed_lora(path: Path, folder: Path, change: Callable[[dict], None]) -> Path:
    weights = load_file(path)
    change(weights)
    out = folder / "changed.safetensors"
    save_file(weights, out)
    return out


KEY = f"unet.{LAYERS[0]}.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.update({"unet.down_blocks.7.lora_A.weight": torch.zeros(4, 32)}),
         r"has 1 of 7 keys that match no layer of the engine's model: unet.down_blocks.7.lora_A.weight; use"),
        (lambda w: w.update({KEY: torch.zeros(RANK, 48)}), r"is for another unet: .* has shape \[4, 48\]"),
        (lambda w: w.update({KEY: torch.full_like(w[KEY], float("nan"))}), "holds values that are not finite"),
        (lambda w: w.update({f"unet.{LAYERS[0]}.lora_magnitude_vector": torch.ones(32)}), "is of the kind DoRA"),
        (lambda w: w.update({"transformer.x.lora_A.weight": torch.zeros(4, 4)}), "match no layer .*: transformer.x."),
    ],
)  # fmt: skip
def test_loras_that_do_not_fit_are_one_sentence(
    micro_bundles: Path, diffusers_lora: Path, tmp_path: Path, change: Callable[[dict], None], message: str
) -> None:
    path = changed_lora(diffusers_lora, tmp_path, change)
    with pytest.raises(InputError, match=message):
        plug(PlugSpec(str(micro_bundles / "guided"), loras=(str(path),), out=tmp_path / "x"))
    assert not (tmp_path / "x").exists()


def test_what_is_no_lora_is_refused(tmp_path: Path, diffusers_lora: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"pickle")
    for text, message in (
        ("nope", "no LoRA 'nope'; --lora takes FILE.safetensors or FILE.safetensors:scale, or: sepia"),
        (f"{tmp_path}/x.bin", "is not a .safetensors; pickled weights are not read"),
        (f"{diffusers_lora}:strong", "is 'strong'; write a number"),
        (f"{diffusers_lora}:nan", "is 'nan'; write a number"),
        (f"{diffusers_lora}:-1e7", r"is -1e\+07; the largest is 1e\+06"),
    ):
        with pytest.raises(InputError, match=message):
            Lora.parse(text)


@given(st.floats(-4, 4))
def test_scales_are_read_as_written(scale: float) -> None:
    found = Lora.parse(f"sepia:{scale}")
    assert (found.name, found.scale) == ("sepia", scale)
    assert Lora.parse("sepia").scale == 1.0


def test_the_bundled_lora_changes_every_attention_block() -> None:
    assert bundled_loras() == ["sepia"]
    assert (ASSETS / "loras" / "sepia.safetensors").stat().st_size < 1 << 20
    before, after = resolve("emoji").unet().state_dict(), merged(Path("emoji"), "unet", "sepia")
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    blocks = {k.partition(".transformer_blocks")[0] for k in before if ".attn1.to_q.weight" in k}
    assert {k.partition(".transformer_blocks")[0].rpartition(".proj")[0] or k.partition(".transformer_blocks")[0]
            for k in changed} == blocks  # fmt: skip
    assert all(".attentions." in k for k in changed)
