"""TensorRT-RTX engines compiled for real, without a GPU, and the errors where a GPU is needed."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import psutil
import pytest
import torch
from torch import nn

from benchmarks.realsize import record
from pnp_trt import backends
from pnp_trt.backends.base import CompileJob, Profile
from pnp_trt.backends.gpus import Gpu, present_gpus
from pnp_trt.backends.tensorrt import backend as module
from pnp_trt.backends.tensorrt import flavour as flavours
from pnp_trt.backends.tensorrt.compile import _allow_decomposition
from pnp_trt.backends.tensorrt.flavour import RTX
from pnp_trt.backends.tensorrt.refit import refit_network
from pnp_trt.build.builder import build
from pnp_trt.build.onnx_export import export
from pnp_trt.build.spec import BuildSpec
from pnp_trt.build.swap.run import PlugSpec, plug
from pnp_trt.bundle import memory
from pnp_trt.bundle.compile_options import CompileOptions
from pnp_trt.bundle.store import open_bundle
from pnp_trt.errors import InputError, PnpError
from pnp_trt.precision.recipes import RECIPES, convert
from pnp_trt.runtime.pipeline import Pipeline
from pnp_trt.runtime.verify import verify

from ..bundles import reseal
from ..conftest import make_micro_base

pytest.importorskip("tensorrt_rtx")
ADA, AMPERE, HOPPER = Gpu("GeForce RTX 4090", "sm_89"), Gpu("GeForce RTX 3080", "sm_86"), Gpu("H100", "sm_90")


class Attend(nn.Module):
    """Attention of two heads after a group norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.GroupNorm(2, 64)
        self.qkv = nn.Linear(64, 192)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        q, k, v = (part.view(x.shape[0], 16, 2, 32).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return out.transpose(1, 2).reshape(x.shape[0], 16, 64)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, CompileJob]:
    """Compile jobs of a small network, by precision."""
    out = {}
    for name in ("fp32", "fp16", "bf16"):
        path = tmp_path_factory.mktemp("graph") / f"{name}.onnx"
        export(convert(Attend(), RECIPES[name]), {"x": torch.zeros(2, 16, 64)}, "y", path)
        inputs = {"x": ("float32", ("batch", 16, 64))}
        out[name] = CompileJob("unet", path, inputs, name, "sm_89", (Profile("b1", 1, 1, 1), Profile.parse("b2-8")))
    return out


def rtx() -> module.TensorRtRtx:
    backend = backends.get("tensorrt-rtx")
    assert isinstance(backend, module.TensorRtRtx)
    return backend


@pytest.mark.parametrize(
    ("precision", "target"),
    [("fp16", "sm_75"), ("fp16", "sm_86"), ("bf16", "sm_120"), ("fp32", "portable"), ("fp32", "sm_89")],
)
def test_an_engine_is_compiled(jobs: dict[str, CompileJob], precision: str, target: str) -> None:
    seen: list[tuple[str, int, int]] = []
    compiled = rtx().compile(replace(jobs[precision], target=target), lambda *at: seen.append(at))
    engine = jobs[precision].graph.with_name(compiled.file)
    assert engine.suffix == ".engine" and engine.stat().st_size > 10_000
    assert compiled.peak_memory is not None and 50 << 20 < compiled.peak_memory < 2 << 30
    # attention in float32 has no fused kernel, so it must be decomposable
    assert compiled.notes["decomposable_attention"] == 1
    assert seen and all(0 <= done <= total for _, done, total in seen)


