"""Restore a bundle's guide as a PyTorch module, for the reference that a plugged graph is compared with."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from ...bundle.manifest import Manifest
from ...errors import InputError, PnpError
from ...graph.weights import invert
from ...models.identity import guide_identity, guide_name
from ..spec import BuildSpec
from .rewrite import places


def guide_of(manifest: Manifest, graph: Path, data: BinaryIO, weights: dict[str, Any], unet: Any) -> tuple[Any, str]:
    """Return the guide that is fused into a bundle's U-Net, without its sharpener, and the origin of its weights.

    The weights are loaded from the guide that the build used if it is unchanged.  Otherwise they are read back from the
    graph: exactly if it is in float32, rounded to its type if it is in half precision.

    Args:
        graph: the U-Net's ONNX file.
        data: its weight file, open for reading.
        weights: its part of ``weights.json``.
        unet: the U-Net that the guide is for.

    Raises:
        InputError: if both fail.
    """
    from ...models.guides.sharpener import without_sharpener

    arguments, guide = manifest.given, manifest.guide
    assert arguments is not None and guide is not None, "an engine that is plugged has both"
    with suppress(InputError, OSError, ValueError):
        # only a random base creates guides; the manifest is untrusted, so no other base is resolved
        spec = BuildSpec(
            base=arguments.base if arguments.base.startswith("random:") else "emoji", guide=arguments.guide
        )
        if guide_identity(spec.base, spec.guide) == guide.to_json():
            return without_sharpener(_from_files(spec, unet)), arguments.guide
    return _from_graph(manifest, graph, data, weights), "the graph itself"


def _from_files(spec: BuildSpec, unet: Any) -> Any:
    from ...models.bases import resolve
    from ...models.guides.load import load_guide

    base = resolve(spec.base)
    if base.random_guide(spec.guide) is not None:
        return base.make_guide(spec.guide, unet)
    return load_guide(guide_name(spec.guide))


def _from_graph(manifest: Manifest, graph: Path, data: BinaryIO, weights: dict[str, Any]) -> Any:
    import numpy as np
    import torch

    from ...models.guides import GUIDES, name_of_class
    from ...models.guides.condition import without_constant_parts
    from ...models.guides.sharpener import without_sharpener

    assert manifest.guide is not None and manifest.configs is not None, "an engine that is plugged has both"
    name, config = manifest.guide.name, manifest.configs.get("guide")
    if config is None or "_class_name" not in config:
        raise InputError(f"guide '{name}' is not where the build found it, and its config is not in the bundle")
    guide = GUIDES[name_of_class(config["_class_name"], f"the engine's config of guide '{name}'")].from_config(config)
    if "condition" in manifest.networks:
        guide = without_constant_parts(guide)
    guide = without_sharpener(guide)
    own = guide.state_dict()
    restored = {}
    for place in places(graph, weights):
        w = weights[place.name]
        if w["source"] == "guide" and w["key"] not in restored:
            with suppress(PnpError):  # another initialiser of the same key may be invertible
                data.seek(place.offset)
                array = np.frombuffer(data.read(place.length), place.dtype.numpy()).reshape(place.shape)
                restored[w["key"]] = invert(
                    w["transform"], torch.from_numpy(array.astype("float32")), tuple(own[w["key"]].shape)
                )
    if lost := sorted(own.keys() - restored.keys()):
        raise InputError(
            f"guide '{name}' is not where the build found it, and {len(lost)} of its weights cannot be read back "
            f"from the graph, for example {lost[0]}; restore the guide, or build the bundle again"
        )
    guide.load_state_dict(restored)
    return guide.eval().requires_grad_(False)
