"""Facts about engines, from manifests, files and a fake inspector."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest

from pnp_trt.backends.tensorrt.facts import facts
from pnp_trt.bench.measure.engine_facts import engine_rows
from pnp_trt.errors import InputError
from pnp_trt.runtime.pipeline import Pipeline

from ..bundles import reseal

KEYS = {
    "engine", "backend", "precision", "target", "network", "file_bytes", "graph_bytes", "device_memory_bytes", "layers",
    "reformats", "note",
}  # fmt: skip


def test_facts_of_an_onnx_bundle(micro_bundles: Path) -> None:
    plain = Pipeline.load(micro_bundles / "plain", provider="cpu", threads=1)
    rows = engine_rows([micro_bundles / "plain", micro_bundles / "guided"], [plain])
    assert all(set(row) == KEYS for row in rows)
    by_network = {(row["engine"], row["network"]): row for row in rows}
    assert {n for e, n in by_network if e == "plain"} == {"text_encoder", "unet", "vae_decoder", "vae_encoder"}
    unet = by_network["plain", "unet"]
    files = [micro_bundles / "plain" / name for name in ("unet.onnx", "unet.onnx.data")]
    assert unet["file_bytes"] == unet["graph_bytes"] == sum(f.stat().st_size for f in files)
    assert unet["layers"] == len(onnx.load(files[0], load_external_data=False).graph.node)
    assert by_network["guided", "unet"]["layers"] > unet["layers"]  # the guide is in it
    assert (unet["reformats"], unet["device_memory_bytes"]) == (None, None)
    assert "before ONNX Runtime fuses" in unet["note"]


def test_without_onnx_layers_are_unknown(micro_bundles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert all(r["layers"] is None and "not installed" in r["note"] for r in engine_rows([micro_bundles / "plain"]))


def test_facts_of_an_engine_that_cannot_be_loaded_here(micro_bundles: Path, tmp_path: Path) -> None:
    """With a manifest as a TensorRT-RTX build writes it, on a machine without a GPU."""
    folder = tmp_path / "rtx"
    shutil.copytree(micro_bundles / "plain", folder)

    def compiled(manifest: dict[str, Any]) -> None:
        manifest |= {"backend": "tensorrt-rtx", "name": "rtx", "target": "sm_89"}
        manifest["networks"]["unet"]["file"] = "unet.engine"
        manifest["files"]["unet.engine"] = {"sha256": "0" * 64, "bytes": 12345}

    reseal(folder, compiled)
    (unet,) = (row for row in engine_rows([folder]) if row["network"] == "unet")
    assert (unet["file_bytes"], unet["layers"], unet["target"]) == (12345, None, "sm_89")
    assert unet["graph_bytes"] > 12345 and "not loaded here" in unet["note"]
    reported = {"unet": {"layers": 300, "reformats": 20, "device_memory_bytes": 7}}
    (unet,) = (
        row
        for row in engine_rows([folder], [SimpleNamespace(name="rtx", facts=lambda: reported)])
        if row["network"] == "unet"
    )
    assert (unet["layers"], unet["reformats"], unet["device_memory_bytes"], unet["note"]) == (300, 20, 7, None)


def test_an_unknown_engine_is_refused(engines: Path) -> None:
    with pytest.raises(InputError, match="no engine named 'nope'"):
        engine_rows(["nope"])


class Engine:
    """A fake engine that has only an inspector."""

    device_memory_size_v2 = 4096

    def __init__(self, information: str) -> None:
        self.said = information

    def create_engine_inspector(self) -> Any:
        return SimpleNamespace(get_engine_information=lambda form: self.said if form == "JSON" else "")


@pytest.mark.parametrize(
    "layers",
    [
        ["conv_in + bias", "Reformatting CopyNode for Input Tensor 0 to conv_in", "__myl_Add"],
        [
            {"Name": "conv_in", "LayerType": "CaskConvolution"},
            {"Name": "copy", "LayerType": "Reformat"},
            {"Name": "add", "LayerType": "kgen"},
        ],
    ],
)
def test_layers_are_counted_by_name_or_by_details(layers: list[Any]) -> None:
    trt = SimpleNamespace(LayerInformationFormat=SimpleNamespace(JSON="JSON"))
    result = facts(trt, Engine(json.dumps({"Layers": layers})))
    assert result == {"layers": 3, "reformats": 1, "device_memory_bytes": 4096}


@pytest.mark.parametrize("said", ["", "not JSON", "{}", '{"Layers": []}', "[]"])
def test_an_engine_without_layer_information(said: str) -> None:
    trt = SimpleNamespace(LayerInformationFormat=SimpleNamespace(JSON="JSON"))
    assert facts(trt, Engine(said)) == {"device_memory_bytes": 4096}
