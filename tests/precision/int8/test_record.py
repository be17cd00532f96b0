"""Calibration records: round trips, damaged files, exact SmoothQuant factors, and the layers of each recipe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pnp_trt.errors import InputError
from pnp_trt.precision.int8.record import LayerRange, ObservedLayer, Record, choose, find
from pnp_trt.precision.recipes import FP16, recipe

MAGNITUDES = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=16)


def layer(channels: list[float], kind: str = "linear") -> ObservedLayer:
    return ObservedLayer(kind, 100, {"max": max(channels, default=1.0), "percentile-99.9": 0.5}, [1.0], channels)


@given(MAGNITUDES, st.sampled_from(["0.5", "0.8"]))
def test_smoothing_is_undone_by_the_weight_without_rounding(channels: list[float], alpha: str) -> None:
    choice = choose(layer(channels), f"smoothquant-{alpha}")
    factors = torch.exp2(torch.tensor(choice.exponents or [0] * len(channels)).double())
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, len(channels), generator=g).double() for n in (3, 5))
    assert torch.equal((x / factors) * factors, x)
    torch.testing.assert_close((x / factors) @ (w * factors).T, x @ w.T, rtol=0, atol=1e-9)
    # the range covers every channel after smoothing
    assert all(c / f <= choice.amax * (1 + 1e-9) for c, f in zip(channels, factors.tolist(), strict=True))


def test_smoothing_evens_out_channels() -> None:
    choice = choose(layer([100.0, 1.0, 1.0, 1.0]), "smoothquant-0.5")
    assert choice.exponents is not None and choice.exponents[0] > choice.exponents[1]
    assert choice.amax < 100.0
    assert choose(layer([2.0, 2.0]), "smoothquant-0.5") == LayerRange(2.0)  # already even: no factors
    assert choose(layer([], "conv"), "smoothquant-0.5") == LayerRange(1.0)  # convolutions have no ranges per channel
    assert choose(layer([3.0]), "percentile-99.9") == LayerRange(0.5)


def test_records_survive_a_round_trip(micro_record: Path, tmp_path: Path) -> None:
    record = Record.read(micro_record)
    record.write(tmp_path / "again.json")
    assert Record.read(tmp_path / "again.json") == record
    # one line per layer, so that a diff of two records is readable
    lines = (tmp_path / "again.json").read_text().splitlines()
    assert sum(line.startswith('  "unet.') for line in lines) == len(record.layers)


def test_a_record_of_the_former_schema_is_read(micro_record: Path, tmp_path: Path) -> None:
    record = json.loads(micro_record.read_text())
    record["schema"] = "pnp-trt/calibration/1"
    record["settings"]["pictures"] = record["settings"].pop("images")
    (tmp_path / "old.json").write_text(json.dumps(record))
    old, new = Record.read(tmp_path / "old.json"), Record.read(micro_record)
    assert old == new and old.settings["images"] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[: len(text) // 2], "is not complete JSON"),
        (lambda text: text.replace("calibration/2", "calibration/9"), "has schema pnp-trt/calibration/9"),
        (lambda text: "[1]", "has schema None"),
        (lambda text: json.dumps({**json.loads(text), "decision": {"conv": "max"}}), "'decision' lacks 'float'"),
        (lambda text: json.dumps({**json.loads(text), "decision": {"conv": "magic", "linear": "max", "float": []}}),
         "lacks a method that its decision uses ('magic')"),
        (lambda text: text.replace('"amax": {"max": ', '"amax": {"max": -', 1), "has the range -"),
    ],
)  # fmt: skip
def test_damaged_records_are_refused(micro_record: Path, tmp_path: Path, change: object, message: str) -> None:
    record = json.loads(micro_record.read_text())
    record["decision"] = {"conv": "max", "linear": "max", "float": []}
    path = tmp_path / "record.json"
    path.write_text(change(json.dumps(record)))  # type: ignore[operator]
    with pytest.raises(InputError, match="record.json") as e:
        Record.read(path)
    assert message in str(e.value) and "pnp-trt calibrate" in str(e.value)


def test_a_missing_record_is_reported_with_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="pnp-trt calibrate --base emoji-3d --guide full"):
        find("emoji-3d", "full")
    with pytest.raises(InputError, match="does not exist; make it again"):
        Record.read(tmp_path / "none.json")


def test_which_layers_each_recipe_quantises() -> None:
    """Layers that TensorRT-RTX fuses in float stay in float there; FP8 has the same layers on every backend."""
    block = "unet.down_blocks.0.attentions.0"
    fused = [f"{block}.proj_in", f"{block}.proj_out", f"{block}.transformer_blocks.0.attn1.to_out.0"]
    others = ["unet.down_blocks.0.resnets.0.conv1", f"{block}.transformer_blocks.0.attn1.to_q",
              f"{block}.transformer_blocks.0.ff.net.0.proj", f"{block}.transformer_blocks.0.ff.net.2"]  # fmt: skip
    layers = {name: layer([3.0], "conv" if "conv" in name or "proj_" in name else "linear") for name in fused + others}
    layers["unet.kept"] = layer([1.0])
    decision = {"conv": "max", "linear": "percentile-99.9", "float": ["unet.kept"]}
    record = Record({}, None, {}, layers, decision=decision)
    int8 = recipe("int8")
    assert set(int8.choices(record)) == {*fused, *others}
    assert set(int8.on_backend(FP16, one_scale=True).choices(record)) == set(others)
    assert int8.choices(record)[others[1]] == LayerRange(0.5)
    for fp8 in (recipe("fp8"), recipe("fp8").on_backend(FP16, one_scale=True)):
        assert fp8.choices(record) == {name: LayerRange(3.0) for name in others}  # the whole range
