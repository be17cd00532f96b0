"""A plugged bundle is the bundle that a build of the fine-tune makes, and a failed one is none."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file

from pnp_trt.build.builder import Built, build
from pnp_trt.build.spec import BuildSpec
from pnp_trt.build.swap.run import PlugSpec, plug
from pnp_trt.bundle.store import list_files, open_bundle, read_manifest, sha256
from pnp_trt.errors import InputError, PnpError
from pnp_trt.graph.weights import apply
from pnp_trt.models.bases import resolve
from pnp_trt.runtime.pipeline import Pipeline
from pnp_trt.runtime.verify import load_golden, verify

from ...bundles import reseal
from ...conftest import Result

Cli = Callable[..., Result]


@pytest.fixture(scope="module")
def whole(micro_bundles: Path, tuned: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The fine-tune, a whole model, plugged into the guided bundle."""
    out = tmp_path_factory.mktemp("plugged") / "whole"
    return plug(PlugSpec(str(micro_bundles / "guided"), str(tuned), out=out))


@pytest.fixture(scope="module")
def unet_only(micro_bundles: Path, tuned_unet: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Its U-Net's file alone, plugged into the guided bundle."""
    out = tmp_path_factory.mktemp("plugged") / "unet"
    return plug(PlugSpec(str(micro_bundles / "guided"), str(tuned_unet), out=out))


def test_plugged_is_what_a_build_of_the_fine_tune_makes(
    whole: Built, tuned: Path, micro_guide: Path, tmp_path: Path
) -> None:
    """Graphs, weights and tokenizer byte by byte; only the manifest tells how it came about."""
    assert not whole.cached
    built = build(BuildSpec(str(tuned), str(micro_guide), out=tmp_path / "built"))
    theirs, ours = open_bundle(built.folder).manifest, open_bundle(whole.folder).manifest
    assert {n: f.sha256 for n, f in ours.files.items() if n != "golden.npz"} == {
        n: f.sha256 for n, f in theirs.files.items() if n != "golden.npz"
    }
    for network, (inputs, reference) in load_golden(built.folder / "golden.npz").items():
        mine = load_golden(whole.folder / "golden.npz")[network]
        assert all(np.array_equal(inputs[k], mine[0][k]) for k in inputs)
        np.testing.assert_allclose(mine[1], reference, rtol=1e-4, atol=1e-5)
    assert ours.base.sha256 == theirs.base.sha256
    assert set(ours.plugged.networks.values()) == {"external weights"}
    assert ours.key != theirs.key and set(ours.to_json()) == {*theirs.to_json(), "plugged"}
    assert max(verify(open_bundle(whole.folder)).values()) < 1e-4
    with pytest.raises(InputError, match="it was plugged, not built"):
        build(BuildSpec(str(tuned), str(micro_guide), out=whole.folder))


def test_a_unet_file_changes_the_unet_alone(unet_only: Built, micro_bundles: Path, tuned_unet: Path) -> None:
    old, new = micro_bundles / "guided", unet_only.folder
    before, after = open_bundle(old).manifest, open_bundle(new).manifest
    changed = {n for n in before.files if before.files[n] != after.files[n]}
    assert changed == {"unet.onnx.data", "golden.npz"}
    assert after.plugged.networks == {
        "unet": "external weights", "text_encoder": "kept", "vae_decoder": "kept"
    }  # fmt: skip
    # ONNX's libraries refuse external data that has a second name
    assert has_single_names(old) and has_single_names(new)
    weights = load_file(tuned_unet)
    maps = json.loads((new / "weights.json").read_text())["networks"]["unet"]["weights"]
    first, second = (ir.load(f / "unet.onnx").graph.initializers for f in (old, new))
    for name, w in maps.items():
        got = second[name].const_value.numpy()
        if w["source"] == "unet":
            assert np.array_equal(got, apply(w["transform"], weights[w["key"]]).numpy()), name
        else:
            assert np.array_equal(got, first[name].const_value.numpy()), name
    assert after.base.sha256["unet"] == sha256(tuned_unet)
    assert after.base.sha256["vae"] == before.base.sha256["vae"]
    assert after.parity.relative_error["unet"] < 1e-4


def has_single_names(folder: Path) -> bool:
    """Whether no file of ``folder`` is a hard link to one elsewhere."""
    return all(p.stat().st_nlink == 1 for p in folder.iterdir())


def test_the_engine_stays_as_it_was(whole: Built, micro_bundles: Path) -> None:
    assert whole.folder.exists()
    assert list_files(micro_bundles / "guided") == open_bundle(micro_bundles / "guided").manifest.files


def test_the_engine_can_be_read_meanwhile(micro_bundles: Path, tuned_unet: Path, tmp_path: Path) -> None:
    """Its files get no second name while it is plugged, which ONNX's libraries would refuse."""
    engine, seen = micro_bundles / "guided", set()

    def watch(what: str, *_: int) -> None:
        assert has_single_names(engine), what
        seen.add(what.split()[0])

    plug(PlugSpec(str(engine), str(tuned_unet), out=tmp_path / "out"), progress=watch)
    assert seen == {"check", "swap", "compare", "compile", "write"}


def test_an_engine_that_is_replaced_meanwhile(micro_bundles: Path, tuned_unet: Path, tmp_path: Path) -> None:
    """The weights that were checked are the ones that are kept."""
    engine = tmp_path / "engine"
    shutil.copytree(micro_bundles / "guided", engine)

    def swap_files(what: str, *_: int) -> None:
        if what.startswith("swap"):
            engine.rename(tmp_path / "gone")
            engine.mkdir()
            (engine / "unet.onnx.data").write_bytes(bytes((tmp_path / "gone" / "unet.onnx.data").stat().st_size))

    made = plug(PlugSpec(str(engine), str(tuned_unet), out=tmp_path / "out"), progress=swap_files)
    sound = plug(PlugSpec(str(micro_bundles / "guided"), str(tuned_unet), out=tmp_path / "sound"))
    assert sha256(made.folder / "unet.onnx.data") == sha256(sound.folder / "unet.onnx.data")


def test_images_are_the_fine_tunes(unet_only: Built, micro_bundles: Path) -> None:
    one, other = (Pipeline.load(f, provider="cpu")("a cat", steps=2)[0].pixels
                  for f in (unet_only.folder, micro_bundles / "guided"))  # fmt: skip
    assert not np.array_equal(one, other)


def test_a_plugged_engine_is_plugged_again(
    unet_only: Built, micro_base: Path, micro_bundles: Path, tmp_path: Path
) -> None:
    """Back to the first weights: the very bytes of the first engine, and commands that make it from nothing."""
    unet = micro_base / "unet" / "diffusion_pytorch_model.safetensors"
    back = plug(PlugSpec(str(unet_only.folder), str(unet), out=tmp_path / "back"))
    assert sha256(back.folder / "unet.onnx.data") == sha256(micro_bundles / "guided" / "unet.onnx.data")
    first, *rest = back.manifest.plugged.commands
    assert first.startswith("pnp-trt build ") and [c.split()[1] for c in rest] == ["plug", "plug"]


def test_a_second_plug_imports_nothing_heavy(unet_only: Built, micro_bundles: Path, tuned_unet: Path) -> None:
    arguments = ["plug", micro_bundles / "guided", "--base", tuned_unet, "--out", unet_only.folder]
    program = (
        "import sys\n"
        f"sys.argv = ['pnp-trt', *{[str(a) for a in arguments]!r}]\n"
        "from pnp_trt.cli import main\n"
        "try: main()\nexcept SystemExit as e: assert not e.code, e.code\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'peft', 'onnx', 'onnx_ir', 'onnxruntime'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "is up to date" in done.stdout


def test_half_precision_with_the_guide_gone(
    half_bundle: Path, tuned_unet: Path, micro_guide: Path, tmp_path: Path
) -> None:
    """The guide is read back from the graph, and comes out as it was but for its rounding."""
    engine = Path(shutil.copytree(half_bundle, tmp_path / "engine"))
    reseal(engine, lambda m: m["given"].update(guide=str(tmp_path / "gone")))
    with_guide = plug(PlugSpec(str(half_bundle), str(tuned_unet), out=tmp_path / "with"))
    without = plug(PlugSpec(str(tmp_path / "engine"), str(tuned_unet), out=tmp_path / "without"))
    assert with_guide.manifest.plugged.guide_read_from == str(micro_guide)
    assert without.manifest.plugged.guide_read_from == "the graph itself"
    assert sha256(with_guide.folder / "unet.onnx.data") == sha256(without.folder / "unet.onnx.data")
    one, other = (load_golden(b.folder / "golden.npz")["unet"][1] for b in (with_guide, without))
    assert 0 < np.linalg.norm(one - other) / np.linalg.norm(one) < 1e-3
    assert 1e-6 < without.manifest.parity.relative_error["unet"] < 5e-3


def test_the_plain_teacher_is_plugged_too(micro_bundles: Path, tuned_unet: Path, tmp_path: Path) -> None:
    made = plug(PlugSpec(str(micro_bundles / "plain"), str(tuned_unet), out=tmp_path / "x")).manifest
    assert made.guide is None and made.plugged.guide_read_from is None
    assert made.parity.relative_error["unet"] < 1e-4


def broken(tuned_unet: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    weights = load_file(tuned_unet)
    change(weights)
    path = folder / "broken.safetensors"
    save_file(weights, path)
    return path


def _rename(w: dict[str, Any]) -> None:
    w["conv_out.wait"] = w.pop("conv_out.weight")
    w["mid_block.extra.bias"] = torch.zeros(1)


def _nan(w: dict[str, Any]) -> None:
    w["mid_block.resnets.0.conv1.bias"][3] = float("nan")


def _huge(w: dict[str, Any]) -> None:
    w["conv_in.bias"][0] = 1e6


def _narrow(w: dict[str, Any]) -> None:
    w["conv_in.bias"] = w["conv_in.bias"][:8].clone()


def _whole_numbers(w: dict[str, Any]) -> None:
    w["conv_in.bias"] = w["conv_in.bias"].to(torch.int8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_rename, r"is not a fine-tune of engine 'half': 1 weight \(conv_out.weight\) missing and 2 weights "
                  r"\(conv_out.wait, mid_block.extra.bias\) left over"),
        (_nan, "the weight unet.mid_block.resnets.0.conv1.bias holds values that are not finite"),
        (_huge, r"the weight unet.conv_in.bias reaches 1.0e\+06, too large for torch.float16"),
        (_narrow, r"conv_in.bias has shape \[8\], not \[16\]"),
        (_whole_numbers, "conv_in.bias has type I8, not floating point"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_one_sentence_and_leave_nothing(
    half_bundle: Path, tuned_unet: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    path = broken(tuned_unet, tmp_path, change)
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match=message):
        plug(PlugSpec(str(half_bundle), str(path), out=tmp_path / "out" / "x"))
    assert [p for p in (tmp_path / "out").iterdir() if p.suffix != ".lock"] == []


def test_files_that_are_no_fine_tunes(cli: Cli, engines: Path, tuned_unet: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(tuned_unet.read_bytes()[:-1000])
    junk = tmp_path / "junk.safetensors"
    junk.write_bytes(b"no weights here, and long enough to be looked at")
    pickled = tmp_path / "pickled.ckpt"
    pickled.write_bytes(b"\x80\x02}")
    for base, message in (
        (cut, "was cut short"),
        (junk, "is not a safetensors file"),
        (pickled, "is a pickle; pickled weights are not read"),
        (tmp_path / "none.safetensors", "no file"),
        ("emoji-round", "no base model 'emoji-round'"),
    ):
        done = cli("plug", "guided", "--base", base, "--out", tmp_path / "x")
        assert done.code == 2 and message in done.err and done.err.count("\n") <= 4, done.err
    assert not (tmp_path / "x").exists()


def test_another_architecture_is_told_by_its_config(micro_bundles: Path, tuned: Path, tmp_path: Path) -> None:
    """The same weights' shapes, and another meaning: the number of heads is in no weight."""
    other = Path(shutil.copytree(tuned / "unet", tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"attention_head_dim": 4}))
    with pytest.raises(InputError, match="config entry attention_head_dim is 4, not 2; build it instead"):
        plug(PlugSpec(str(micro_bundles / "guided"), str(other), out=tmp_path / "x"))
    (other / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "freq_shift"}))
    made = plug(
        PlugSpec(str(micro_bundles / "guided"), str(other), out=tmp_path / "x")
    )  # a default left out is the same
    assert made.manifest.plugged.networks["text_encoder"] == "kept"


def test_a_stale_map_is_caught_and_undone(cli: Cli, half_bundle: Path, tuned_unet: Path, tmp_path: Path) -> None:
    """Two weights of one shape exchanged in weights.json: nothing but parity can tell."""
    folder = Path(shutil.copytree(half_bundle, tmp_path / "half"))
    held = json.loads((folder / "weights.json").read_text())
    weights = held["networks"]["unet"]["weights"]
    q, k = sorted(n for n in weights if ".attn1.to_q" in n or ".attn1.to_k" in n)[:2]
    weights[q]["key"], weights[k]["key"] = weights[k]["key"], weights[q]["key"]
    (folder / "weights.json").write_text(json.dumps(held))
    reseal(folder)
    kept = plug(PlugSpec(str(half_bundle), str(tuned_unet), out=tmp_path / "x"))
    before = list_files(kept.folder)
    done = cli("plug", folder, "--base", tuned_unet, "--out", tmp_path / "x", "--force")
    assert done.code == 1 and "the unet with the weights of" in done.err and "nothing was written" in done.err
    assert list_files(kept.folder) == before and open_bundle(kept.folder).manifest.key == kept.manifest.key
    assert list(tmp_path.glob(".x.partial-*")) == []


def test_a_damaged_engine_is_not_plugged(micro_bundles: Path, tuned_unet: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(micro_bundles / "guided", tmp_path / "guided"))
    data = bytearray((folder / "unet.onnx.data").read_bytes())
    data[-1] ^= 1
    (folder / "unet.onnx.data").write_bytes(data)
    with pytest.raises(
        InputError, match="engine 'guided': unet.onnx.data is corrupt .* rebuild it with: pnp-trt build"
    ):
        plug(PlugSpec(str(folder), str(tuned_unet), out=tmp_path / "x"))
    (folder / "unet.onnx.data").unlink()
    with pytest.raises(InputError, match="unet.onnx.data is corrupt .sha256 missing"):
        plug(PlugSpec(str(folder), str(tuned_unet), out=tmp_path / "x"))
    assert not (tmp_path / "x").exists()


def test_orders_that_cannot_be(cli: Cli, engines: Path, tuned_unet: Path, tmp_path: Path) -> None:
    for arguments, message in (
        (["guided"], "nothing to plug: give --base FINE_TUNE, --lora FILE, --vae AUTOENCODER, or several"),
        (["nope", "--base", tuned_unet], "no engine named 'nope'"),
        (["guided", "--base", tuned_unet, "--out", engines / "guided", "--force"], "is the engine itself"),
        (["guided", "--base", tuned_unet, "--out", engines / "plain"], "it was built, not plugged"),
    ):
        done = cli("plug", *arguments)
        assert done.code == 2 and message in done.err, done.err


def test_a_bundle_of_before_says_to_be_rebuilt(micro_bundles: Path, tuned_unet: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(micro_bundles / "plain", tmp_path / "plain"))
    reseal(folder, lambda m: m.pop("configs"))
    with pytest.raises(InputError, match="was built before engines could be plugged; rebuild it with: pnp-trt build"):
        plug(PlugSpec(str(folder), str(tuned_unet)))


def test_end_to_end(cli: Cli, engines: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command, the name that it gives, and that the rest of the program takes the bundle."""
    home = Path(shutil.copytree(engines, tmp_path / "engines"))
    monkeypatch.setenv("PNP_TRT_ENGINES", str(home))
    done = cli("plug", "guided", "--base", tuned)
    assert done.code == 0, done.err
    name = "tuned-guide"
    assert f"{home / name} plugged in" in done.out and "unet: external weights" in done.out
    assert "is up to date" in cli("plug", "guided", "--base", tuned).out
    assert cli("verify", name).code == 0
    assert "plugged into" in cli("inspect", name).out
    drawn = cli("sample", "a cat", "--engine", name, "--steps", "2", "--out", tmp_path / "s", "-q")
    assert drawn.code == 0 and Path(drawn.out.strip()).is_file()
    again = cli(*read_manifest(home / name).rebuild.split()[1:], "--force")  # the command that the manifest gives
    assert again.code == 0 and "plugged in" in again.out, again.err


def test_a_full_disk_leaves_nothing(
    micro_bundles: Path, tuned_unet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pnp_trt.build.swap.rewrite.apply", full)
    with pytest.raises(PnpError, match=r"could not be made \(No space left on device\); nothing was written"):
        plug(PlugSpec(str(micro_bundles / "guided"), str(tuned_unet), out=tmp_path / "x"))
    assert [p for p in tmp_path.iterdir() if p.suffix != ".lock"] == []


def test_the_base_is_what_the_manifest_says(micro_base: Path, micro_bundles: Path) -> None:
    manifest = read_manifest(micro_bundles / "guided")
    base = resolve(str(micro_base))
    assert manifest.configs["unet"] == base.config("unet") and manifest.given.base == str(micro_base)
    assert manifest.configs["guide"]["_class_name"] == "TinyGuide"
