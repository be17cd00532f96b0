"""The engines' side of the cost: bytes on disk, memory on the device, layers and reformats, network by network.

Bytes come from the manifest, which is checked against the files. Layers come from the runtime's own inspector where the
engine is loaded, and for graphs that ONNX Runtime loads, from the graph. What nothing reports is None, and a note gives
why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ...bundle.manifest import Manifest, NetworkRecord
from ...bundle.store import find_bundle, read_manifest


class Loaded(Protocol):
    """A loaded bundle; `runtime.pipeline.Pipeline` is one."""

    @property
    def name(self) -> str:
        """Of the bundle."""

    def facts(self) -> dict[str, dict[str, int]]:
        """By network, see `backends.base.Network.facts`."""


def engine_rows(engines: Sequence[str | Path], loaded: Sequence[Loaded] = ()) -> list[dict[str, Any]]:
    """One row a network of each engine, as the document's `engines` holds it.

    engines: bundles by name or path; they need not run here.  loaded: those of them that do, as pipelines, whose
    runtimes are asked.

    A row has `engine`, `backend`, `precision` (the network's own), `target`, `network`, `file_bytes` (what is loaded,
    its weights included), `graph_bytes` (what it was compiled from, its weights included), `device_memory_bytes`
    (that the engine works in, weights apart), `layers`, `reformats` and `note`.

    Raises InputError for an engine that is not there, or whose manifest is damaged.
    """
    told = {pipe.name: pipe.facts() for pipe in loaded}
    rows = []
    for engine in engines:
        folder = find_bundle(str(engine))
        manifest = read_manifest(folder)
        for network, entry in manifest.networks.items():
            rows.append(_row(folder, manifest, network, entry, told.get(manifest.name)))
    return rows


def _row(
    folder: Path,
    manifest: Manifest,
    network: str,
    entry: NetworkRecord,
    told: Mapping[str, Mapping[str, int]] | None,
) -> dict[str, Any]:
    own = dict((told or {}).get(network, {}))
    notes = []
    if manifest.backend == "onnxruntime":
        nodes = _nodes(folder / entry.graph)
        if nodes is None:
            notes.append("layers are counted with the package onnx, which is not installed")
        else:
            own["layers"] = nodes
            notes.append("layers are the graph's nodes, before ONNX Runtime fuses any; it reports no reformats")
    elif manifest.backend == "torch":
        notes.append("PyTorch runs modules; there are no layers to count")
    elif told is None:
        notes.append("the engine is not loaded here, so that its inspector could not be asked")
    elif "layers" not in own:
        notes.append("the engine keeps nothing of its layers")
    return {
        "engine": manifest.name,
        "backend": manifest.backend,
        "precision": entry.precision,
        "target": manifest.target,
        "network": network,
        "file_bytes": manifest.size_of(entry.file),
        "graph_bytes": manifest.size_of(entry.graph),
        "device_memory_bytes": own.get("device_memory_bytes"),
        "layers": own.get("layers"),
        "reformats": own.get("reformats"),
        "note": "; ".join(notes) or None,
    }


def _nodes(graph: Path) -> int | None:
    """Nodes of an ONNX graph, those of subgraphs too; None without the package onnx."""
    try:
        import onnx
    except ImportError:
        return None

    def count(held: Any) -> int:
        inner = (a.g for node in held.node for a in node.attribute if a.type == onnx.AttributeProto.GRAPH)
        return len(held.node) + sum(count(g) for g in inner)

    return count(onnx.load(graph, load_external_data=False).graph)
