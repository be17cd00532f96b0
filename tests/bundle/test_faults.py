"""A kill, a flipped bit, a full disk or a second process never damages a bundle.

``PNP_TRT_FAULTS=20`` (``make faults``) kills a build at 20 random moments. The usual run kills three builds that reuse
the run's traces (``tests/exports.py``) and therefore spend most of their time writing.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pnp_trt.build.builder import build
from pnp_trt.build.spec import BuildSpec
from pnp_trt.bundle.store import MANIFEST, open_bundle, sha256
from pnp_trt.errors import InputError, PnpError
from pnp_trt.runtime.pipeline import Pipeline

from ..bundles import reseal
from ..conftest import shared_root

KILLS = int(os.environ.get("PNP_TRT_FAULTS", "3"))
#: constant in `make test`; `make faults` uses a new seed each time
SEED = int(os.environ.get("PNP_TRT_FAULTS_SEED", time.time_ns() % 10_000 if "PNP_TRT_FAULTS" in os.environ else 0))

#: Program that imports the slow modules once, then forks a process for each input line, to build what it states.
FORKER = """
import os, sys, json
from functools import partial
from pathlib import Path
from tests.conftest import once_in
from tests.exports import share
import pnp_trt.build.onnx_export, pnp_trt.build.parity, pnp_trt.graph.weights, pnp_trt.models.student, diffusers
import onnxruntime, onnxscript.optimizer, onnxscript.rewriter, transformers
from pnp_trt.models.bases import resolve
from pnp_trt.build.builder import build
from pnp_trt.build.spec import BuildSpec
resolve(sys.argv[1]).unet(), resolve(sys.argv[1]).text_encoder(), resolve(sys.argv[1]).vae()
print("ready", flush=True)
for line in sys.stdin:
    base, guide, out, traces = json.loads(line)
    child = os.fork()
    if child == 0:
        try:
            if traces:
                share(partial(once_in, Path(traces)))
            build(BuildSpec(base, guide, out=Path(out)), force=True)
        finally:
            os._exit(0)
    print(child, flush=True)
    os.waitpid(child, 0)
    print("gone", flush=True)
"""


class Forker:
    """Builds in processes that can be killed, without paying for the imports each time."""

    def __init__(self, base: Path, traces: Path) -> None:
        self._traces = traces
        self.child = subprocess.Popen(
            [sys.executable, "-c", FORKER, str(base)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "1"}, cwd=Path(__file__).parents[2],
        )  # fmt: skip
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self.child.stdout is not None
        return self.child.stdout.readline().strip()

    def start(self, base: Path, guide: str, out: Path, shared: bool = True) -> int:
        """Start a build, which reuses the run's traces if ``shared``, and return its process ID."""
        assert self.child.stdin is not None
        traces = str(self._traces) if shared else None
        self.child.stdin.write(json.dumps([str(base), guide, str(out), traces]) + "\n")
        self.child.stdin.flush()
        return int(self._line())

    def wait(self) -> None:
        """Wait until the build's process has ended."""
        assert self._line() == "gone"


@pytest.fixture(scope="module")
def forker(micro_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forker]:
    process = Forker(micro_base, shared_root(tmp_path_factory))
    yield process
    process.child.kill()
    with process.child:  # closes both pipes, then waits
        pass


def exact(hashes: dict[str, str]) -> dict[str, str]:
    """Drop PyTorch's outputs, whose last bits may differ between processes; ``open_bundle`` checks their hash."""
    return {name: digest for name, digest in hashes.items() if name != "golden.npz"}


