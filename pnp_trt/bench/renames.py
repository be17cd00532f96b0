"""Field names of earlier results documents and their current names; apply :func:`current_names` before reading one."""

from __future__ import annotations

from typing import Any

#: old fields of ``pnp-trt/bench/2`` and of the records under ``benchmarks/results`` written until November 2026
RENAMED = {
    "passes": "evaluations", "passes_per_picture": "evaluations", "pictures": "images", "picture": "image",
    "real_pictures": "real_images", "picture_includes": "image_includes", "macs_per_picture": "macs_per_image",
    "macs_per_picture_without_attention": "macs_per_image_without_attention",
    "p50_ms_per_picture": "p50_ms_per_image", "pictures_per_s": "images_per_s",
    "energy_j_per_picture": "energy_j_per_image", "joules_a_picture": "joules_per_image",
    "picture_ms": "image_ms", "picture_us": "image_us", "ms_per_picture": "ms_per_image",
}  # fmt: skip


def current_names(value: Any) -> Any:
    """Return ``value``, a parsed JSON document or a part of one, with every renamed field under its current name."""
    if isinstance(value, list):
        return [current_names(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {_name(key, item): "image" if (key, item) == ("per", "picture") else current_names(item)
            for key, item in value.items()}  # fmt: skip


def _name(key: str, value: Any) -> str:
    # in a method's cost, 'passes' listed the networks of one prediction; elsewhere it counted evaluations
    return "networks" if key == "passes" and isinstance(value, list) else RENAMED.get(key, key)
