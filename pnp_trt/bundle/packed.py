"""Assemble bundles that the package ships without weights from the bundled model's checkpoints.

The graphs, manifest and golden inputs of a bundle take half a megabyte; its weights come from checkpoints that the
package ships anyway.  ``assets/bundles/NAME/`` contains the former and ``packed.json``, which lists the checkpoint and
the offset in the data file of every weight.  Assembly needs neither torch nor an export.  The result is checked against
the manifest's hashes, so it is byte-for-byte equal to the bundle that ``pnp-trt build`` wrote.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..assets import ROOT
from ..errors import BundleCorrupt
from ..io.files import make_folder
from .manifest import FILE as MANIFEST
from .store import lock, read_manifest, sha256, whole_folder

PACKED = "packed.json"
_ADVICE = "the installation is damaged; install pnp-trt again"


def packed_bundles() -> list[str]:
    """Names of the bundles that can be assembled."""
    return sorted(p.parent.name for p in (ROOT / "bundles").glob(f"*/{PACKED}"))


def assemble(name: str, folder: Path) -> None:
    """Write the bundle ``name`` of :func:`packed_bundles` to ``folder`` atomically.

    Nothing is done if another process has written the bundle in the meantime.

    Raises:
        BundleCorrupt: if a file differs from its manifest's hash.
        PnpError: if ``folder`` cannot be written.
    """
    source = ROOT / "bundles" / name
    manifest = read_manifest(source)
    packed = json.loads((source / PACKED).read_text(encoding="utf-8"))
    make_folder(folder.parent)
    with lock(folder):
        if (folder / MANIFEST).exists():
            return
        with whole_folder(folder) as work:
            checkpoints = {key: _Checkpoint(ROOT / path) for key, path in packed["checkpoints"].items()}
            for relative, record in manifest.files.items():
                target = work / relative
                if relative in packed["data"]:
                    _write_data(target, record.size, packed["data"][relative], checkpoints)
                else:
                    shutil.copyfile(ROOT / packed["copies"].get(relative, f"bundles/{name}/{relative}"), target)
                if (contents := sha256(target)) != record.sha256:
                    raise BundleCorrupt(
                        f"packed bundle '{name}': {relative} has sha256 {contents[:12]}…, its manifest states "
                        f"{record.sha256[:12]}…; {_ADVICE}"
                    )
            shutil.copyfile(source / MANIFEST, work / MANIFEST)


class _Checkpoint:
    """A safetensors file, opened when its first tensor is read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: Any = None

    def tensor(self, key: str) -> np.ndarray:
        from safetensors import SafetensorError, safe_open

        try:
            if self._file is None:
                self._file = safe_open(self.path, framework="numpy")
            tensor: np.ndarray = self._file.get_tensor(key)
        except (OSError, SafetensorError) as e:
            raise BundleCorrupt(f"{self.path.name} has no readable tensor {key} ({e}); {_ADVICE}") from None
        return tensor


def _write_data(target: Path, size: int, weights: list[Any], checkpoints: Mapping[str, _Checkpoint]) -> None:
    """Write an ONNX data file of ``size`` bytes.

    Args:
        weights: a list of ``{"offset", "source", "key", "transform"}``, as in ``weights.json``.
    """
    with target.open("wb") as file:
        file.truncate(size)  # gaps between weights are zero
        for weight in weights:
            tensor = checkpoints[weight["source"]].tensor(weight["key"])
            file.seek(weight["offset"])
            file.write(transformed(tensor, weight["transform"]).tobytes())


def transformed(tensor: np.ndarray, transform: list[dict[str, Any]]) -> np.ndarray:
    """A checkpoint's tensor as stored in a float32 graph; ``graph.weights.apply`` without torch.

    Raises:
        BundleCorrupt: for a step other than cast, transpose and reshape.
    """
    for step in transform:
        match step["op"]:
            case "cast":
                tensor = tensor.astype(step["to"])
            case "transpose":
                tensor = tensor.transpose(step["perm"])
            case "reshape":
                tensor = tensor.reshape(step["shape"])
            case other:
                raise BundleCorrupt(f"a packed bundle has the transform '{other}'; {_ADVICE}")
    return tensor
