"""Energy from a fake NVML, and memory of real processes with a micro model."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from pnp_trt.bench.measure import footprint
from pnp_trt.bench.measure.cases import Case
from pnp_trt.bench.measure.energy import joules_per_image, nvml_counter
from pnp_trt.bench.measure.footprint import MemoryMeter
from pnp_trt.errors import PnpError
from pnp_trt.runtime.pipeline import Pipeline


class Nvml:
    """A fake with one GPU, whose energy counter is ``millijoules``."""

    def __init__(self, error: str | None = None) -> None:
        self.millijoules, self.error, self.started = 5_000, error, False

    def nvmlInit(self) -> None:
        self.started = True

    def nvmlDeviceGetCount(self) -> int:
        return 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        assert self.started
        return index

    def nvmlDeviceGetTotalEnergyConsumption(self, gpu: int) -> int:
        if self.error:
            raise RuntimeError(self.error)
        return self.millijoules

    def nvmlDeviceGetComputeRunningProcesses(self, gpu: int) -> list[SimpleNamespace]:
        return [SimpleNamespace(pid=1, usedGpuMemory=7), SimpleNamespace(pid=os.getpid(), usedGpuMemory=1234)]


def test_joules_per_image() -> None:
    nvml, now = Nvml(), [0.0]
    counter, why = nvml_counter(0, nvml)
    assert counter is not None and why is None and counter() == pytest.approx(5.0)

    def generate() -> None:
        now[0] += 0.3
        nvml.millijoules += 90_000

    assert joules_per_image(generate, 4, counter, lambda: now[0], seconds=2.0) == pytest.approx(90 / 4)
    assert now[0] == pytest.approx(2.1)  # repeated until two seconds had passed
    assert joules_per_image(lambda: now.__setitem__(0, now[0] + 3), 1, counter, lambda: now[0]) is None


def test_a_missing_counter_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    counter, why = nvml_counter(2, Nvml("Not Supported"))
    assert counter is None and why == "GPU 2 has no energy counter that can be read (Not Supported)"
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)
    counter, why = nvml_counter()
    assert counter is None and why is not None and "pip install 'pnp-trt[energy]'" in why


def test_peak_memory_is_measured_in_a_separate_process(micro_bundles: Path) -> None:
    plain = Pipeline.load(micro_bundles / "plain", provider="cpu", threads=1)
    meter = MemoryMeter("cpu")
    one = meter(Case(plain, "cfg-interval"), batch=1, steps=2, schedule="ddim")
    many = meter(Case(plain, "cfg-fewer-steps"), batch=32, steps=2)
    assert one is not None and many is not None and meter.left_out == []
    assert 20 * 2**20 < one < many  # a batch of 64 for the U-Net takes more than one of 2


def test_cases_without_a_memory_figure_are_listed(micro_bundles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meter = MemoryMeter()
    fake = SimpleNamespace(name="fake", methods=("cfg",))
    assert meter(Case(fake, "cfg"), batch=2, steps=3) is None  # type: ignore[arg-type]
    assert meter.left_out == [
        {
            "what": "peak memory of fake/cfg, batch 2",
            "why": "it is not a bundle and cannot be loaded by another process",
        }
    ]
    plain = Pipeline.load(micro_bundles / "plain", provider="cpu", threads=1)
    monkeypatch.setattr(footprint, "in_own_process", lambda settings: {"peak_bytes": None, "why": "nobody knows"})
    assert meter(Case(plain, "cfg"), batch=1, steps=1) is None
    assert meter.left_out[-1]["why"] == "nobody knows"


def test_a_failed_process_is_reported_with_its_last_line(tmp_path: Path) -> None:
    settings = dict.fromkeys(
        ("peer", "schedule", "size"), None
    ) | {"engine": str(tmp_path / "none"), "method": "cfg", "batch": 1, "steps": 1, "provider": "cpu"}  # fmt: skip
    with pytest.raises(PnpError, match="measures memory failed: .*none"):
        footprint.in_own_process(settings)


def test_device_memory_counts_only_this_process() -> None:
    assert footprint._device_bytes(Nvml())["peak_bytes"] == 1234
    hidden = SimpleNamespace(nvmlInit=lambda: None, nvmlDeviceGetCount=lambda: 0)
    assert footprint._device_bytes(hidden)["peak_bytes"] is None
