"""The commands that look at engines."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pnp_trt.runtime.verify import load_golden, save_golden

from ..bundles import document, reseal
from ..conftest import Result

Cli = Callable[..., Result]


def test_inspect_prints_what_the_manifest_says(cli: Cli, engines: Path) -> None:
    manifest = document(engines / "guided")
    done = cli("inspect", "guided", "--json")
    assert done.code == 0 and json.loads(done.out) == manifest
    text = cli("inspect", "guided").out
    for part in ("onnxruntime", "fp32", "micro-guide", "any batch up to 32", "unet.onnx", manifest["rebuild"][:40]):
        assert part in text
    assert "cannot run here" not in text
    assert cli("inspect", "nope").code == 2


def test_list_has_every_bundle_and_says_which_is_damaged(cli: Cli, engines: Path, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    home = Path(shutil.copytree(engines, tmp_path / "engines"))
    monkeypatch.setenv("PNP_TRT_ENGINES", str(home))
    text = (home / "plain" / "manifest.json").read_text()
    (home / "plain" / "manifest.json").write_text(text.replace('"max_batch": 32', '"max_batch": 64'))
    found = {row["name"]: row for row in json.loads(cli("list", "--json").out)}
    assert found["guided"]["bytes"] == sum(p.stat().st_size for p in (home / "guided").iterdir()
                                           if p.name != "manifest.json")  # fmt: skip
    assert "was changed or is corrupt" in found["plain"]["problem"]
    printed = cli("list").out
    assert "guided" in printed and "damaged" in printed
    monkeypatch.setenv("PNP_TRT_ENGINES", str(tmp_path / "none"))
    assert "no engine in" in cli("list").out


def test_verify_compares_with_what_pytorch_gave(cli: Cli, engines: Path, tmp_path: Path) -> None:
    done = cli("verify", "guided")
    assert done.code == 0, done.err
    assert done.out.count("limit 1e-04, fp32") == 3
    copy = Path(shutil.copytree(engines / "guided", tmp_path / "guided"))
    golden = load_golden(copy / "golden.npz")
    inputs, reference = golden["unet"]
    save_golden(copy / "golden.npz", {**golden, "unet": (inputs, reference + np.float32(0.1))})
    reseal(copy)
    done = cli("verify", copy)
    assert done.code == 1 and "engine 'guided': the unet differs from PyTorch by" in done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--precision", "int3"], "precision is 'int3'; known: fp32, fp16, bf16"),
        (["--backend", "abacus"], "the backend is 'abacus'; known: onnxruntime, tensorrt-rtx, tensorrt, torch"),
        (["--profile", "b4"], "takes any batch size up to 32; omit --profile"),
        (["--backend", "tensorrt-rtx", "--target", "sm_90"], "target is 'sm_90'; tensorrt-rtx compiles for: portable"),
        (["--refittable"], "--refittable is for TensorRT"),
    ],
)
def test_bad_orders_are_refused(cli: Cli, tmp_path: Path, arguments: list[str], message: str) -> None:
    done = cli("build", "--out", tmp_path / "x", *arguments)
    assert done.code == 2 and message in done.err
    assert not (tmp_path / "x").exists()
