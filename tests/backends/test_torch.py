"""The torch backend: bundles of safetensors and configs, run eagerly or compiled, on the CPU."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pnp_trt import backends
from pnp_trt.backends.base import LoadOptions
from pnp_trt.build import modules
from pnp_trt.build.builder import build
from pnp_trt.build.spec import BuildSpec
from pnp_trt.bundle.store import open_bundle, read_manifest, sha256
from pnp_trt.errors import InputError, PnpError
from pnp_trt.models.guides import GUIDES
from pnp_trt.models.rebuild import rebuild
from pnp_trt.models.student import Student, Teacher
from pnp_trt.precision.recipes import convert, recipe
from pnp_trt.runtime.pipeline import Pipeline
from pnp_trt.runtime.verify import load_golden, verify

from ..bundles import reseal
from ..conftest import Result
from ..models.test_guides import stirred
from ..models.test_student import example, small_unet

Cli = Callable[..., Result]
CPU = LoadOptions("cpu")


@pytest.fixture(scope="module")
def eager(micro_base: Path, micro_guide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An eager float32 bundle of the micro student; do not write into it."""
    out = tmp_path_factory.mktemp("torch") / "eager"
    build(BuildSpec(str(micro_base), str(micro_guide), backend="torch", out=out))
    return out


@pytest.fixture(scope="module")
def compiled(eager: Path, micro_base: Path, micro_guide: Path) -> Path:
    """The same for ``torch.compile``, compared when it was built; its graphs are captured, no C++ is compiled."""
    out = eager.parent / "compiled"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
        build(BuildSpec(str(micro_base), str(micro_guide), backend="torch", target="compile", out=out))
    return out


def test_from_build_to_images(cli: Cli, micro_base: Path, micro_guide: Path, tmp_path: Path) -> None:
    out = tmp_path / "e"
    words = ("--base", micro_base, "--guide", micro_guide, "--backend", "torch", "--precision", "fp16", "--out", out)
    done = cli("build", *words)
    assert done.code == 0 and "fp16, torch for eager, parity with PyTorch" in done.out, done.err
    assert "is up to date" in cli("build", *words).out
    shown = cli("inspect", out).out
    assert "unet.safetensors" in shown and "eager" in shown and "cannot run here" not in shown
    done = cli("verify", out, "--provider", "cpu")
    assert done.code == 0 and done.out.count("limit 5e-03, fp16") == 3, done.err
    done = cli("sample", "a cat", "--engine", out, "--steps", 2, "--provider", "cpu", "--out", tmp_path / "images")
    assert done.code == 0 and (tmp_path / "images" / "a-cat-0.png").is_file(), done.err
    done = cli("bench", "--engine", out, "--only", "latency", "--batch", 1, "--steps", 1, "--rounds", 1, "--no-memory",
               "--cold-starts", 0, "--json", tmp_path / "bench.json")  # fmt: skip
    assert done.code == 0, done.err
    (row,) = json.loads((tmp_path / "bench.json").read_text())["latency"]
    assert row["engine"] == "e" and row["method"] == "guided"


def test_a_bundle_holds_numbers_and_no_code(eager: Path) -> None:
    assert {p.suffix for p in eager.iterdir()} == {".json", ".safetensors", ".npz"}
    manifest = read_manifest(eager)
    assert {"unet.safetensors", "unet.json"} <= manifest.files.keys()
    described = json.loads((eager / "unet.json").read_text())
    assert [p["class"] for p in described["parts"].values()] == ["UNet2DConditionModel", "TinyGuide"]
    # the map of weights is as a graph's: every weight of the file, by source and key
    named = json.loads((eager / "weights.json").read_text())["networks"]["unet"]["weights"]
    assert named["unet.conv_in.weight"] == {
        "source": "unet", "key": "conv_in.weight", "transform": [{"op": "cast", "to": "float32"}]
    }  # fmt: skip
    assert (eager / "unet.safetensors").stat().st_mode == (eager / "unet.json").stat().st_mode


def test_equal_inputs_give_equal_files(eager: Path, micro_base: Path, micro_guide: Path, tmp_path: Path) -> None:
    build(BuildSpec(str(micro_base), str(micro_guide), backend="torch", out=tmp_path / "again"))
    for name in read_manifest(eager).files:
        assert sha256(eager / name) == sha256(tmp_path / "again" / name), name


def test_it_draws_what_onnx_runtime_draws(eager: Path, micro_bundles: Path) -> None:
    a, b = (Pipeline.load(f, provider="cpu") for f in (eager, micro_bundles / "guided"))
    request: dict[str, Any] = {"steps": 4, "seed": [1, 2], "guidance": [2.0, 6.0]}
    for one, other in zip(a(["a cat", "a dog"], **request), b(["a cat", "a dog"], **request), strict=True):
        assert np.abs(one.pixels.astype(int) - other.pixels).max() <= 1


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_is_off_and_within_the_limit(precision: str, micro_base: Path, tmp_path: Path) -> None:
    built = build(BuildSpec(str(micro_base), "none", backend="torch", precision=precision, out=tmp_path / "e"))
    limit = recipe(precision).limit
    for errors in (built.manifest.parity.relative_error, built.manifest.parity.engine):
        assert 1e-5 < errors["unet"] < limit
    assert Pipeline.load(tmp_path / "e").methods == ("cfg", "unguided")


def test_whole_networks_are_captured_and_compared(compiled: Path) -> None:
    manifest = read_manifest(compiled)
    assert manifest.target == "compile" and max(manifest.parity.engine.values()) < 1e-4


