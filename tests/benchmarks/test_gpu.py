"""``make gpu``: without a GPU it records nothing; its parts run on the CPU or on a fake GPU in host memory."""

from __future__ import annotations

import contextlib
import inspect
import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import gpu, gpu_ort, gpu_unet
from pnp_trt.backends import gpus as device
from pnp_trt.backends.torch import graph as torch_graph
from pnp_trt.runtime.pipeline import Pipeline

from ..fake_gpu import Gpu


def test_without_a_gpu_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "gpu_present", lambda: False)
    assert gpu.main(["--json", str(tmp_path / "gpu.json")]) == 0
    assert "nothing was measured or written" in capsys.readouterr().out and not any(tmp_path.iterdir())


@pytest.mark.skipif(gpu.gpu_present(), reason="a GPU is here")
def test_the_command_needs_neither_a_gpu_nor_packages() -> None:
    root = Path(gpu.__file__).parents[1]
    # -S: without any installed package
    done = subprocess.run([sys.executable, "-S", "-m", "benchmarks.gpu"], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0 and "no NVIDIA GPU was found" in done.stdout, done.stderr


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pretend that a GPU is present; return the path of the record."""
    monkeypatch.setattr(gpu, "gpu_present", lambda: True)
    monkeypatch.setattr(device, "present_gpus", lambda: [device.Gpu("NVIDIA Test 9", "sm_90")])
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    monkeypatch.setattr("pnp_trt.bundle.provenance.provenance", lambda command, device: {"command": command})
    return tmp_path / "gpu-nvidia-test-9.json"


def test_a_failed_part_is_recorded_and_the_next_one_runs(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = {
        "roof": "raise ModuleNotFoundError('No module named cuda')",
        "kernels": "print('RESULT {\"a\": 1}', flush=True); import time; time.sleep(60)",
        "tests": "print('noise'); print('RESULT {\"modules\": {}}')",
    }
    opens = subprocess.Popen

    def start(words: list[str], **options: Any) -> Any:
        return opens([sys.executable, "-c", code[words[words.index("--part") + 1]]], **options)

    monkeypatch.setattr(gpu.subprocess, "Popen", start)
    monkeypatch.setattr(gpu, "why_not", lambda name, sm: None)
    assert gpu.main(["--only", "roof", "--only", "kernels", "--only", "tests", "--limit", "3"]) == 0
    parts = json.loads(here.read_text())["parts"]
    assert parts["roof"]["ran"] is False and "No module named cuda" in parts["roof"]["why"]
    assert parts["kernels"]["a"] == 1 and not parts["kernels"]["complete"]  # results before the time limit are recorded
    assert parts["kernels"]["why"] == "it took more than 3 s" and parts["kernels"]["seconds"] < 30
    assert parts["tests"]["complete"] and parts["tests"]["modules"] == {}
    assert "goal: guided iterations a second" in capsys.readouterr().out


def test_parts_beyond_the_budget_or_the_machine_are_skipped(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    monkeypatch.setattr(
        gpu,
        "in_own_process",
        lambda name, rounds, limit: ran.append(name) or {"ran": True, "complete": True, "seconds": 1.0},
    )
    monkeypatch.setattr(gpu, "_installed", lambda package: package not in ("tensorrt", "triton"))
    out = tmp_path / "new" / "x.json"
    assert gpu.main(["--budget", "20", "--json", str(out)]) == 0
    document = json.loads(out.read_text())
    parts = document["parts"]
    assert ran == ["roof", "kernels", "torch-bundled-fp16", "torch-bundled-fp32", "tests"]
    assert "of the budget of 20 s were left" in parts["torch-sd15"]["why"]
    assert parts["torch-sd15-compiled"]["why"] == "missing packages: triton"
    assert parts["trt-sd15"]["why"] == "missing packages: tensorrt"
    assert parts["rtx-bundled"]["why"].startswith("the GPU is sm_90, but tensorrt-rtx compiles engines for sm_75")
    assert str(tmp_path) not in out.read_text()  # a record contains no local paths
    assert list(parts) == list(gpu.PARTS) and len(document["goals"]) == 4


def test_marked_tests_run_although_another_module_cannot_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "tests"
    folder.mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs a GPU\n")
    marked = "import pytest\n@pytest.mark.gpu\ndef test_{0}(): assert {1}\n"
    (folder / "test_a.py").write_text("import no_such_module\n" + marked.format("a", "True"))
    (folder / "test_b.py").write_text(marked.format("b", "True") + "def test_other(): assert False\n")
    (folder / "test_c.py").write_text(marked.format("compiled", "False"))
    (folder / "test_d.py").write_text("def test_d(): assert False\n")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    result = gpu.tests(lambda _: None, 300)
    exit_codes = {name: m["exit"] for name, m in result["modules"].items()}
    assert exit_codes == {
        "tests/test_a.py (not compiled)": 2, "tests/test_b.py (not compiled)": 0, "tests/test_c.py (not compiled)": 5,
        "tests/test_c.py (compiled)": 1,
    }  # fmt: skip
    output_of_a = " ".join(result["modules"]["tests/test_a.py (not compiled)"]["said"])
    assert result["failed"] == 2 and "no_such_module" in output_of_a


def test_a_test_module_that_times_out_leaves_time_for_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "tests"
    folder.mkdir()
    for name in ("test_a.py", "test_b.py"):
        (folder / name).write_text("import pytest\n@pytest.mark.gpu\ndef test_compiled(): pass\n")
    ran: list[tuple[str, str, float]] = []

    def run(command: list[str], timeout: float, **_: Any) -> Any:
        ran.append((Path(command[-1]).name, command[-2], timeout))
        if command[-1].endswith("test_a.py"):
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, 0, "1 passed\n", "")

    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu.subprocess, "run", run)
    result = gpu.tests(lambda _: None, 500)
    names = ["test_a.py", "test_b.py"]
    assert ran == [(n, words, limit) for words, limit in gpu.TEST_SECONDS.items() for n in names]
    assert result["failed"] == 2 and result["modules"]["tests/test_a.py (compiled)"] == "stopped after 180 s"
    assert result["modules"]["tests/test_b.py (compiled)"] == {"exit": 0, "said": ["1 passed"]}


def test_a_slow_part_leaves_some_of_the_budget_for_the_next(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits: dict[str, float] = {}
    monkeypatch.setattr(
        gpu, "in_own_process",
        lambda name, rounds, limit: limits.update({name: limit}) or {"ran": True, "complete": True, "seconds": 1.0},
    )  # fmt: skip
    monkeypatch.setattr(gpu, "why_not", lambda name, sm: None)
    only = [word for part in ("torch-sd15", "torch-sd15-compiled", "torch-sdxl") for word in ("--only", part)]
    gpu.main([*only, "--budget", "330"])
    assert 320 < limits["torch-sd15"] <= 330
    assert (limits["torch-sd15-compiled"], limits["torch-sdxl"]) == (
        gpu.MOST["torch-sd15-compiled"],
        gpu.MOST["torch-sdxl"],
    )
    gpu.main([*only, "--limit", "500"])
    assert set(limits.values()) == {500}  # without a budget, no time is reserved for later parts


def test_the_torch_parts_measure_the_expected_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    signature = inspect.signature(gpu_unet.measure)

    def measure(*words: Any, **named: Any) -> dict[str, Any]:
        bound = signature.bind(*words, **named)
        bound.apply_defaults()
        calls.append(bound.arguments)
        return {}

    monkeypatch.setattr(gpu_unet, "measure", measure)
    for name in ("torch-sd15", "torch-sd15-compiled", "torch-sdxl", "torch-sdxl-compiled"):
        gpu.run_part(name, 5, 60, lambda _: None)
    assert [(a["base"], a["target"]) for a in calls] == [
        (base, target) for base in ("random:sd15", "random:sdxl") for target in ("eager", "compile")
    ]
    assert [len(a["cases"]) for a in calls] == [6, 6, 3, 3] and all(a["cases"][0] == ("guided", 1) for a in calls)
    assert [a["decode"] for a in calls] == [True, False, False, False]  # SDXL's decoder overflows half precision
    assert all(a["precision"] == "fp16" and a["provider"] == "cuda" for a in calls)


def test_the_kernels_part_equals_numpy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Gpu(tmp_path)
    monkeypatch.setattr("pnp_trt.backends.cuda.Cuda", lambda: fake)
    record = gpu.kernels(size=(2, 3), rounds=2, steady=3, all_steps=(3,))
    assert record.pop("equal_to_numpy") == {"show": True, "update": True, "check": True, "to_bytes": True}
    for row in record.values():
        assert row["equal_to_numpy"] == {"eager": True, "captured": True} and row["captures"] == 1
        assert row["memory_growth_bytes"] == 0 and row["host_launch_us"]["captured"] > 0
    assert set(record) == {f"{name}, 3 steps" for name in ("ddim", "dpm++", "euler", "heun", "unipc")}


def test_the_onnxruntime_part_compares_providers(micro_base: Path, micro_guide: Path) -> None:
    reports: list[Any] = []
    record = gpu_ort.measure(reports.append, 1, provider="cpu", base=str(micro_base), guide=str(micro_guide),
                            precisions=("fp32",), steps=(2, 20))  # fmt: skip
    assert reports and set(record["fp32"]) == {"guided", "CFG"} and "fp16" not in record
    for row in record["fp32"].values():  # the provider is compared with itself
        assert row["levels_from_cpu"] == {"largest": 0, "mean": 0.0} and row["warned"] == []
        assert row["image_ms"]["batch 4"][20] > row["image_ms"]["batch 1"][2] > 0


def test_an_onnxruntime_without_cuda_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert "has no CUDA provider; install onnxruntime-gpu" in str(gpu.why_not("ort-bundled", "sm_90"))
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    assert gpu.why_not("ort-bundled", "sm_90") is None


def test_the_engines_part_compares_device_and_host_loops(
    micro_base: Path, micro_guide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU the device loop runs step by step, because no capture succeeds."""

    class OnCpu(Pipeline):
        def __init__(self, bundle: Any, **_: Any) -> None:
            super().__init__(bundle, provider="cpu")
            unet: Any = self._unet
            vae: Any = self._vae
            self.loops = torch_graph.device_loops(unet, vae, None, self.name)

    @contextlib.contextmanager
    def no_memory(row: dict[str, Any]) -> Iterator[None]:
        yield

    monkeypatch.setattr("pnp_trt.runtime.pipeline.Pipeline", OnCpu)
    monkeypatch.setattr(gpu, "_device_memory", no_memory)
    monkeypatch.setattr(gpu, "STEPS", (1, 4))
    generated: list[tuple[int, int]] = []
    call = Pipeline.__call__

    def recording_call(self: Any, *prompts: Any, steps: int, seed: int, **rest: Any) -> Any:
        generated.append((steps, seed))
        return call(self, *prompts, steps=steps, seed=seed, **rest)

    monkeypatch.setattr(OnCpu, "__call__", recording_call)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        record = gpu.engines("torch", str(micro_base), "fp32", 3, str(micro_guide))
    for kind in ("guided", "CFG"):
        row = record[kind]
        assert row["captures"] == 0 and "no CUDA graphs on cpu" in row["why_not"]
        assert row["captured_equals_step_by_step"] and row["host_differs_by_levels"] <= 1
        assert row["step_ms"].keys() == {"captured", "step by step", "host"}
    assert (4, 2) in generated  # later rounds use other seeds; their images are not compared
    assert record["guided_times_faster_than_cfg"].keys() == {"1 steps against 4"}
