"""Files that a distillation writes: permissions, digests, stray files, and full disks."""

from __future__ import annotations

import os
import random
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pnp_trt.distill.monitor import Board
from pnp_trt.distill.run import guide_weights, save_guide
from pnp_trt.distill.states import StateConfig, _claim_cache, read_shards, write_shard
from pnp_trt.distill.train import TrainConfig, newest_step, train
from pnp_trt.errors import InputError, PnpError
from pnp_trt.models.guides.load import load_guide

from .test_guidance import Line

TENSORS = {"sample": torch.arange(12).half().reshape(3, 2, 2), "timestep": torch.tensor([1, 2, 3])}


def test_every_flipped_bit_of_a_shard_is_detected(tmp_path: Path) -> None:
    path = tmp_path / "shard-0000.safetensors"
    write_shard(TENSORS, path)
    whole = path.read_bytes()
    for key, value in read_shards(tmp_path, 1).items():
        assert torch.equal(value[[0, 1, 2]], TENSORS[key])
    rng = random.Random(3)
    places = [(n, bit) for n in range(len(whole)) for bit in range(8)]
    for place, bit in rng.sample(places, 400):
        data = bytearray(whole)
        data[place] ^= 1 << bit
        path.write_bytes(data)
        with pytest.raises(InputError, match=r"shard-0000.safetensors is damaged .*delete it"):
            read_shards(tmp_path, 1)
            pytest.fail(f"bit {bit} of byte {place} was missed")
    save_file(TENSORS, path)  # as an earlier version wrote it
    with pytest.raises(InputError, match="has no digest"):
        read_shards(tmp_path, 1)


def test_written_files_have_default_permissions(tmp_path: Path, micro_guide: Path) -> None:
    module = torch.nn.Linear(2, 1)
    before = os.umask(0o022)
    try:
        write_shard(TENSORS, tmp_path / "states" / "shard-0000.safetensors")
        save_guide(load_guide(str(micro_guide)), tmp_path)
        train(module, module, Line(), TrainConfig(steps=2, batch=4, checkpoint_every=1), tmp_path)
    finally:
        os.umask(before)
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    names = {p.name for p in files}
    assert {"config.json", "diffusion_pytorch_model.safetensors", "step-0000002.safetensors"} <= names
    assert {p.name: stat.S_IMODE(p.stat().st_mode) for p in files} == dict.fromkeys(names, 0o644)
    assert not list(tmp_path.rglob(".*"))
    a, b = (load_guide(str(f)).state_dict() for f in (micro_guide, tmp_path))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_stray_checkpoints_are_neither_read_nor_removed(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    strays = ["step-x.safetensors", "step-99.safetensors", "step-best.safetensors", "step-0000009.safetensors.bak"]
    for name in strays:
        (folder / name).write_text("dear")
    module, config = torch.nn.Linear(2, 1), TrainConfig(steps=4, batch=4, checkpoint_every=1, keep=1)
    assert newest_step(tmp_path) == 0
    train(module, module, Line(), config, tmp_path)
    assert newest_step(tmp_path) == 4
    assert sorted(p.name for p in folder.iterdir()) == sorted([*strays, "step-0000004.safetensors"])
    (folder / "step-0000004.safetensors").rename(folder / "step-0000003.safetensors")
    with pytest.raises(InputError, match="cannot be continued from .*it is of step 4.*delete it"):
        train(module, module, Line(), config, tmp_path)


def test_a_guide_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no \.safetensors"):
        guide_weights(tmp_path)


def test_a_full_disk_is_reported_and_leaves_no_partial_file(
    tmp_path: Path, micro_guide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.torch
    from safetensors import SafetensorError

    def full(tensors: object, path: Path, **_: object) -> None:
        Path(path).write_bytes(b"half of it")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(PnpError, match="could not be written .*No space left on device"):
        write_shard(TENSORS, tmp_path / "shard-0000.safetensors")
    with pytest.raises(PnpError, match="could not be written .*No space left on device.*--resume"):
        save_guide(load_guide(str(micro_guide)), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "[]", '{"key":'])
def test_a_damaged_record_of_states_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "states.json").write_text(text)
    with pytest.raises(InputError, match=r"states\.json is damaged"):
        _claim_cache(tmp_path, StateConfig(count=1), {}, 0)


def test_states_of_unknown_origin_are_not_used(tmp_path: Path) -> None:
    (tmp_path / "shard-0000.safetensors").write_text("dear")
    with pytest.raises(InputError, match=r"holds states without their states\.json"):
        _claim_cache(tmp_path, StateConfig(count=1), {}, 0)


def test_a_full_disk_stops_only_the_logs(tmp_path: Path) -> None:
    class Full:
        def add_scalar(self, *_: object) -> None:
            raise OSError(28, "No space left on device")

    board = Board(tmp_path)
    board.close()
    board._writer = Full()
    with pytest.warns(UserWarning, match=r"TensorBoard logging stopped \(No space left on device\)"):
        board.numbers(1, loss=0.5)
    board.numbers(2, loss=0.5)
    board.close()
