"""Interleaved timing of steps on a CPU: the calls of each round, and ratios of times of the same round."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import cpu_steps
from pnp_trt.backends.onnxruntime.backend import OrtNetwork


def test_a_record_has_times_and_ratios_of_every_round(
    micro_bundles: Path, micro_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, int]] = []
    bind = OrtNetwork.bind

    def recording_bind(self: OrtNetwork, batch: int, *more: object) -> object:
        calls.append((self.path.parent.name, batch))
        return bind(self, batch, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(OrtNetwork, "bind", recording_bind)
    threads, out = torch.get_num_threads(), tmp_path / "record.json"
    words = ["--base", str(micro_base), "--rounds", "3", "--batches", "2", "--json", str(out)]
    words += ["--guided", str(micro_bundles / "guided"), "--plain", str(micro_bundles / "plain")]
    try:
        cpu_steps.main(words)
    finally:
        torch.set_num_threads(threads)
    (row,) = json.loads(out.read_text())["rows"]
    assert row["batch"] == 2 and set(row["seconds"]) == {"guided", "unguided", "CFG", "diffusers CFG"}
    assert all(len(times) == 3 and min(times) > 0 for times in row["seconds"].values())
    assert calls[:3] == [("guided", 2), ("plain", 2), ("plain", 4)] and len(calls) == 3 * (1 + 3)
    assert [name for name, _ in calls[3:]] != [name for name, _ in calls[:3]] * 3  # the order changes between rounds
    ratio = row["ratios"]["guided / CFG"]["wall"]
    time_ratios = np.array(row["seconds"]["guided"]) / np.array(row["seconds"]["CFG"])
    assert ratio["time_ratio"] == pytest.approx(np.median(time_ratios), abs=1e-4)
    assert ratio["interval"][0] <= ratio["time_ratio"] <= ratio["interval"][1]


def test_an_unguided_engine_is_refused_as_the_guided_one(micro_bundles: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"plain has no guide; use another engine"):
        cpu_steps.main(["--guided", str(micro_bundles / "plain"), "--json", str(tmp_path / "x.json")])
    assert not (tmp_path / "x.json").exists()


def test_diffusers_runs_half_precision_weights_in_float32(micro_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pnp_trt.models import bases

    unet = bases.resolve(str(micro_base)).unet()

    class Half:
        def unet(self) -> torch.nn.Module:
            return unet.half()

    monkeypatch.setattr(bases, "resolve", lambda name: Half())
    threads = torch.get_num_threads()
    try:
        assert cpu_steps.in_diffusers("random:micro", 1)(2)().dtype == np.float32
    finally:
        torch.set_num_threads(threads)