class OneHead(nn.Module):
    """The attention of Stable Diffusion's autoencoder: one head of size 512, for which no fused kernel exists."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(512, 512) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.q(x)[:, None], self.k(x)[:, None], self.v(x)[:, None]
        return x + self.out(nn.functional.scaled_dot_product_attention(q, k, v)[:, 0])


def test_a_head_of_512_is_decomposed(tmp_path: Path) -> None:
    """TensorRT-RTX 1.7.1 cannot compile this graph unless the attention is decomposable."""
    path = tmp_path / "vae.onnx"
    export(convert(OneHead(), RECIPES["fp16"]), {"x": torch.zeros(2, 16, 512)}, "y", path)
    job = CompileJob(
        "vae_decoder", path, {"x": ("float32", ("batch", 16, 512))}, "fp16", "sm_89", (Profile("b1", 1, 1, 1),)
    )
    assert rtx().compile(job, lambda *_: None).notes["decomposable_attention"] == 1


def test_tensor_float32_is_used_only_if_the_job_allows_it(jobs: dict[str, CompileJob]) -> None:
    for allowed in (True, False):
        compiled = rtx().compile(replace(jobs["fp32"], tensor_float32=allowed), lambda *_: None)
        assert compiled.notes["tensor_float32"] is allowed


@pytest.mark.parametrize("dtype", ["float32", "half", "bfloat16"])
def test_every_attention_is_marked_decomposable(dtype: str) -> None:
    """On a fake network, because plain TensorRT compiles only with a GPU."""
    attentions = [SimpleNamespace(get_input=lambda i: SimpleNamespace(dtype=dtype), decomposable=False) for _ in "ab"]

    class Layer:
        def __init__(self, kind: str, attention: Any = None) -> None:
            self.type, self.attention = kind, attention

    class AttentionLayer(Layer):
        pass

    layers = [Layer("input", attentions[0]), Layer("conv"), Layer("input", attentions[1])]
    api = SimpleNamespace(
        LayerType=SimpleNamespace(ATTENTION_INPUT="input"), IAttentionInputLayer=AttentionLayer, float32="float32"
    )
    network = SimpleNamespace(num_layers=3, get_layer=lambda i: layers[i])
    assert _allow_decomposition(api, network) == 2 and all(a.decomposable for a in attentions)


@pytest.mark.parametrize(
    ("backend", "found", "accepted"),
    [
        ("tensorrt", "10.13.3.9", False), ("tensorrt", "10.14.1.48", False), ("tensorrt", "9.3.0", False),
        ("tensorrt", "10.15.1.29", True), ("tensorrt", "11.0.0.1", True),
        ("tensorrt-rtx", "1.4.0.76", False), ("tensorrt-rtx", "1.5.0.114", True),
    ],
)  # fmt: skip
def test_unsupported_releases_are_refused_before_the_export(
    backend: str, found: str, accepted: bool, micro_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flavours.importlib.metadata, "version", lambda name: found)
    monkeypatch.setattr(module, "present_gpus", lambda: [ADA])
    monkeypatch.setattr("pnp_trt.build.builder.Build.run", lambda *_: pytest.fail("the work began"))
    if accepted:
        assert set(backends.get(backend).versions().values()) == {found}
        return
    oldest = "10.15" if backend == "tensorrt" else "1.5"
    with pytest.raises(InputError, match=rf"is {found}, but backend '{backend}' needs {oldest} or later: .*--upgrade"):
        build(BuildSpec(str(micro_base), "none", backend, "fp16", tmp_path / "x"))


def test_a_graph_that_cannot_be_parsed_is_reported_in_one_sentence(jobs: dict[str, CompileJob], tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"this is not a graph")
    with pytest.raises(PnpError, match=r"bad.onnx cannot be parsed by tensorrt_rtx 1\."):
        rtx().compile(replace(jobs["fp16"], graph=tmp_path / "bad.onnx"), lambda *_: None)


def test_a_killed_compiler_is_reported_with_its_signal(jobs: dict[str, CompileJob]) -> None:
    def kill(*_: object) -> None:
        for child in psutil.Process().children():
            if "tensorrt.compile" in " ".join(child.cmdline()):
                child.kill()

    with pytest.raises(PnpError, match="compiler of the unet was killed by signal 9, most likely for lack of memory"):
        rtx().compile(jobs["fp16"], kill)


def test_the_compiler_dies_with_its_caller(jobs: dict[str, CompileJob], tmp_path: Path) -> None:
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom pnp_trt.backends.tensorrt.backend import TensorRtRtx\n"
        "from pnp_trt.backends.base import CompileJob, Profile\n"
        f"graph, inputs = Path({str(jobs['fp16'].graph)!r}), {{'x': ('float32', ('batch', 16, 64))}}\n"
        "job = CompileJob('unet', graph, inputs, 'fp16',\n"
        "                 'sm_89', (Profile('b1', 1, 1, 1),))\n"
        "TensorRtRtx().compile(job, lambda *_: (print('started', flush=True), time.sleep(60)))\n"
    )
    caller = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert caller.stdout is not None and caller.stdout.readline() == b"started\n"
    (child,) = psutil.Process(caller.pid).children()
    os.kill(caller.pid, signal.SIGKILL)
    caller.stdout.close()
    caller.wait()
    _, alive = psutil.wait_procs([child], timeout=600)
    assert not alive


def test_too_little_memory_is_reported_before_compiling(
    jobs: dict[str, CompileJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free", lambda: 100 << 20)
    monkeypatch.setattr(module, "_in_own_process", lambda *_: pytest.fail("it was started"))
    with pytest.raises(InputError, match="needs about 0.6 GiB of memory and 0.1 GiB are free; .*--no-memory-check"):
        rtx().compile(jobs["fp16"], lambda *_: None)
    monkeypatch.setattr(module, "_in_own_process", lambda *_: {"seconds": 1.0, "peak_memory": None})
    rtx().compile(replace(jobs["fp16"], options=CompileOptions(check_memory=False)), lambda *_: None)


@pytest.mark.parametrize(
    ("backend", "target", "precision", "options", "message"),
    [
        ("tensorrt-rtx", "sm_90", "fp16", {}, "target is 'sm_90'; tensorrt-rtx compiles for: portable, sm_75"),
        ("tensorrt-rtx", "sm_75", "bf16", {}, "sm_75 has no bfloat16"),
        ("tensorrt-rtx", None, "fp16", {"version_compatible": True}, "--version-compatible is for backend 'tensorrt'"),
        ("tensorrt-rtx", None, "fp16", {"refittable": True}, "--refittable was requested, but there is no GPU here"),
        ("tensorrt", None, "fp16", {}, "only for the GPU in this machine, but no NVIDIA driver or GPU was found"),
        ("onnxruntime", "sm_89", "fp32", {}, "an onnxruntime bundle runs on any machine"),
    ],
)  # fmt: skip
def test_impossible_options_are_refused(
    monkeypatch: pytest.MonkeyPatch, backend: str, target: str | None, precision: str, options: dict, message: str
) -> None:
    monkeypatch.setattr(module, "present_gpus", list)
    with pytest.raises(InputError, match=message):
        backends.get(backend).resolve_target(target, precision, CompileOptions(**options))


def test_tensorrt_compiles_only_for_the_present_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "present_gpus", lambda: [HOPPER])
    backend = backends.get("tensorrt")
    assert backend.resolve_target(None, "fp16", CompileOptions()) == "sm_90"
    with pytest.raises(InputError, match="target is 'sm_89' and the GPU here is sm_90 \\(H100\\)"):
        backend.resolve_target("sm_89", "fp16", CompileOptions())


@pytest.mark.parametrize("text", ["8", "b0", "b9-2", "b64", "b", "b1-8-9"])
def test_invalid_profiles_are_refused(text: str) -> None:
    with pytest.raises(InputError, match=f"profile is '{text}'; write b1 .* at most 32"):
        Profile.parse(text)


@pytest.fixture(scope="module")
def bundle(micro_base: Path, micro_guide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The micro student as a TensorRT-RTX bundle; do not write into it."""
    out = tmp_path_factory.mktemp("rtx") / "micro"
    spec = BuildSpec(str(micro_base), str(micro_guide), "tensorrt-rtx", "fp16", out, "sm_89", ("b1", "b2-4"))
    assert not build(spec).cached
    return out


