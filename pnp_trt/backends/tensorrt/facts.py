"""What an engine's own inspector tells: its layers, how many of them only reformat, and the memory it works in.

Sources: ``IEngineInspector`` and ``ICudaEngine`` of TensorRT 10.15 to 11.4 and TensorRT-RTX 1.7 (docs.nvidia.com,
"Engine Inspector").  Engines keep their layers' names by default, and types and formats only where they were built
with detailed profiling, so that reformats are known by either.
"""

from __future__ import annotations

import json
from typing import Any


def facts(trt: Any, engine: Any) -> dict[str, int]:
    """``layers``, ``reformats`` and ``device_memory_bytes`` of a loaded engine; what it does not tell is missing.

    Args:
        trt: the module ``tensorrt`` or ``tensorrt_rtx``.
        engine: an ``ICudaEngine``.
    """
    found: dict[str, int] = {}
    # since 10.1 the one without the suffix is deprecated, and 11 has it no more
    memory = getattr(engine, "device_memory_size_v2", None) or getattr(engine, "device_memory_size", None)
    if memory is not None:
        found["device_memory_bytes"] = int(memory)
    try:
        told = json.loads(engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON))
        layers = told["Layers"]
    except (AttributeError, KeyError, TypeError, ValueError):
        return found  # no inspector, or an engine built to keep nothing of its layers
    if layers:
        found["layers"] = len(layers)
        found["reformats"] = sum("reformat" in _words(layer) for layer in layers)
    return found


def _words(layer: Any) -> str:
    """A layer's name, and its type where it is kept, in small letters."""
    if isinstance(layer, dict):
        return f"{layer.get('LayerType', '')} {layer.get('Name', '')}".lower()
    return str(layer).lower()
