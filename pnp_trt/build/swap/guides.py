"""The guide of a bundle as a PyTorch module again: the reference that a plugged graph is compared with needs it."""

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
    """The guide that is fused into a bundle's U-Net, its sharpener apart, and where its weights were found.

    They are taken from where the build took them if that is still the same, else read back from the graph: exact
    where the graph is in float32, rounded as the graph has them in half precision.

    Args:
        graph: the U-Net's ONNX file.
        data: its file of weights, open for reading.
        weights: its part of ``weights.json``.
        unet: the U-Net that the guide is for.

    Raises:
        InputError: if neither can be had.
    """
    from ...models.guides.sharpener import without_sharpener

    given, guide = manifest.given, manifest.guide
    assert given is not None and guide is not None, "an engine that is plugged has both"
    with suppress(InputError, OSError, ValueError):
        # only a base of random weights makes guides of its own; an engine's own word is no reason to fetch another
        spec = BuildSpec(base=given.base if given.base.startswith("random:") else "emoji", guide=given.guide)
        if guide_identity(spec.base, spec.guide) == guide.to_json():
            return without_sharpener(_from_files(spec, unet)), given.guide
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
        raise InputError(f"guide '{name}' is not where the engine was built from, and its config is not in the bundle")
    guide = GUIDES[name_of_class(config["_class_name"], f"the engine's config of guide '{name}'")].from_config(config)
    if "condition" in manifest.networks:
        guide = without_constant_parts(guide)
    guide = without_sharpener(guide)
    own = guide.state_dict()
    found = {}
    for place in places(graph, weights):
        w = weights[place.name]
        if w["source"] == "guide" and w["key"] not in found:
            with suppress(PnpError):  # another initialiser of the same key may be plain
                data.seek(place.offset)
                array = np.frombuffer(data.read(place.length), place.dtype.numpy()).reshape(place.shape)
                found[w["key"]] = invert(
                    w["transform"], torch.from_numpy(array.astype("float32")), tuple(own[w["key"]].shape)
                )
    if lost := sorted(own.keys() - found.keys()):
        raise InputError(
            f"guide '{name}' is not where the engine was built from, and {len(lost)} of its weights cannot be read "
            f"back from the graph, for example {lost[0]}; put the guide back, or build again"
        )
    guide.load_state_dict(found)
    return guide.eval().requires_grad_(False)