def test_the_manifest_records_target_and_profiles(bundle: Path) -> None:
    m = open_bundle(bundle).manifest
    assert (m.backend, m.target, m.precision) == ("tensorrt-rtx", "sm_89", "fp16")
    assert m.compiler == {"tensorrt-rtx": RTX.version()}
    assert [p.name for p in m.profiles] == ["b1", "b2-4"] and m.sample.max_batch == 4
    assert [p.maximum for p in m.networks["unet"].profiles] == [1, 4]
    assert [p.maximum for p in m.networks["text_encoder"].profiles] == [1]
    assert {n.file for n in m.networks.values()} <= set(m.files)
    assert m.peak_memory.compile > 0 and m.build_seconds > 0
    assert str(m.parity.engine).startswith("not measured: no NVIDIA driver") or present_gpus()
    assert "--target sm_89 --profile b1 --profile b2-4" in m.rebuild


@pytest.mark.slow
def test_longer_prompts_get_separate_profiles(micro_base: Path, micro_guide: Path, tmp_path: Path) -> None:
    """The compiler reports each profile; only the static one has a size of its activations."""
    spec = BuildSpec(
        str(micro_base), str(micro_guide), "tensorrt-rtx", "fp16", tmp_path / "long", "sm_89", ("b1",), tokens=231
    )
    m = build(spec).manifest
    unet, text = m.networks["unet"], m.networks["text_encoder"]
    assert [(p.name, p.tokens) for p in unet.profiles] == [
        ("b1 of 77 tokens", (77, 77, 77)), ("b1 of 154-231 tokens", (154, 154, 231)),
    ]  # fmt: skip
    assert [p.name for p in m.profiles] == [p.name for p in text.profiles] == ["b1"] and m.text.chunks == 3
    assert unet.inputs["encoder_hidden_states"][1] == ("batch", "tokens", 32)
    graph = onnx.load(tmp_path / "long" / unet.graph, load_external_data=False)
    states = next(i for i in graph.graph.input if i.name == "encoder_hidden_states").type.tensor_type.shape.dim
    assert states[1].dim_param == "tokens" and states[2].dim_value == 32
    one, more = unet.compiled.notes["reports"]
    assert one["activation_bytes"] > 0 and more["activation_bytes"] is None  # its number of tokens is open
    assert list(unet.parity.sizes) == ["32x32", "231 tokens"] and max(unet.parity.sizes.values()) < unet.parity.limit
    assert open_bundle(tmp_path / "long").manifest.networks["unet"].profiles == unet.profiles
    assert build(spec).cached and "--tokens 231" in m.rebuild


