"""Rewrite a graph's data file with other weights at the same offsets; everything else is copied unchanged.

The graph has the place (ONNX external data: location, offset, length), type and shape of each initialiser;
``weights.json`` has the checkpoint key that it comes from and the transform.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ...bundle.manifest import WEIGHTS
from ...errors import InputError, PnpError
from ...graph.weights import apply, onnx_type

if TYPE_CHECKING:
    from torch import Tensor

_CHUNK = 8 << 20


@dataclass(frozen=True)
class Place:
    """Offset and length of an initialiser in the data file, in bytes, and its type and shape."""

    name: str
    offset: int
    length: int
    dtype: Any
    shape: tuple[int, ...]


def places(graph: Path, weights: Mapping[str, Any]) -> list[Place]:
    """The external initialisers of a graph in file order.

    Raises:
        PnpError: if graph and weight map name different initialisers, or two of them overlap.
    """
    import onnx_ir as ir

    initializers = {n: v.const_value for n, v in ir.load(graph).graph.initializers.items()}
    out = [
        Place(n, t.offset or 0, t.length or 0, t.dtype, tuple(int(d) for d in t.shape))
        for n, t in initializers.items()
        if isinstance(t, ir.ExternalTensor)
    ]
    if differ := sorted({p.name for p in out} ^ set(weights)):
        raise PnpError(
            f"{WEIGHTS} and {graph.name} differ in {len(differ)} weights, for example {differ[0]}; build again"
        )
    out.sort(key=lambda p: p.offset)
    for a, b in pairwise(out):
        if a.offset + a.length > b.offset:
            raise PnpError(f"{graph.name}: {a.name} and {b.name} overlap; build again")
    return out


def check_keys(weights: Mapping[str, Any], new_weights: Mapping[str, Mapping[str, Tensor]], whole: bool = True) -> None:
    """Check that every weight of the swapped sources is present, and none is left over.

    Args:
        weights: initialiser → ``{"source", "key", "transform"}``; several initialisers may use one key.
        new_weights: new weights by source and key.
        whole: whether the graph uses all of a source; an autoencoder's encoder and decoder each use a part.

    Raises:
        InputError: listing missing and left-over weights.
    """
    for source, tensors in new_weights.items():
        expected = {w["key"] for w in weights.values() if w["source"] == source}
        missing = sorted(expected - tensors.keys())
        extra = sorted(tensors.keys() - expected) if whole else []
        if missing or extra:
            raise InputError(
                f"the {source} does not fit the graph: {len(missing)} weights are missing ({', '.join(missing[:4])}) "
                f"and {len(extra)} left over ({', '.join(extra[:4])}); build it instead"
            )


def rewrite(
    graph: Path, old: BinaryIO, new: Path, weights: Mapping[str, Any], new_weights: Mapping[str, Mapping[str, Tensor]]
) -> str:
    """Write ``new``, the data file of ``graph`` with the weights of some sources replaced; return its sha256.

    Weights are converted to the graph's type one at a time.

    Args:
        old: the data file to copy the other weights from, open for reading.
        weights, new_weights: as for ``check_keys``.

    Raises:
        InputError: for a weight that is not finite, or whose shape or type differs from the graph's.
        PnpError: if a weight that is not replaced was changed.
    """
    initializers = places(graph, weights)
    size = old.seek(0, os.SEEK_END)
    file_hash = hashlib.sha256()
    copied: list[Place] = []
    with new.open("wb") as target:

        def put(data: Any) -> None:
            target.write(data)
            file_hash.update(data)

        for place in initializers:
            put(bytes(place.offset - target.tell()))  # padding: large weights are aligned to pages
            w = weights[place.name]
            if w["source"] in new_weights:
                put(_bytes(new_weights[w["source"]][w["key"]], w, place))
            else:
                copied.append(place)
                for chunk in _chunks(old, place):
                    put(chunk)
        put(bytes(size - target.tell()))
    with new.open("rb") as written:
        before, after = _hash(old, copied), _hash(written, copied)
    if before != after:
        raise PnpError(f"{new.name}: unreplaced weights have changed (sha256 {after[:12]}…, not {before[:12]}…)")
    return file_hash.hexdigest()


def _bytes(tensor: Tensor, weight: Mapping[str, Any], place: Place) -> Any:
    """A checkpoint's tensor as the bytes of its initialiser."""
    import torch

    data = apply(weight["transform"], tensor)
    key = f"{weight['source']}.{weight['key']}"
    if tuple(data.shape) != place.shape:
        raise InputError(f"{key} has shape {list(data.shape)} in the graph's order, the graph has {list(place.shape)}")
    if onnx_type(data.dtype) != place.dtype or data.numel() * data.element_size() != place.length:
        raise InputError(f"{key} becomes {data.dtype}, the graph has {place.dtype.name}; build again")
    if data.is_floating_point() and not _finite(data):
        if not _finite(tensor):
            raise InputError(f"the weight {key} holds values that are not finite; fetch or train it again")
        largest = float(tensor.abs().max())
        raise InputError(f"the weight {key} reaches {largest:.1e}, too large for {data.dtype}; build another precision")
    return data.reshape(-1).view(torch.uint8).numpy().data


def _finite(tensor: Tensor) -> bool:
    # the extremes are not finite if any value is not; several times as fast as checking each value
    tensor = tensor.float() if tensor.element_size() == 1 else tensor  # float8 has no comparison
    return not tensor.numel() or all(bool(v.isfinite()) for v in tensor.aminmax())


def _chunks(file: BinaryIO, place: Place) -> Iterator[bytes]:
    file.seek(place.offset)
    left = place.length
    while left:
        data = file.read(min(left, _CHUNK))
        if not data:
            raise InputError(f"{file.name} ends before {place.name}; build the bundle again")
        left -= len(data)
        yield data


def _hash(file: BinaryIO, parts: list[Place]) -> str:
    out = hashlib.sha256()
    for place in parts:
        for chunk in _chunks(file, place):
            out.update(chunk)
    return out.hexdigest()
