"""Report on an engine's kernels, fusions, and bytes moved per run, from the log of TensorRT-RTX's builder.

With detailed profiling the builder logs the layers of an engine after building it, for every profile.  An inspector
has the same information but needs the GPU that the engine is for.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

#: start of the log message that lists the layers
BEGIN = "Layers:"
_LAYER = re.compile(r"^Name: (?P<name>.*?), LayerType: (?P<kind>\w+), (?P<rest>.*)$", re.MULTILINE)
_TENSOR = re.compile(r"Dimensions: \[([-\d,]*)\].*?Datatype: (\w+)")
_PLACE = re.compile(r"_myl(\d+)_\d+$")
_BYTES = {"Half": 2, "BF16": 2, "Float": 4, "Int8": 1, "FP8": 1, "Int32": 4, "Int64": 8, "Bool": 1}
#: layers that are not kernels: synchronisation with other streams, and shape computations
_NO_KERNEL = ("signal", "wait", "shape_call")


def report(log: str, profiles: Sequence[str]) -> list[dict[str, Any]]:
    """Count the kernels of each profile, in the profiles' order; empty if the log has another format.

    The counts of a profile are ``kernels``; ``convolutions``, and among them ``with_residual``, which also add a second
    tensor; ``norms`` (group norms), and among them ``with_silu``; and ``attentions`` that are a single kernel each.
    ``activation_bytes`` and ``weight_bytes`` are what a run reads and writes, the former None if the profile leaves a
    size open.

    Args:
        log: the message that starts with ``BEGIN``.
        profiles: names of the profiles.
    """
    rows: dict[int, dict[str, Any]] = {}
    for layer in _LAYER.finditer(log):
        place = _PLACE.search(layer["name"])
        if place is None or layer["kind"] in _NO_KERNEL:
            continue
        row = rows.setdefault(int(place[1]), _empty())
        inputs, constants, outputs, nodes = _parts(layer["rest"])
        row["kernels"] += 1
        if layer["kind"] == "correlation":
            row["convolutions"] += 1
            row["with_residual"] += len(_TENSOR.findall(inputs)) > 1
        if "group_norm" in nodes and re.search(r"Gno?r", layer["name"]):
            row["norms"] += 1
            row["with_silu"] += "Silu" in layer["name"]
        row["attentions"] += "_gemm_mha" in layer["name"]
        row["weight_bytes"] += _volume(constants) or 0
        moved = _volume(inputs + outputs)
        known = row["activation_bytes"] is not None and moved is not None
        row["activation_bytes"] = row["activation_bytes"] + moved if known else None
    if set(rows) != set(range(len(profiles))):
        return []
    return [{"profile": name, **rows[i]} for i, name in enumerate(profiles)]


def _empty() -> dict[str, Any]:
    counts = ("kernels", "convolutions", "with_residual", "norms", "with_silu", "attentions")
    return {**dict.fromkeys(counts, 0), "activation_bytes": 0, "weight_bytes": 0}


def _parts(rest: str) -> tuple[str, str, str, str]:
    """Split a layer's text into its inputs, constants, outputs, and the graph nodes that it implements."""
    constants, outputs, end = (rest.find(word) for word in ("Constants: [", "Outputs: [", "TacticName:"))
    if -1 in (constants, outputs, end):
        return "", "", "", ""
    return rest[:constants], rest[constants:outputs], rest[outputs:end], rest[end:]


def _volume(text: str) -> int | None:
    """Return the bytes of the tensors in a text; None if a size is open."""
    total = 0
    for dimensions, kind in _TENSOR.findall(text):
        count = 1
        for side in dimensions.split(","):
            if int(side or 1) < 0:
                return None
            count *= int(side or 1)
        total += count * _BYTES.get(kind, 2)
    return total


def sentence(row: Any) -> str | None:
    """Format a profile's report as a sentence; None if it is malformed, because manifests are untrusted."""
    counts = ("kernels", "convolutions", "with_residual", "norms", "with_silu", "attentions", "weight_bytes")
    if not isinstance(row, dict) or not all(isinstance(row.get(key), int) for key in counts):
        return None
    moved = row.get("activation_bytes")
    activations = f"{moved / 2**20:,.1f} MiB activations, " if isinstance(moved, int) else ""
    fused = [
        f"{row['with_residual']} of {row['convolutions']} convolutions with a residual" if row["convolutions"] else "",
        f"{row['with_silu']} of {row['norms']} group norms with SiLU" if row["norms"] else "",
        f"{row['attentions']} attentions" if row["attentions"] else "",
    ]
    return (
        f"{row.get('profile')}: {row['kernels']} kernels, {activations}{row['weight_bytes'] / 2**20:,.1f} MiB weights "
        f"per evaluation; fused: {', '.join(filter(None, fused)) or 'nothing'}"
    )
