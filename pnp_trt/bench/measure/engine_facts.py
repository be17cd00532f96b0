"""The engines' side of the cost: bytes on disk, memory on the device, layers and reformats, network by network.

Bytes come from the manifest, which is checked against the files. Layers come from the runtime's own inspector where the
engine is loaded, and for graphs that ONNX Runtime loads, from the graph. What nothing reports is None, and a note gives
why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ... import backends
from ...bundle.manifest import Manifest, NetworkRecord
from ...bundle.store import find_bundle, read_manifest
from ...errors import InputError

if TYPE_CHECKING:
    from ...runtime.pipeline import Pipeline


def engine_rows(engines: Sequence[str | Path], loaded: Sequence[Pipeline] = ()) -> list[dict[str, Any]]:
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
    try:
        own, note = backends.of(manifest).layers(folder / entry.graph, None if told is None else told.get(network, {}))
    except InputError as e:  # a backend of a package that is not installed here
        own, note = {}, str(e)
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
        "note": note,
    }