def test_compiled_code_runs_from_any_thread(compiled: Path) -> None:
    bundle = open_bundle(compiled)
    backend = backends.get("torch")
    network = backend.load(bundle.file("vae_decoder"), bundle.manifest.networks["vae_decoder"], CPU)
    inputs, reference = load_golden(compiled / "golden.npz")["vae_decoder"]
    with ThreadPoolExecutor(2) as pool:
        for out in pool.map(lambda i: network(latents=inputs["latents"][i : i + 1]), (0, 1)):
            assert np.abs(out - reference).min(axis=0).max() < 1e-4  # one of the two


def test_no_cpp_compiler_is_said_before_anything_is_loaded(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(InputError, match=r"cannot run here: torch.compile needs a C\+\+ compiler, .* --target eager"):
        Pipeline.load(compiled)


def test_a_server_without_torch_is_told_what_to_install(eager: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else found(name))
    with pytest.raises(InputError, match=r"backend 'torch' needs torch; install with: pip install 'pnp-trt\[build\]'"):
        Pipeline.load(eager)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "sm_89"], "target is 'sm_89'; backend 'torch' takes: eager, compile"),
        (["--refittable"], "--refittable is for TensorRT"),
        (["--profile", "b4"], "takes any batch size up to 32; omit --profile"),
    ],
)
def test_bad_orders_are_refused(cli: Cli, tmp_path: Path, arguments: list[str], message: str) -> None:
    done = cli("build", "--backend", "torch", "--out", tmp_path / "x", *arguments)
    assert done.code == 2 and message in done.err and not (tmp_path / "x").exists()


def test_wrong_inputs_name_the_right_ones(eager: Path) -> None:
    bundle = open_bundle(eager)
    network = backends.get("torch").load(bundle.file("unet"), bundle.manifest.networks["unet"], CPU)
    with network.bind(2) as bound:
        with pytest.raises(InputError, match="no input 'latent'; its inputs: sample, timestep"):
            bound.write(latent=np.zeros(2))
        with pytest.raises(InputError, match=r"input 'sample' has shape \[1, 4, 8, 8\]; the network takes \[2, 4"):
            bound.write(sample=np.zeros((1, 4, 8, 8), np.float32))
    with pytest.raises(InputError, match="the batch is 0"), network.bind(0):
        pass
    with pytest.raises(InputError, match="provider is 'tpu'; known: auto, cpu, cuda"):
        Pipeline.load(eager, provider="tpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_cuda_without_a_gpu_is_refused(eager: Path) -> None:
    with pytest.raises(InputError, match="provider 'cuda' was requested, but torch .* finds no GPU"):
        verify(open_bundle(eager), LoadOptions("cuda"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.gpu
@pytest.mark.parametrize("which", ["eager", "compiled"])
def test_on_a_gpu(which: str, eager: Path, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(which)
    assert max(verify(open_bundle(folder), LoadOptions("cuda")).values()) < 1e-4
    on_gpu, on_cpu = (  # eager on the CPU, where compiling would take minutes
        Pipeline.load(f, provider=p)("a cat", steps=4)[0].pixels.astype(int)
        for f, p in ((folder, "cuda"), (eager, "cpu"))
    )
    assert np.abs(on_gpu - on_cpu).max() <= 2


def test_a_description_of_something_else_is_refused(eager: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(eager, tmp_path / "e"))
    described = json.loads((copy / "unet.json").read_text())
    described["parts"]["unet"]["class"] = "os.system"
    (copy / "unet.json").write_text(json.dumps(described))
    reseal(copy)  # sealed again: only the names of the classes are left to refuse it
    with pytest.raises(InputError, match=r"unet.json names the class 'os.system'; known: UNet2DConditionModel"):
        Pipeline.load(copy)


def test_a_full_disk_is_a_sentence(eager: Path, micro_base: Path, tmp_path: Path,
                                   monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    import safetensors.torch
    from safetensors import SafetensorError

    def full(*_: Any) -> None:
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(PnpError, match=r"could not be made \(I/O error: No space left.*nothing was written"):
        build(BuildSpec(str(micro_base), "none", backend="torch", out=tmp_path / "full"))
    assert not (tmp_path / "full").exists()


@settings(max_examples=6)
@given(
    kind=st.sampled_from(["none", "tiny", "full"]),
    precision=st.sampled_from(["fp32", "fp16", "bf16"]),
    negative=st.booleans(),
    deep=st.booleans(),
)
@torch.no_grad()
def test_what_was_saved_is_made_again(
    kind: str, precision: str, negative: bool, deep: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    unet = small_unet(layers_per_block=2 if deep else 1)
    x, t, text = example()
    inputs = {"sample": x, "timestep": t, "encoder_hidden_states": text}
    if kind == "none":
        module: torch.nn.Module = Teacher(unet)
    else:
        small = {"rank": 4, "embed_dim": 8} if kind == "tiny" else {}
        module = Student(unet, stirred(GUIDES[kind].from_unet(unet, negative_prompts=negative, **small)))
        inputs |= {"guidance": torch.tensor([2.0, 3.0, 7.0]), "negative": text.roll(1, 0)}
    convert(module, recipe(precision))
    path = tmp_path_factory.mktemp("made") / "unet.json"
    modules.save(module, path)
    again = convert(rebuild(path, path.with_suffix(".safetensors")), recipe(precision))
    for (name, held), (_, made) in zip(module.state_dict().items(), again.state_dict().items(), strict=True):
        assert held.dtype == made.dtype and torch.equal(held, made), name
    a, b = again(**inputs), module(**inputs)  # kernels may differ with where a weight lies in memory
    assert (a - b).norm() / b.norm() < (1e-5 if precision == "fp32" else 2e-2)
