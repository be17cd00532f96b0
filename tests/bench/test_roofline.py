"""The least possible time on fake devices, and the measurement of a real one."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pnp_trt.bench.measure import roofline
from pnp_trt.bench.measure.cases import Case
from pnp_trt.bench.measure.roofline import CallCost, Device, least_loop_ms, least_ms, measure_device, work_of
from pnp_trt.errors import InputError
from pnp_trt.runtime.pipeline import Pipeline

DEVICE = Device("fake", peak_macs_per_s=2e9, peak_bytes_per_s=1e9, how="it is a fake")
ROWS = [
    {"network": "teacher", "macs": 1000},
    {"network": "guide-tiny", "macs": 10},
    {"network": "guide-full", "macs": 400},
]


def test_least_time_by_hand() -> None:
    assert least_ms(4e9, 1e9, DEVICE) == pytest.approx(2000)  # arithmetic
    assert least_ms(1e9, 3e9, DEVICE) == pytest.approx(3000)  # bytes
    work = CallCost(macs=1_000_000, weight_bytes=1_000_000)
    # a call of one row takes 1 ms for its bytes, of two rows at batch 3 it takes 3 ms for its MACs
    assert least_loop_ms(work, [(4, 1)], 1, DEVICE) == pytest.approx(4)
    assert least_loop_ms(work, [(2, 2), (4, 1)], 3, DEVICE) == pytest.approx(2 * 3 + 4 * 1.5)


@settings(max_examples=60)
@given(
    macs=st.integers(1, 10**12), weights=st.integers(1, 10**10), steps=st.integers(1, 50), batch=st.integers(1, 16)
)  # fmt: skip
def test_cfg_costs_at_most_twice_and_sequential_cfg_is_not_cheaper(
    macs: int, weights: int, steps: int, batch: int
) -> None:
    work = CallCost(macs, weights)
    once, twice, both = (least_loop_ms(work, c, batch, DEVICE) for c in ([(steps, 1)], [(2 * steps, 1)], [(steps, 2)]))
    assert once <= both * (1 + 1e-9) and both <= twice * (1 + 1e-9)
    assert twice == pytest.approx(2 * once)


def test_work_of_bundles(micro_bundles: Path) -> None:
    plain, guided = (Pipeline.load(micro_bundles / name, provider="cpu", threads=1) for name in ("plain", "guided"))
    find = work_of(ROWS)
    teacher, tiny = find(Case(plain, "cfg")), find(Case(guided, "guided"))
    assert teacher is not None and tiny is not None
    assert (teacher.macs, tiny.macs, teacher.precision) == (1000, 1010, "fp32")
    files = [micro_bundles / "plain" / name for name in ("unet.onnx", "unet.onnx.data")]
    assert teacher.weight_bytes == sum(f.stat().st_size for f in files)
    networks = guided.bundle.manifest.networks
    with_condition = replace(guided.bundle.manifest, networks={**networks, "condition": networks["unet"]})
    guided.bundle = replace(guided.bundle, manifest=with_condition)  # as with the full guide
    full = find(Case(guided, "guided"))
    assert full is not None and full.macs == 1400
    assert work_of(ROWS[:1])(Case(guided, "guided")) is None
    peer = SimpleNamespace(name="micro", methods=("diffusers",), weight_bytes=77)
    assert find(Case(peer, "diffusers")) == CallCost(1000, 77)  # type: ignore[arg-type]
    del peer.weight_bytes
    assert find(Case(peer, "diffusers")) is None  # type: ignore[arg-type]


def test_this_device_is_measured() -> None:
    device = measure_device(sides=(48,), bytes_=2**20, seconds=0.0)
    assert device.name and 1e6 < device.peak_macs_per_s < 1e14
    assert 1e6 < device.peak_bytes_per_s < 1e13
    assert "ONNX Runtime on " in device.how and "48" in device.how and "1 MiB" in device.how
    assert set(device.as_dict()) == {"name", "peak_macs_per_s", "peak_bytes_per_s", "how"}


def test_the_peak_is_from_the_fastest_run() -> None:
    """By this clock the second run is the fastest, with 2 ms."""
    stamps = iter([0.0, 5e-3, 5e-3, 7e-3, 7e-3, 17e-3])
    assert roofline._best(lambda: None, 0.01, lambda: next(stamps)) == pytest.approx(2e-3)


def test_without_onnx_numpy_measures_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    device = measure_device(sides=(32,), bytes_=2**16, seconds=0.0)
    assert "numpy" in device.how and "onnx is not installed" in device.how
    assert device.peak_macs_per_s > 0


def test_unsupported_devices_and_precisions_are_refused() -> None:
    with pytest.raises(InputError, match="provider is 'tpu'"):
        measure_device(provider="tpu")
    with pytest.raises(InputError, match="'int8'; a CPU's peak is measured in fp32 only"):
        measure_device(precision="int8")
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="torch finds no GPU"):
            measure_device(provider="cuda")
    with pytest.raises(InputError, match="measured in fp32, fp16, bf16"):
        measure_device(provider="cuda", precision="int8")