def test_a_build_killed_at_any_moment_leaves_a_complete_bundle_or_none(
    forker: Forker, micro_base: Path, micro_bundles: Path, tmp_path: Path
) -> None:
    rng = random.Random(SEED)
    forker.start(micro_base, "none", tmp_path / "own", shared=False)
    forker.wait()
    shared = "PNP_TRT_FAULTS" not in os.environ
    start = time.monotonic()
    forker.start(micro_base, "none", tmp_path / "timed", shared)
    forker.wait()
    duration = time.monotonic() - start
    # the old bundle has a VAE encoder and the new one does not, so that they can be told apart
    old, new = (
        exact({n: f.sha256 for n, f in open_bundle(folder).manifest.files.items()})
        for folder in (micro_bundles / "plain", tmp_path / "own")
    )
    assert old != new
    shutil.copytree(micro_bundles / "plain", tmp_path / "over")
    for number in range(KILLS):
        replace = number % 2 == 0  # replace a bundle and write a new one in turn
        out = tmp_path / ("over" if replace else f"fresh-{number}")
        moment = rng.uniform(0, 1.1 * duration)
        child = forker.start(micro_base, "none", out, shared)
        time.sleep(moment)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        forker.wait()
        context = f"seed {SEED}, kill {number} after {moment:.2f} of {duration:.2f} s"
        if out.exists() or replace:
            bundle = open_bundle(out)  # checks every hash
            hashes = exact({n: sha256(out / n) for n in bundle.manifest.files})
            assert hashes == new or (replace and hashes == old), context
        else:
            with pytest.raises(InputError, match="no engine named"):
                open_bundle(out)
    assert len(Pipeline.load(tmp_path / "over", provider="cpu")("a cat", steps=1)) == 1
    build(BuildSpec(str(micro_base), "none", out=tmp_path / "over"), force=True)
    # an export in another process, with another hash seed, gives the same bytes
    assert exact({n: f.sha256 for n, f in open_bundle(tmp_path / "over").manifest.files.items()}) == new
    with np.load(tmp_path / "over/golden.npz") as one, np.load(tmp_path / "own/golden.npz") as other:
        assert set(one) == set(other)
        assert all(np.allclose(one[name], other[name], rtol=1e-5, atol=1e-6) for name in one)
    assert [p.name for p in tmp_path.glob(".over.partial-*")] == []


def test_a_truncated_data_file_is_reported_once_and_without_colours(
    micro_bundles: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """ONNX Runtime's own log message, which would be coloured even on a pipe, is suppressed."""
    folder = tmp_path / "cut"
    shutil.copytree(micro_bundles / "guided", folder)
    (folder / "unet.onnx.data").write_bytes(b"[]")
    entry = {"sha256": sha256(folder / "unet.onnx.data"), "bytes": 2}
    reseal(folder, lambda m: m["files"].update({"unet.onnx.data": entry}))
    with pytest.raises(PnpError, match="ONNX Runtime cannot load .*unet.onnx"):
        Pipeline.load(folder, provider="cpu")("a cat", steps=1)
    assert capfd.readouterr().err == ""


def test_a_flipped_bit_in_any_file_is_refused(micro_bundles: Path, tmp_path: Path) -> None:
    rng = random.Random(SEED)
    folder = Path(shutil.copytree(micro_bundles / "guided", tmp_path / "guided"))
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    assert {p.name for p in files} >= {MANIFEST, "golden.npz", "weights.json", "tokenizer.json", "unet.onnx"}
    for path in files:
        whole = path.read_bytes()
        for place in (
            0,
            len(whole) - 1,
            *(rng.randrange(len(whole)) for _ in range(40 if path.name == MANIFEST else 3)),
        ):
            data = bytearray(whole)
            data[place] ^= 1 << rng.randrange(8)
            path.write_bytes(data)
            with pytest.raises(InputError, match="rebuild it with: pnp-trt build"):
                Pipeline.load(folder, provider="cpu")
                pytest.fail(f"seed {SEED}: byte {place} of {path.name} was missed")
        path.write_bytes(whole)
    assert Pipeline.load(folder, provider="cpu").name == "guided"


def test_two_simultaneous_builds_give_one_bundle(forker: Forker, micro_base: Path, tmp_path: Path) -> None:
    """The second build waits for the first and reuses its bundle."""
    out = tmp_path / "same"
    forker.start(micro_base, "none", out)
    while not list(tmp_path.glob(".same.partial-*")) and not out.exists():
        time.sleep(0.01)  # until the first build holds the lock and writes
    built = build(BuildSpec(str(micro_base), "none", out=out))
    forker.wait()
    assert built.cached
    assert open_bundle(out).manifest.key == built.manifest.key
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["same"]


def test_a_full_disk_leaves_nothing(micro_base: Path, tmp_path: Path) -> None:
    """No file can grow beyond 4 MB: the tokenizer fits, the text encoder's weights do not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, hard))
    try:
        with pytest.raises(PnpError, match=r"could not be made \(.*nothing was written; free some space"):
            build(BuildSpec(str(micro_base), "none", out=tmp_path / "full"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert [p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")] == []


def test_a_wrong_hash_in_a_resealed_manifest_is_caught(micro_bundles: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(micro_bundles / "plain", tmp_path / "plain"))
    reseal(folder, lambda m: m["files"]["unet.onnx"].update(sha256="0" * 64))
    with pytest.raises(InputError, match="unet.onnx is corrupt"):
        open_bundle(folder)