def test_a_build_is_recorded_for_the_results(bundle: Path) -> None:
    row = record(bundle, ["python", "-m", "benchmarks.realsize"])
    unet = row["networks"]["unet"]
    assert unet["engine_bytes"] == (bundle / "unet.engine").stat().st_size
    assert unet["graph_bytes"] == sum((bundle / f"unet.onnx{end}").stat().st_size for end in ("", ".data"))
    assert unet["graph_parity"] < unet["parity_limit"] and row["case"]["target"] == "sm_89"
    assert row["build_seconds"] >= row["compile_seconds"] > 0 and row["peak_memory_bytes"]["compile"] > 0


def test_a_second_build_imports_nothing_heavy(bundle: Path, micro_base: Path, micro_guide: Path) -> None:
    arguments = ["build", "--base", micro_base, "--guide", micro_guide, "--backend", "tensorrt-rtx", "--precision",
                 "fp16", "--target", "sm_89", "--profile", "b1", "--profile", "b2-4", "--out", bundle]  # fmt: skip
    program = (
        "import sys\n"
        f"sys.argv = ['pnp-trt', *{[str(a) for a in arguments]!r}]\n"
        "from pnp_trt.cli import main\n"
        "try: main()\nexcept SystemExit as e: assert not e.code, e.code\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'onnx', 'onnxruntime', 'tensorrt_rtx'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "is up to date" in done.stdout


@pytest.mark.parametrize(
    ("gpus", "version", "message"),
    [
        ([], None, "its target is sm_89, but no NVIDIA driver or GPU was found here; .*--backend onnxruntime"),
        ([AMPERE], None, r"its target is sm_89, but the GPU here is sm_86 \(GeForce RTX 3080\); .*--target sm_86"),
        ([HOPPER], None, r"its target is sm_89, but the GPU here is sm_90 \(H100\); .*--backend tensorrt( |$)"),
        ([ADA], "1.6.0.5", r"compiled with tensorrt-rtx 1.6.0.5, but 1\..* is installed; rebuild it with: pnp-trt "),
    ],
)
def test_an_incompatible_engine_is_refused_before_it_is_loaded(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: list[Gpu], version: str | None, message: str
) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    if version:
        reseal(copy, lambda m: m["compiler"].update({"tensorrt-rtx": version}))
    monkeypatch.setattr(module, "present_gpus", lambda: gpus)
    monkeypatch.setattr(module.TensorRtBackend, "load", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(InputError, match=message):
        Pipeline.load(copy)


def test_which_gpus_an_engine_runs_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def allowed(gpu: Gpu, target: str, **options: bool) -> bool:
        monkeypatch.setattr(module, "present_gpus", lambda: [gpu])
        return rtx().cannot_run(target, CompileOptions(**options)) is None

    assert allowed(ADA, "sm_89") and allowed(ADA, "portable") and allowed(AMPERE, "portable")
    assert not allowed(AMPERE, "sm_89") and not allowed(HOPPER, "portable")
    assert not allowed(Gpu("GeForce RTX 2080", "sm_75"), "portable")
    assert allowed(HOPPER, "sm_80", hardware_compatible=True)
    assert not allowed(AMPERE, "sm_89", hardware_compatible=True)


def test_a_portable_engine_that_cannot_run_here_causes_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    turing = Gpu("GeForce RTX 2080", "sm_75")
    for gpu, advice in ((HOPPER, "use --backend tensorrt$"), (turing, "add --target sm_75$")):
        monkeypatch.setattr(module, "present_gpus", lambda gpu=gpu: [gpu])
        with pytest.warns(UserWarning, match=f"will not run on the GPU here, which is {gpu.sm} .*; .*{advice}"):
            assert rtx().resolve_target(None, "fp16", CompileOptions()) == "portable"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rtx().resolve_target("sm_89", "fp16", CompileOptions()) == "sm_89"  # explicit, so no warning
        monkeypatch.setattr(module, "present_gpus", lambda: [ADA])
        assert rtx().resolve_target(None, "fp16", CompileOptions()) == "portable"


def test_later_releases_may_load_version_compatible_engines() -> None:
    assert module._later("11.4.0.106", "11.1.0.5") and module._later("11.4.0.106", "11.4.0.106")
    assert not module._later("11.1.0.5", "11.4.0.106") and not module._later("12.0.0.1", "11.4.0.106")


@pytest.mark.skipif(bool(present_gpus()), reason="states what is said where no GPU is")
def test_running_without_a_gpu_is_refused_in_one_sentence(bundle: Path) -> None:
    opened = open_bundle(bundle)
    with pytest.raises(InputError, match="needs an NVIDIA GPU, but CUDA found none .*onnxruntime"):
        from pnp_trt.backends.tensorrt.network import TrtNetwork

        TrtNetwork(RTX, opened.file("unet"), opened.manifest.networks["unet"])
    with pytest.raises(InputError, match="no NVIDIA driver or GPU was found here"):
        verify(opened)


@pytest.mark.gpu
@pytest.mark.skipif(not present_gpus() or present_gpus()[0].sm not in RTX.targets, reason="needs an RTX GPU")
def test_an_engine_matches_pytorch(micro_base: Path, micro_guide: Path, tmp_path: Path) -> None:
    target = present_gpus()[0].sm
    built = build(BuildSpec(str(micro_base), str(micro_guide), "tensorrt-rtx", "fp16", tmp_path / "x", target))
    errors: Any = built.manifest.parity.engine
    assert all(e < 5e-3 for e in errors.values())
    assert len(Pipeline.load(tmp_path / "x")(["a cat"] * 3, steps=2)) == 3


def test_timing_caches_are_keyed_by_device_and_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PNP_TRT_CACHE", str(tmp_path))
    monkeypatch.setattr(module, "present_gpus", lambda: [HOPPER])
    backend = module.TensorRt()
    monkeypatch.setattr(type(backend.flavour), "version", lambda self: "11.4.0.106")
    assert backend._timing_cache() == str(tmp_path / "timing" / "11.4.0.106-sm_90-h100.cache")
    assert rtx()._timing_cache() is None  # its timing cache would need a GPU


def test_a_fine_tune_is_compiled_again_without_a_gpu(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "present_gpus", list)
    unet = make_micro_base(tmp_path / "tuned", seed=5) / "unet"
    m = plug(PlugSpec(str(bundle), str(unet), out=tmp_path / "x")).manifest
    before, after = open_bundle(bundle).manifest.files, open_bundle(tmp_path / "x").manifest.files
    assert {n for n in before if before[n] != after[n]} == {"unet.onnx.data", "unet.engine", "golden.npz"}
    assert m.plugged.networks == {
        "unet": "compiled again: the engine was not built with --refittable",
        "text_encoder": "kept", "vae_decoder": "kept",
    }  # fmt: skip
    # the advice builds an engine for this machine from the start
    with pytest.raises(InputError, match="make one for this machine with: pnp-trt build .* && pnp-trt plug ") as e:
        Pipeline.load(tmp_path / "x")
    build_line, plug_line = str(e.value).split("with: ")[1].split(" && ")
    assert "--backend onnxruntime" in build_line and "--target" not in build_line and "--profile" not in build_line
    assert build_line.endswith(f"--out {bundle}-here") and plug_line.startswith(f"pnp-trt plug {bundle}-here --base ")
    assert plug_line.endswith(f"--out {tmp_path / 'x'}-here")


def refit_api(calls: list[Any], missing: tuple[str, ...] = (), parsed: bool = True, refitted: bool = True) -> Any:
    """Return a fake of the TensorRT API that a refit uses, as documented; ``calls`` logs its use."""

    class Engine:
        refittable = True

        def create_serialization_config(self) -> Any:
            flags = SimpleNamespace()
            flags.set_flag = lambda f: calls.append(("set", f)) or True
            flags.clear_flag = lambda f: calls.append(("clear", f)) or True
            return flags

        def serialize_with_config(self, config: Any) -> bytes:
            return b"the refitted plan"

    class Refitter:
        def __init__(self, engine: Engine, logger: Any) -> None:
            calls.append("refitter")

        def get_missing_weights(self) -> list[str]:
            return list(missing)

        def get_all_weights(self) -> list[str]:
            return ["a", "b"]

        def refit_cuda_engine(self) -> bool:
            calls.append("refit")
            return refitted

    class Parser:
        num_errors = 1

        def __init__(self, refitter: Refitter, logger: Any) -> None:
            pass

        def refit_from_file(self, graph: str) -> bool:
            calls.append(Path(graph).name)
            return parsed

        def get_error(self, i: int) -> Any:
            return SimpleNamespace(desc=lambda: "no such weights")

    severity = SimpleNamespace(ERROR=1, INTERNAL_ERROR=0, WARNING=2)
    return SimpleNamespace(
        ILogger=type("ILogger", (), {"Severity": severity}), Refitter=Refitter, OnnxParserRefitter=Parser,
        Runtime=lambda _: SimpleNamespace(deserialize_cuda_engine=lambda plan: Engine() if plan == b"old" else None),
        SerializationFlag=SimpleNamespace(EXCLUDE_WEIGHTS="weights", INCLUDE_REFIT="refit"),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("api", "message"),
    [
        ({}, None),
        ({"parsed": False}, "could not refit old.engine from unet.onnx: no such weights"),
        (
            {"missing": ("conv_in.weight",)},
            "refitting old.engine would leave 1 weights stale, for example conv_in.weight",
        ),
        ({"refitted": False}, "could not refit old.engine"),
    ],
)
def test_a_refit_replaces_every_weight_or_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, api: dict[str, Any], message: str | None
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(type(RTX), "load", lambda self: refit_api(calls, **api))
    (tmp_path / "old.engine").write_bytes(b"old")
    job = {"flavour": "tensorrt-rtx", "graph": str(tmp_path / "unet.onnx"), "engine": str(tmp_path / "unet.engine"),
           "refit": str(tmp_path / "old.engine"), "options": {"version_compatible": False},
           "tensor_float32": False}  # fmt: skip
    if message is not None:
        with pytest.raises(PnpError, match=message):
            refit_network(job, lambda *_: None)
        assert not (tmp_path / "unet.engine").exists()
        return
    assert refit_network(job, lambda *_: None)["refitted"] == 2
    assert (tmp_path / "unet.engine").read_bytes() == b"the refitted plan"
    assert calls == ["refitter", "unet.onnx", "refit", ("clear", "weights"), ("set", "refit")]


def test_the_installed_api_has_the_names_that_a_refit_uses() -> None:
    import tensorrt_rtx as trt

    for kind, names in (
        (trt.Refitter, ("get_missing_weights", "get_all_weights", "refit_cuda_engine")),
        (trt.OnnxParserRefitter, ("refit_from_file", "get_error", "num_errors")),
        (trt.ICudaEngine, ("create_serialization_config", "serialize_with_config", "refittable")),
        (trt.ISerializationConfig, ("set_flag", "clear_flag")),
        (trt.SerializationFlag, ("EXCLUDE_WEIGHTS", "INCLUDE_REFIT")),
    ):
        assert all(hasattr(kind, name) for name in names), kind


@pytest.mark.parametrize(
    ("gpus", "refittable", "how"),
    [
        ([ADA], True, "refit"),
        ([ADA], False, "compiled again: the engine was not built with --refittable"),
        ([AMPERE], True, "compiled again: the GPU here is sm_86 .GeForce RTX 3080."),
        ([], True, "compiled again: no NVIDIA driver or GPU was found here"),
    ],
)
def test_weights_are_refitted_where_possible(
    jobs: dict[str, CompileJob], monkeypatch: pytest.MonkeyPatch, gpus: list[Gpu], refittable: bool, how: str
) -> None:
    requests: list[dict[str, Any]] = []
    monkeypatch.setattr(module, "present_gpus", lambda: gpus)
    monkeypatch.setattr(module, "_in_own_process", lambda request, *_: requests.append(request) or
                        {"seconds": 1.0, "peak_memory": None})  # fmt: skip
    job = replace(jobs["fp16"], options=CompileOptions(refittable=refittable, check_memory=False))
    compiled = rtx().replace_weights(job, Path("old.engine"), lambda *_: None)
    assert re.fullmatch(how, compiled.notes["weights"]) and compiled.file == "fp16.engine"
    assert [request["refit"] for request in requests] == ["old.engine" if how == "refit" else None]


def test_an_engine_is_compiled_again_if_its_refit_fails(
    jobs: dict[str, CompileJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    refits: list[str | None] = []

    def run(request: dict[str, Any], *_: Any) -> dict[str, Any]:
        refits.append(request["refit"])
        if request["refit"]:
            raise PnpError("Only successfully refitted 3 out of 5")
        return {"seconds": 1.0, "peak_memory": None}

    monkeypatch.setattr(module, "present_gpus", lambda: [ADA])
    monkeypatch.setattr(module, "_in_own_process", run)
    job = replace(jobs["fp16"], options=CompileOptions(refittable=True, check_memory=False))
    compiled = rtx().replace_weights(job, Path("old.engine"), lambda *_: None)
    assert refits == ["old.engine", None]
    assert compiled.notes["weights"] == "compiled again: the refit failed (Only successfully refitted 3 out of 5)"
    monkeypatch.setattr(memory, "free", lambda: 100 << 20)  # an InputError is not followed by a compilation
    with pytest.raises(InputError, match="of memory"):
        rtx().replace_weights(replace(job, options=CompileOptions(refittable=True)), Path("old"), lambda *_: None)
    assert len(refits) == 2


def test_turing_engines_are_never_compiled_for_single_images_only() -> None:
    one, several = Profile("b1", 1, 1, 1), Profile.parse("b2-8")
    assert module._compilable(one, "sm_75") == Profile("b1", 1, 1, 2) and module._compilable(one, "sm_89") == one
    assert module._compilable(several, "sm_75") == several
