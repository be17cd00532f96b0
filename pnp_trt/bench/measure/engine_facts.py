"""Cost of the engines: bytes on disk, memory on the device, layers and reformats, network by network.

Bytes come from the manifest, which is checked against the files. Layers come from the runtime's inspector if the engine
is loaded, or from the graph for ONNX Runtime. Values that nothing reports are None, with a note that gives the reason.
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
    """Return one row per network of each engine, for the document's `engines`.

    engines: bundles by name or path; they need not be runnable here.  loaded: pipelines of the engines that are
    loaded, whose runtimes report layers and memory.

    A row has `engine`, `backend`, `precision` (of the network), `target`, `network`, `file_bytes` (of the loaded file,
    weights included), `graph_bytes` (of the graph it was compiled from, weights included), `device_memory_bytes`
    (working memory of the engine, without weights), `layers`, `reformats` and `note`.

    Raises InputError for an engine that does not exist, or whose manifest is damaged.
    """
    facts = {pipe.name: pipe.facts() for pipe in loaded}
    rows = []
    for engine in engines:
        folder = find_bundle(str(engine))
        manifest = read_manifest(folder)
        for network, entry in manifest.networks.items():
            rows.append(_row(folder, manifest, network, entry, facts.get(manifest.name)))
    return rows


def _row(
    folder: Path,
    manifest: Manifest,
    network: str,
    entry: NetworkRecord,
    facts: Mapping[str, Mapping[str, int]] | None,
) -> dict[str, Any]:
    try:
        counts, note = backends.of(manifest).layers(
            folder / entry.graph, None if facts is None else facts.get(network, {})
        )
    except InputError as e:  # the backend's package is not installed here
        counts, note = {}, str(e)
    return {
        "engine": manifest.name,
        "backend": manifest.backend,
        "precision": entry.precision,
        "target": manifest.target,
        "network": network,
        "file_bytes": manifest.size_of(entry.file),
        "graph_bytes": manifest.size_of(entry.graph),
        "device_memory_bytes": counts.get("device_memory_bytes"),
        "layers": counts.get("layers"),
        "reformats": counts.get("reformats"),
        "note": note,
    }
