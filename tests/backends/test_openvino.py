"""OpenVINO runs the graphs of ONNX Runtime's bundles unchanged, and gives the same images."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from pnp_trt import backends
from pnp_trt.backends.base import LoadOptions
from pnp_trt.errors import InputError, MissingDependency, PnpError
from pnp_trt.runtime.pipeline import Pipeline
from pnp_trt.runtime.verify import verify

from ..bundles import reseal

PROMPTS = ["a red apple", "a cat"]


@pytest.fixture(scope="module")
def folders(micro_bundles: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copies of the bundles whose manifests name OpenVINO; the other files are unchanged."""
    root = tmp_path_factory.mktemp("openvino")
    for name in ("plain", "guided"):
        shutil.copytree(micro_bundles / name, root / name)
        reseal(root / name, lambda m: m.update(backend="openvino"), files=False)
    return root


@pytest.mark.parametrize("name", ["plain", "guided"])
def test_images_equal_onnxruntimes(name: str, folders: Path, micro_bundles: Path) -> None:
    pytest.importorskip("openvino")
    theirs = Pipeline.load(micro_bundles / name, provider="cpu", threads=1)
    ours = Pipeline.load(folders / name, threads=1)
    assert ours.on_gpu is False and (name == "plain" or ours.methods == ("guided",))
    context, noise = ours.encode(PROMPTS), ours.noise([3, 4])
    np.testing.assert_allclose(context, theirs.encode(PROMPTS), rtol=0, atol=1e-5)
    latents, expected = (p.denoise(context, noise, steps=6, guidance=3.0) for p in (ours, theirs))
    assert np.abs(latents - expected).max() <= 1e-4 * np.abs(expected).max()
    pairs = zip(ours(PROMPTS, steps=6, seed=[3, 4]), theirs(PROMPTS, steps=6, seed=[3, 4]), strict=True)
    for mine, other in pairs:
        assert np.abs(mine.pixels.astype(int) - other.pixels).max() <= 1
    alone = ours(PROMPTS[0], steps=6, seed=3)[0]  # another batch size, and repeated: buffers are not mixed up
    assert np.abs(alone.pixels.astype(int) - theirs(PROMPTS[0], steps=6, seed=3)[0].pixels).max() <= 1
    assert np.array_equal(alone.pixels, ours(PROMPTS[0], steps=6, seed=3)[0].pixels)
    facts = ours.facts()["unet"]
    assert facts["layers"] > facts["reformats"] >= 0


def test_verify_compares_with_pytorch(folders: Path) -> None:
    pytest.importorskip("openvino")
    from pnp_trt.bundle.store import open_bundle

    assert all(error < 1e-4 for error in verify(open_bundle(folders / "guided")).values())


def test_bad_use_is_refused_in_one_sentence(folders: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    from pnp_trt.backends.openvino.backend import OpenVinoNetwork

    backend = backends.get("openvino")
    assert backend.precisions == ("fp32",)
    with pytest.raises(InputError, match="provider is 'cuda'; backend openvino runs on: auto, cpu"):
        Pipeline.load(folders / "plain", provider="cuda")
    (tmp_path / "x.onnx").write_bytes(b"no graph")
    with pytest.raises(PnpError, match="OpenVINO cannot load .*x.onnx"):
        OpenVinoNetwork(tmp_path / "x.onnx")(x=np.zeros((1, 2), np.float32))
    network = OpenVinoNetwork(folders / "plain" / "vae_decoder.onnx")
    with network.bind(2) as bound:
        with pytest.raises(InputError, match="no input 'x'; its inputs: latents"):
            bound.write(x=np.zeros(1, np.float32))
        with pytest.raises(InputError, match=r"'latents' has shape \[1, 4, 8, 8\]; the network takes \[2, 4, 8, 8\]"):
            bound.write(latents=np.zeros((1, 4, 8, 8), np.float32))
    with pytest.raises(InputError, match="the batch is 0"), network.bind(0):
        pass


def test_a_missing_package_is_reported_with_its_install_command(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    backend = backends.get("openvino")
    with pytest.raises(MissingDependency, match=r"pip install 'pnp-trt\[openvino\]'"):
        backend.versions()
    assert "pip install" in str(backend.cannot_run("any"))
    assert LoadOptions().provider == "auto" and backends.all_needs()["openvino"].extra == "openvino"
