"""A graph's data file written again with other weights: same places, same lengths, what is not swapped byte by byte.

The graph's own entries say where each initialiser lies (ONNX external data: location, offset, length) and what it
measures; ``weights.json`` states which checkpoint key it is made of and how.
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
    """Where an initialiser lies in the data file, in bytes, and what it measures."""

    name: str
    offset: int
    length: int
    dtype: Any
    shape: tuple[int, ...]


def places(graph: Path, weights: Mapping[str, Any]) -> list[Place]:
    """The external initialisers of a graph in the order of the file.

    Raises:
        PnpError: if graph and map name different ones, or two share bytes.
    """
    import onnx_ir as ir

    held = {n: v.const_value for n, v in ir.load(graph).graph.initializers.items()}
    found = [
        Place(n, t.offset or 0, t.length or 0, t.dtype, tuple(int(d) for d in t.shape))
        for n, t in held.items()
        if isinstance(t, ir.ExternalTensor)
    ]
    if differ := sorted({p.name for p in found} ^ set(weights)):
        raise PnpError(
            f"{WEIGHTS} and {graph.name} differ in {len(differ)} weights, for example {differ[0]}; build again"
        )
    found.sort(key=lambda p: p.offset)
    for a, b in pairwise(found):
        if a.offset + a.length > b.offset:
            raise PnpError(f"{graph.name}: {a.name} and {b.name} share bytes; build again")
    return found


def check_keys(weights: Mapping[str, Any], given: Mapping[str, Mapping[str, Tensor]], whole: bool = True) -> None:
    """Every weight of a source that is swapped is there, and none is left over.

    Args:
        weights: initialiser → ``{"source", "key", "transform"}``; one key may feed several.
        given: the swapped sources' weights by key.
        whole: whether the graph uses the whole source; an autoencoder's other half is not among its weights.

    Raises:
        InputError: listing both sets.
    """
    for source, tensors in given.items():
        wanted = {w["key"] for w in weights.values() if w["source"] == source}
        missing = sorted(wanted - tensors.keys())
        extra = sorted(tensors.keys() - wanted) if whole else []
        if missing or extra:
            raise InputError(
                f"the {source} does not fit the graph: {len(missing)} weights are missing ({', '.join(missing[:4])}) "
                f"and {len(extra)} left over ({', '.join(extra[:4])}); build it instead"
            )


def rewrite(
    graph: Path, old: BinaryIO, new: Path, weights: Mapping[str, Any], given: Mapping[str, Mapping[str, Tensor]]
) -> str:
    """Write ``new``, the data file of ``graph`` with the weights of some sources replaced; return its sha256.

    One weight at a time is held in the graph's type.

    Args:
        old: the data file that the rest is copied from, open for reading.
        weights, given: as of ``check_keys``.

    Raises:
        InputError: for a weight that is not finite, or whose shape or type the graph does not take.
        PnpError: if a kept weight did not come out as it went in.
    """
    found = places(graph, weights)
    size = old.seek(0, os.SEEK_END)
    whole = hashlib.sha256()
    kept: list[Place] = []
    with new.open("wb") as target:

        def put(data: Any) -> None:
            target.write(data)
            whole.update(data)

        for place in found:
            put(bytes(place.offset - target.tell()))  # large weights begin at a page
            w = weights[place.name]
            if w["source"] in given:
                put(_bytes(given[w["source"]][w["key"]], w, place))
            else:
                kept.append(place)
                for chunk in _chunks(old, place):
                    put(chunk)
        put(bytes(size - target.tell()))
    with new.open("rb") as made:
        before, after = _hash(old, kept), _hash(made, kept)
    if before != after:
        raise PnpError(f"{new.name}: what was to be kept has changed (sha256 {after[:12]}…, not {before[:12]}…)")
    return whole.hexdigest()


def _bytes(tensor: Tensor, weight: Mapping[str, Any], place: Place) -> Any:
    """A checkpoint's tensor as the bytes of its initialiser."""
    import torch

    made = apply(weight["transform"], tensor)
    key = f"{weight['source']}.{weight['key']}"
    if tuple(made.shape) != place.shape:
        raise InputError(f"{key} has shape {list(made.shape)} in the graph's order, the graph has {list(place.shape)}")
    if onnx_type(made.dtype) != place.dtype or made.numel() * made.element_size() != place.length:
        raise InputError(f"{key} comes out as {made.dtype}, the graph has {place.dtype.name}; build again")
    if made.is_floating_point() and not _finite(made):
        if not _finite(tensor):
            raise InputError(f"the weight {key} holds values that are not finite; fetch or train it again")
        largest = float(tensor.abs().max())
        raise InputError(f"the weight {key} reaches {largest:.1e}, too large for {made.dtype}; build another precision")
    return made.reshape(-1).view(torch.uint8).numpy().data


def _finite(tensor: Tensor) -> bool:
    # the extremes are not finite where any value is not; several times as fast as looking at each
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
