"""``make gpu`` where no GPU is: it claims nothing; and its parts, on a GPU made of host memory."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import gpu
from pnp_trt.backends import gpus as device
from pnp_trt.backends.torch import graph as torch_graph
from pnp_trt.runtime.pipeline import Pipeline

from ..fake_gpu import Gpu


def test_without_a_gpu_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "gpu_present", lambda: False)
    assert gpu.main(["--json", str(tmp_path / "gpu.json")]) == 0
    assert "nothing is claimed" in capsys.readouterr().out and not any(tmp_path.iterdir())


@pytest.mark.skipif(gpu.gpu_present(), reason="a GPU is here")
def test_this_machine_has_none() -> None:
    root = Path(gpu.__file__).parents[1]
    done = subprocess.run([sys.executable, "-S", "-m", "benchmarks.gpu"], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0 and "no NVIDIA GPU was found" in done.stdout, done.stderr  # with no package at all


def test_a_part_that_fails_is_written_down_and_the_next_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "gpu_present", lambda: True)
    monkeypatch.setattr(device, "present_gpus", lambda: [device.Gpu("NVIDIA Test 9", "sm_99")])
    ran: list[list[str]] = []

    def run(words: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        ran.append(words)
        if "kernels" in words:
            return subprocess.CompletedProcess(words, 1, "", "Traceback\nModuleNotFoundError: No module named 'cuda'")
        if "torch-bundled" in words:
            raise subprocess.TimeoutExpired(words, 5)
        return subprocess.CompletedProcess(words, 0, f"noise\n{gpu.MARK}{json.dumps({'summary': '9 passed'})}\n", "")

    monkeypatch.setattr(gpu.subprocess, "run", run)
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    provenance = "pnp_trt.bundle.provenance.provenance"
    monkeypatch.setattr(provenance, lambda command, device: {"device": device})
    assert gpu.main(["--only", "kernels", "--only", "torch-bundled", "--only", "tests", "--limit", "5"]) == 0
    found = json.loads((tmp_path / "gpu-nvidia-test-9.json").read_text())
    parts = found["parts"]
    assert parts["kernels"]["ran"] is False and "No module named 'cuda'" in parts["kernels"]["why"]
    assert parts["torch-bundled"]["why"] == "it took more than 5 s"
    assert parts["tests"]["ran"] and parts["tests"]["summary"] == "9 passed" and len(ran) == 3


def test_the_kernels_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Gpu(tmp_path)
    monkeypatch.setattr("pnp_trt.backends.cuda.Cuda", lambda: fake)
    found = gpu.kernels(size=(2, 3), rounds=2, steady=3, all_steps=(3,))
    assert found.pop("equal_to_numpy") == {"show": True, "update": True, "check": True, "to_bytes": True}
    for row in found.values():
        assert row["equal_to_numpy"] == {"eager": True, "captured": True} and row["captures"] == 1
        assert row["memory_growth_bytes"] == 0 and row["host_launch_us"]["captured"] > 0
    assert set(found) == {f"{name}, 3 steps" for name in ("ddim", "dpm++", "euler")}


def test_the_engines_part(micro_base: Path, micro_guide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, where the loop's other half runs and no capture succeeds."""

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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = gpu.engines("torch", str(micro_base), "fp32", 1, str(micro_guide))
    for kind in ("guided", "CFG"):
        row = found[kind]
        assert row["captures"] == 0 and "no CUDA graphs on cpu" in row["why_not"]
        assert row["captured_equals_step_by_step"] and row["host_differs_by_levels"] <= 1
        assert row["step_ms"].keys() == {"captured", "step by step", "host"}
    assert found["guided_times_faster_than_cfg"].keys() == {"1 steps against 4"}
