"""Facts from an engine's inspector: its number of layers, how many only reformat data, and its device memory.

Sources: ``IEngineInspector`` and ``ICudaEngine`` of TensorRT 10.15 to 11.4 and TensorRT-RTX 1.7 (docs.nvidia.com,
"Engine Inspector").  Engines keep the names of their layers by default, but types and formats only if they
were built with detailed profiling.  Reformats are therefore recognised by name or type.
"""

from __future__ import annotations

import json
from typing import Any


def facts(trt: Any, engine: Any) -> dict[str, int]:
    """Return ``layers``, ``reformats`` and ``device_memory_bytes`` of a loaded engine, as far as reported.

    Args:
        trt: the module ``tensorrt`` or ``tensorrt_rtx``.
        engine: an ``ICudaEngine``.
    """
    result: dict[str, int] = {}
    # the name without the suffix is deprecated since 10.1 and removed in 11
    memory = getattr(engine, "device_memory_size_v2", None) or getattr(engine, "device_memory_size", None)
    if memory is not None:
        result["device_memory_bytes"] = int(memory)
    try:
        information = json.loads(
            engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
        )
        layers = information["Layers"]
    except (AttributeError, KeyError, TypeError, ValueError):
        return result  # no inspector, or an engine built without layer information
    if layers:
        result["layers"] = len(layers)
        result["reformats"] = sum("reformat" in _words(layer) for layer in layers)
    return result


def _words(layer: Any) -> str:
    """Return a layer's type, if it is kept, and name, in lower case."""
    if isinstance(layer, dict):
        return f"{layer.get('LayerType', '')} {layer.get('Name', '')}".lower()
    return str(layer).lower()
